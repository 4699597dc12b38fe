"""`python -m evaluation serve`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from kveraser.cli.console import bar, emit, print_rows
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

HISTORY = ["change", "way", "method", "prompt_tokens", "run_tokens", "prefill_seconds", "first_token_seconds"]


def serve(
    measure: Annotated[str, typer.Option(help="Of history and streams, separated by commas.")] = "history,streams",
    method: Annotated[str | None, typer.Option(help="How the server erases. Default: its own choice.")] = None,
    length: Annotated[int, typer.Option(min=1, help="history: tokens of a conversation, about.")] = 4000,
    result: Annotated[int, typer.Option(min=1, help="history: tokens of the tool result that changes.")] = 100,
    streams: Annotated[int, typer.Option(min=2, help="streams: at once, against one.")] = 8,
    answer: Annotated[int, typer.Option(min=1, help="streams: tokens of an answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="history, streams: timed rounds after one of warm-up.")] = 3,
    seed: Annotated[int, typer.Option(help="The same seed gives the same conversations.")] = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure a server: editing history, and streams at once."""
    from dataclasses import asdict

    from evaluation.serving.history import HistorySettings
    from evaluation.serving.run import MEASURES, ServingSettings, bars, run, to_json
    from evaluation.serving.server import ServerSettings
    from evaluation.serving.streams import StreamSettings

    measures = listed(measure, MEASURES)
    backbone = load_backbone(model, eraser, device, dtype)
    settings = ServingSettings(HistorySettings(length, result, repeats, seed), StreamSettings(streams, answer, repeats))
    server = ServerSettings(model, eraser, device, dtype, method)
    with bar() as advance:
        measured = run(backbone, server, settings, measures, advance)
    chosen = {name: asdict(getattr(settings, name)) for name in MEASURES if name in measures}
    if json_output:
        emit(to_json(measured, backbone, chosen | {"method": method}, measures))
        return
    if (history := measured.history) is not None:
        print_rows("Changed histories", [asdict(row) for row in history.rows], HISTORY)
        print_rows("Its answers", [asdict(history.agreement)], list(asdict(history.agreement)))
    if (together := measured.streams) is not None:
        print_rows("Streams", [asdict(row) for row in together.rows], list(asdict(together.rows[0])))
    print_rows("Bars", [asdict(one) for one in bars(measured)], ["measure", "figure", "value", "bar", "held"])


def listed(measures: str, known: Sequence[str]) -> list[str]:
    """The names of an option, separated by commas."""
    names = [name.strip() for name in measures.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"--measure: no {unknown[0]!r}; there are {', '.join(known)}")
    return names
