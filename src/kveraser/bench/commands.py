"""`kveraser bench variants` and `kveraser bench train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kveraser.console import bar, emit, print_rows, say
from kveraser.options import DEFAULT_MODEL, NO_ERASER, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone


def variants(
    corpus: Annotated[str, typer.Option(help="Hub dataset, .jsonl file or plain text.")] = "wikimedia/wikipedia",
    cases: Annotated[int, typer.Option(min=4, help="Training cases of each stage, and of a variant.")] = 60,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out cases.")] = 24,
    context: Annotated[tuple[int, int], typer.Option(help="Shortest and longest context, in words.")] = (150, 180),
    span: Annotated[tuple[int, int], typer.Option(help="Shortest and longest span, in words.")] = (24, 120),
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    only: Annotated[list[str] | None, typer.Option(help="Names of variants. Default: all.")] = None,
    output: Annotated[Path | None, typer.Option(help="File of finished variants, a line each; resumes there.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same cases and erasers.")] = 0,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Train small erasers that differ in one choice each on the same cases, and compare them."""
    from dataclasses import asdict

    from kveraser.bench.variants import VARIANTS, VariantRow, run, to_json
    from kveraser.training.cases import tokenize
    from kveraser.training.corpus import read_passages
    from kveraser.training.recipe import OptimizerSettings
    from kveraser.training.span_neighbor import SpanNeighborSettings, span_neighbor_cases
    from kveraser.training.tasks import TASKS, TaskSettings, task_cases

    unknown = [name for name in only or [] if name not in {variant.name for variant in VARIANTS}]
    if unknown:
        raise typer.BadParameter(f"no variant {unknown[0]!r}: there are {', '.join(one.name for one in VARIANTS)}")
    texts, tasks = read_passages(corpus, None, "text"), list(TASKS)
    backbone = load_backbone(model, NO_ERASER, device, dtype)
    neighbors, situations = SpanNeighborSettings(context, span), TaskSettings(context, span)
    stage1 = [tokenize(backbone, case) for case in span_neighbor_cases(texts, cases, seed, neighbors)]
    stage2 = [tokenize(backbone, case) for case in task_cases(tasks, texts, cases, seed, situations)]
    unseen = [tokenize(backbone, case) for case in task_cases(tasks, texts, held_out, seed, situations, "heldout")]
    lines = output.read_text("utf-8").splitlines() if output is not None and output.is_file() else []
    done = [VariantRow(**json.loads(line)) for line in lines]

    def keep(row: VariantRow) -> None:
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    # Small runs need their few cases in many small steps.
    optimizer = OptimizerSettings(learning_rate=rate, warmup_steps=3, cases_per_step=2, final_fraction=0.1)
    chosen = [variant for variant in VARIANTS if not only or variant.name in only]
    with bar(total=1.0) as advance:
        rows = run(backbone, stage1, stage2, unseen, chosen, optimizer, seed, done, advance, keep)
    settings = {"cases": cases, "held_out": held_out, "context": context, "span": span, "rate": rate, "seed": seed}
    if json_output:
        emit(to_json(rows, backbone, settings))
        return
    print_rows("Variants", [asdict(row) for row in rows], ["variant", "tokens", "kl", "fidelity", "leak", "no_harm"])


def train(
    cases: Annotated[int, typer.Option(min=1, help="Cases of stage 1, from generated text.")] = 8,
    cases_per_batch: Annotated[int, typer.Option(min=1, help="Most cases of one shape that run at once.")] = 4,
    context: Annotated[tuple[int, int], typer.Option(help="Shortest and longest context, in words.")] = (120, 180),
    span: Annotated[tuple[int, int], typer.Option(help="Shortest and longest span, in words.")] = (30, 60),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the cases in a round.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds after one of warm-up.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the text and the cases.")] = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Time training against a naive loop: one query a context, everything recomputed for it."""
    from kveraser.bench.training import BenchSettings, run, to_json
    from kveraser.eraser import Eraser

    backbone = load_backbone(model, eraser, device, dtype)
    notes = []
    if backbone.eraser is None:
        backbone.eraser = Eraser.untrained(backbone.model)
        notes.append("an untrained eraser of the paper's shape (rank 16, seven projections)")
    settings = BenchSettings(
        cases, cases_per_batch, context=context, span=span, epochs=epochs, repeats=repeats, seed=seed
    )
    with bar() as advance:
        rows, ratio = run(backbone, settings, advance)
    result = to_json(rows, ratio, backbone, settings, notes)
    if json_output:
        emit(result)
        return
    print_rows("Training", result["rows"], list(result["rows"][0]))
    say(f"The engine trains on {ratio:.1f} times the queries a second.")
