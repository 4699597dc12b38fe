"""`python -m tests.stress`: many sessions under load, and servers that are killed at random moments."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from evaluation.commands_serving import listed
from evaluation.serving.run import Bar, check_measures
from evaluation.serving.server import Server, ServerSettings
from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.main import run_app
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone
from kveraser.measure.environment import environment
from tests.stress import crashes, soak
from tests.stress.operations import LEARNED, METHODS, LoadSettings

COMMAND = "python -m tests.stress"
MEASURES = ("soak", "crashes")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def stress(
    measure: Annotated[str, typer.Option(help="Of soak and crashes, separated by commas.")] = "soak,crashes",
    seconds: Annotated[float, typer.Option(min=0.1, help="soak: duration.")] = 300.0,
    sessions: Annotated[int, typer.Option(min=1, help="soak: sessions in all.")] = 32,
    clients: Annotated[int, typer.Option(min=1, help="soak: clients at once.")] = 8,
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
    """Run many sessions under load, and kill servers at random moments; compare with the same operations run alone."""
    measures = listed(measure, MEASURES)
    if not 0 <= moment[0] <= moment[1]:
        raise typer.BadParameter(f"--moment {moment[0]:g} {moment[1]:g}: give the earliest first, from 0 on")
    check_measures(measures, MEASURES)
    backbone = load_backbone(model, eraser, device, dtype)
    load = LoadSettings(methods=METHODS if backbone.eraser is None else (*METHODS, LEARNED))
    server = ServerSettings(model, eraser, device, dtype)
    settings: dict[str, Any] = {}
    results: dict[str, Any] = {}
    bars: list[Bar] = []
    with bar() as advance, tempfile.TemporaryDirectory(prefix="kveraser-stress-") as root:
        if "soak" in measures:
            soak_settings = soak.SoakSettings(sessions, clients, seconds, memory, seed, load)
            folder = Path(root) / "soak"
            folder.mkdir()
            with Server(server.shared(memory, clients), folder) as running:
                soaked = soak.measure(running, backbone, soak_settings, lambda step: advance(f"soak: {step}"))
            settings["soak"], results["soak"] = asdict(soak_settings), asdict(soaked)
            bars += soak.bars(soaked)
        if "crashes" in measures:
            crash_settings = crashes.CrashSettings(kills, moment=moment, seed=seed, load=load)
            folder = Path(root) / "crashes"
            folder.mkdir()
            crashed = crashes.measure(
                server, folder, backbone, crash_settings, lambda step: advance(f"crashes: {step}")
            )
            settings["crashes"], results["crashes"] = asdict(crash_settings), asdict(crashed)
            bars += crashes.bars(crashed)
    rows = [asdict(one) for one in bars]
    if json_output:
        head = {"command": COMMAND, "settings": settings | {"measures": measures}, **environment(backbone)}
        emit(head | {"rows": rows} | results)
        return
    for name, result in results.items():
        print_rows(name, result["rows"], list(result["rows"][0]))
        for fault in (*result.get("shown_errors", ()), *result.get("shown_differences", ())):
            say(f"- {fault}")
        for fault in (*result.get("shown_wrong", ()), *result.get("faults", ())):
            say(f"- {fault}")
    print_rows("Bars", rows, ["measure", "figure", "value", "bar", "held"])


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
