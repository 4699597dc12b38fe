"""`python -m evaluation serve`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

HISTORY = ["way", "method", "prompt_tokens", "run_tokens", "prefill_seconds", "first_token_seconds"]


def serve(
    measure: Annotated[
        str, typer.Option(help="Of history, streams, soak and crashes, separated by commas.")
    ] = "history,streams,soak,crashes",
    method: Annotated[str | None, typer.Option(help="How the server erases. Default: its own choice.")] = None,
    length: Annotated[int, typer.Option(min=1, help="history: tokens of a conversation, about.")] = 4000,
    result: Annotated[int, typer.Option(min=1, help="history: tokens of the tool result that is dropped.")] = 100,
    streams: Annotated[int, typer.Option(min=2, help="streams: at once, against one.")] = 8,
    answer: Annotated[int, typer.Option(min=1, help="streams: tokens of an answer.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="history, streams: timed rounds after one of warm-up.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="soak: how long.")] = 300.0,
    sessions: Annotated[int, typer.Option(min=1, help="soak: in all.")] = 32,
    clients: Annotated[int, typer.Option(min=1, help="soak: at once.")] = 8,
    memory: Annotated[float, typer.Option(min=1.1, help="soak: the server's budget for contexts, MiB.")] = 512.0,
    kills: Annotated[int, typer.Option(min=1, help="crashes: how often the server is killed.")] = 20,
    moment: Annotated[
        tuple[float, float], typer.Option(help="crashes: earliest and latest moment of a kill, seconds of load.")
    ] = (0.5, 8.0),
    seed: Annotated[int, typer.Option(help="The same seed gives the same conversations and operations.")] = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure a server: editing history, streams at once, many sessions under load, and kills at random moments."""
    from dataclasses import asdict

    from evaluation.serving.crashes import CrashSettings
    from evaluation.serving.history import HistorySettings
    from evaluation.serving.operations import LEARNED, METHODS, LoadSettings
    from evaluation.serving.run import MEASURES, ServingSettings, bars, run, to_json
    from evaluation.serving.server import ServerSettings
    from evaluation.serving.soak import SoakSettings
    from evaluation.serving.streams import StreamSettings

    measures = [name.strip() for name in measure.split(",")]
    unknown = [name for name in measures if name not in MEASURES]
    if unknown:
        raise typer.BadParameter(f"--measure: no {unknown[0]!r}; there are {', '.join(MEASURES)}")
    if not 0 <= moment[0] <= moment[1]:
        raise typer.BadParameter(f"--moment {moment[0]:g} {moment[1]:g}: give the earliest first, from 0 on")
    backbone = load_backbone(model, eraser, device, dtype)
    load = LoadSettings(methods=METHODS if backbone.eraser is None else (*METHODS, LEARNED))
    settings = ServingSettings(
        HistorySettings(length, result, repeats, seed),
        StreamSettings(streams, answer, repeats),
        SoakSettings(sessions, clients, seconds, memory, seed, load),
        CrashSettings(kills, moment=moment, seed=seed, load=load),
    )
    server = ServerSettings(model, eraser, device, dtype, method)
    with bar() as advance:
        measured = run(backbone, server, settings, measures, advance)
    settled = {name: asdict(getattr(settings, name)) for name in MEASURES if name in measures}
    if json_output:
        emit(to_json(measured, backbone, settled | {"method": method}, measures))
        return
    if (history := measured.history) is not None:
        print_rows("A tool result dropped from the history", [asdict(row) for row in history.rows], HISTORY)
        print_rows("Its answers", [asdict(history.agreement)], list(asdict(history.agreement)))
    if (together := measured.streams) is not None:
        print_rows("Streams", [asdict(row) for row in together.rows], list(asdict(together.rows[0])))
    if (soaked := measured.soak) is not None:
        print_rows("Requests under load", [asdict(row) for row in soaked.rows], list(asdict(soaked.rows[0])))
        say(
            f"{soaked.requests_per_second:.1f} requests and {soaked.answer_tokens_per_second:.1f} answer tokens a "
            f"second; {soaked.compared} answers compared with the same operations alone, {soaked.ties} of them ties"
        )
        _list([*soaked.shown_errors, *map(str, soaked.shown_differences)])
    if (crashed := measured.crashes) is not None:
        print_rows("Kills", [asdict(row) for row in crashed.rows], list(asdict(crashed.rows[0])))
        _list([*crashed.shown_wrong, *crashed.faults])
    print_rows("Bars", [asdict(one) for one in bars(measured)], ["measure", "figure", "value", "bar", "held"])


def _list(faults: list[Any]) -> None:
    for fault in faults:
        say(f"- {fault}")
