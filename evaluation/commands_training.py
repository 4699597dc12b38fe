"""`python -m evaluation train`."""

from __future__ import annotations

from typing import Annotated

import typer

from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone


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
    from evaluation.training import BenchSettings, run, to_json
    from kveraser.steering.eraser import Eraser

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
