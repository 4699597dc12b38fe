"""`kveraser data build` and `kveraser train`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.options import Json, quiet
from kveraser.errors import InputError

if TYPE_CHECKING:
    from kveraser.training.recipe import Recipe

data = typer.Typer(help="Build training data.", no_args_is_help=True)


@data.command()
def build(
    output: Annotated[Path, typer.Argument(help="Case file to write: .arrow, else JSON lines.")],
    stage: Annotated[str, typer.Option(help="1: inserted unrelated text, 2: the tasks, both: half of each.")] = "1",
    tasks: Annotated[str | None, typer.Option(help="Tasks of stage 2, separated by commas. Default: all.")] = None,
    split: Annotated[str, typer.Option(help="train or heldout: disjoint passages, names and phrasings.")] = "train",
    corpus: Annotated[str, typer.Option(help="Hub dataset, .jsonl file or plain text.")] = "wikimedia/wikipedia",
    column: Annotated[str, typer.Option(help="Text column of a dataset or .jsonl file.")] = "text",
    passages: Annotated[int, typer.Option(min=2, help="Maximum number of passages to read.")] = 50_000,
    cases: Annotated[int, typer.Option(min=1, help="Cases to generate.")] = 1000,
    context: Annotated[tuple[int, int], typer.Option(help="Shortest and longest context, in words.")] = (120, 360),
    span: Annotated[tuple[int, int], typer.Option(help="Shortest and longest span, in words.")] = (8, 760),
    seed: Annotated[int, typer.Option(help="The same seed gives the same cases.")] = 42,
    resume: Annotated[bool, typer.Option(help="Continue an interrupted build.")] = True,
    tokens: Annotated[str | None, typer.Option(help="Also count tokens, with this backbone's tokenizer.")] = None,
    json_output: Json = False,
) -> None:
    """Build training or evaluation cases from a corpus."""
    from kveraser.training.build import BuildSettings, build_cases, check_settings, statistics_of
    from kveraser.training.cases import read_cases
    from kveraser.training.corpus import read_passages
    from kveraser.training.tasks import TASKS

    if tasks is not None and stage == "1":
        raise typer.BadParameter("--tasks belongs to stage 2: give --stage 2 or both")
    chosen = tuple(TASKS) if tasks is None else tuple(task.strip() for task in tasks.split(","))
    settings = BuildSettings(stage, chosen, split, cases, context, span, seed)  # type: ignore[arg-type]
    try:
        check_settings(settings)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    quiet()
    tokenizer = None
    if tokens is not None:
        from kveraser.training.plan import load_tokenizer

        tokenizer = load_tokenizer(tokens)
    with bar(total=1.0) as advance:
        advance("reading the corpus", 0.0)
        texts = read_passages(corpus, passages, column)
        try:
            done = build_cases(output, texts, settings, resume, advance)
        except KeyboardInterrupt as error:
            raise InputError(
                f"interrupted: the cases so far are kept beside {output}; the same command goes on from there"
            ) from error
        advance("counting", 1.0)
        statistics = statistics_of(read_cases(output), tokenizer)
    row = {
        "file": str(output),
        "cases": statistics.cases,
        "resumed_at": done,
        "duplicates": statistics.duplicates,
        "passages": len(texts),
    }
    task_rows, size_rows = ([asdict(one) for one in rows] for rows in (statistics.tasks, statistics.sizes))
    if json_output:
        emit({"rows": [row], "tasks": task_rows, "sizes": size_rows})
        return
    print_rows("Cases", [row], list(row))
    print_rows("Queries by kind", task_rows, list(task_rows[0]))
    print_rows("Sizes", size_rows, list(size_rows[0]))


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only estimate memory and time.")] = False,
    config: Annotated[Path | None, typer.Option(help="With --plan: folder with the backbone's config.json.")] = None,
    json_output: Json = False,
) -> None:
    """Train an eraser for a backbone from a recipe."""
    from kveraser.training.recipe import load_recipe

    if config is not None and not plan:
        raise typer.BadParameter("--config belongs to --plan: training needs the backbone itself")
    quiet()
    loaded = load_recipe(recipe)
    if plan:
        _plan(loaded, config, json_output)
        return
    from kveraser.training.log import Progress
    from kveraser.training.loop import train as run
    from kveraser.training.processes import Processes

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
    columns = ("step", "kl", "fidelity", "no_harm")
    evaluated = [{name: getattr(line, name) for name in columns} for line in lines if line.kl is not None]
    if not Processes().main:
        return
    if json_output:
        emit({"eraser": str(best), "rows": evaluated})
    else:
        print_rows("Held-out evaluation", evaluated, columns)
        say(f"Eraser: {best}")


def _plan(recipe: Recipe, config: Path | None, json_output: bool) -> None:
    from kveraser.training.plan import plan

    with bar() as advance:
        advance("planning")
        planned = plan(recipe, None if config is None else str(config))
    if json_output:
        emit(asdict(planned))
        return
    sizes = {name: value for name, value in asdict(planned).items() if not isinstance(value, dict | list)}
    print_rows("Plan", [{"": name.replace("_", " "), "value": value} for name, value in sizes.items()], ["", "value"])
    flops = dict(planned.flops_per_step)
    rows = [
        {"a step": phase, "TFLOP": value / 1e12} for phase, value in {**flops, "total": sum(flops.values())}.items()
    ]
    print_rows("Computation", rows, ["a step", "TFLOP"])
    estimates = {f"{one.device}, {one.precision}": one for one in planned.estimates}
    parts = [
        {"GiB": part.part} | {device: one.memory[place].bytes / 2**30 for device, one in estimates.items()}
        for place, part in enumerate(planned.estimates[0].memory)
    ]
    print_rows("Memory", parts, ["GiB", *estimates])
    times = [
        {"device": device, "seconds a step": one.seconds_per_step, "hours": one.hours}
        for device, one in estimates.items()
    ]
    print_rows("Time", times, ["device", "seconds a step", "hours"])
    if not planned.exact_tokens:
        say("No tokenizer at hand: tokens are estimated from words.")
    say("A utilization that is not measured holds for large backbones and full batches; small ones take longer.")
