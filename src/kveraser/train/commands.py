"""`kveraser data build` and `kveraser train`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from kveraser.console import bar, emit, print_rows, say

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]

data = typer.Typer(help="Build training data.", no_args_is_help=True)


@data.command()
def build(
    output: Annotated[Path, typer.Argument(help="Case file to write, JSON lines.")],
    corpus: Annotated[str, typer.Option(help="Hub dataset, .jsonl file or plain text.")] = "wikimedia/wikipedia",
    column: Annotated[str, typer.Option(help="Text column of a dataset or .jsonl file.")] = "text",
    passages: Annotated[int | None, typer.Option(min=2, help="Most passages to read.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="Cases to generate.")] = 1000,
    context: Annotated[tuple[int, int], typer.Option(help="Shortest and longest context, in words.")] = (120, 360),
    span: Annotated[tuple[int, int], typer.Option(help="Shortest and longest span, in words.")] = (8, 760),
    seed: Annotated[int, typer.Option(help="The same seed gives the same cases.")] = 42,
    json_output: Json = False,
) -> None:
    """Stage 1: insert text of another document, and ask for the words around the seam."""
    from kveraser.train.cases import Case, write_cases
    from kveraser.train.corpus import read_passages
    from kveraser.train.span_neighbor import SpanNeighborSettings, span_neighbor_cases

    for name, (shortest, longest) in {"--context": context, "--span": span}.items():
        if not 1 <= shortest <= longest:
            raise typer.BadParameter(f"{name} is {shortest} {longest}: give the shortest, then the longest, from 1 on")
    sizes: list[int] = []
    with bar(total=1.0) as advance:
        advance("reading the corpus", 0.0)
        texts = read_passages(corpus, passages, column)

        def counted(case: Case) -> Case:
            sizes.append(len(case.context[slice(*case.span)].split()))
            advance(f"{len(sizes)} of {cases} cases", len(sizes) / cases)
            return case

        generated = span_neighbor_cases(texts, cases, seed, SpanNeighborSettings(context, span))
        written = write_cases(output, map(counted, generated))
    row: dict[str, Any] = {
        "file": str(output),
        "cases": written,
        "passages": len(texts),
        "span_words_shortest": min(sizes),
        "span_words_median": statistics.median(sizes),
        "span_words_longest": max(sizes),
    }
    if json_output:
        emit({"rows": [row]})
    else:
        print_rows("Cases", [row], list(row))


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    json_output: Json = False,
) -> None:
    """Train an eraser for a backbone, by a recipe."""
    from kveraser.train.loop import Progress
    from kveraser.train.loop import train as run
    from kveraser.train.recipe import load_recipe

    loaded = load_recipe(recipe)
    lines: list[Progress] = []
    with bar(total=1.0) as advance:

        def show(line: Progress) -> None:
            lines.append(line)
            advance(
                f"step {line.step} of {line.steps}, loss {line.loss:.4f}, {line.tokens_per_second:.0f} tokens/s",
                line.step / line.steps,
            )
            if line.kl is not None:
                fidelity = "-" if line.fidelity is None else f"{line.fidelity:.3f}"
                say(f"step {line.step}: held-out KL {line.kl:.4f} nats/token, fidelity {fidelity}")

        best = run(loaded, resume, show)
    evaluated = [{"step": line.step, "kl": line.kl, "fidelity": line.fidelity} for line in lines if line.kl is not None]
    if json_output:
        emit({"eraser": str(best), "rows": evaluated})
    else:
        print_rows("Held-out evaluation", evaluated, ["step", "kl", "fidelity"])
        say(f"Eraser: {best}")
