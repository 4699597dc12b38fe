"""All measurements of a server, each on one of its own, and what they come to against the bars."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.serving import crashes, history, soak, streams
from evaluation.serving.server import Server, ServerSettings
from kveraser.errors import InputError
from kveraser.measure.environment import environment
from kveraser.model.backbone import Backbone

MEASURES = ("history", "streams", "soak", "crashes")


@dataclass(frozen=True)
class ServingSettings:
    """What is measured, and how."""

    history: history.HistorySettings
    streams: streams.StreamSettings
    soak: soak.SoakSettings
    crashes: crashes.CrashSettings


@dataclass
class Measured:
    """What was measured; None for what was not asked for."""

    history: history.HistoryResult | None = None
    streams: streams.StreamResult | None = None
    soak: soak.SoakResult | None = None
    crashes: crashes.CrashResult | None = None


@dataclass(frozen=True)
class Bar:
    """A figure, what it is to be, and whether it is."""

    measure: str
    figure: str
    value: float | None
    bar: str
    held: bool


def run(
    backbone: Backbone,
    server: ServerSettings,
    settings: ServingSettings,
    measures: Sequence[str] = MEASURES,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """Measure servers of `server`'s model, one after the other.

    Args:
        backbone: the same model in this process: for the tokenizer, and to run alone what the servers did together.

    Raises:
        InputError: no such measurement, a client that is not installed, or a server that does not start.
        MeasurementError: a server that breaks off.
    """
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise InputError(f"no measurement {unknown[0] if unknown else ''!r}: there are {', '.join(MEASURES)}")
    try:
        import httpx2  # noqa: F401
        import openai  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise InputError(f"the benchmark needs {error.name}: pip install 'kveraser[serve,bench]'") from error
    report = progress or (lambda _: None)
    measured = Measured()

    def told(name: str) -> Callable[[str], None]:
        return lambda step: report(f"{name}: {step}")

    with tempfile.TemporaryDirectory(prefix="kveraser-serve-") as root:
        for name in MEASURES:
            if name not in measures:
                continue
            folder = Path(root) / name
            folder.mkdir()
            report(f"{name}: starting a server")
            if name == "crashes":
                measured.crashes = crashes.measure(server, folder, backbone, settings.crashes, told(name))
            elif name == "soak":
                with Server(server.shared(settings.soak.memory, settings.soak.clients), folder) as running:
                    measured.soak = soak.measure(running, backbone, settings.soak, told(name))
            else:
                with Server(server, folder) as running:
                    if name == "history":
                        measured.history = history.measure(
                            running, backbone, settings.history, server.method, told(name)
                        )
                    else:
                        measured.streams = streams.measure(running, settings.streams, told(name))
    return measured


def bars(measured: Measured) -> list[Bar]:
    """Every figure that has a bar."""
    found = list[Bar]()
    if (one := measured.history) is not None:
        found.append(_least("history", "times sooner to the first token", one.ratio, one.bar))
        agreement = one.agreement
        within = agreement.kl is not None and agreement.kl <= agreement.budget
        found.append(Bar("history", "KL to exact", agreement.kl, f"at most {agreement.budget:g}", within))
    if (several := measured.streams) is not None:
        figure = f"times one stream's tokens a second, of {several.rows[-1].streams}"
        found.append(_least("streams", figure, several.ratio, several.bar))
    if (soaked := measured.soak) is not None:
        found += [
            _none("soak", "errors", soaked.errors),
            _none("soak", "differences from the same operations alone", soaked.differences),
            Bar(
                "soak", "most memory of contexts, MiB", soaked.most_held / 2**20,
                f"at most {soaked.memory_budget / 2**20:g}", soaked.most_held <= soaked.memory_budget,
            ),
        ]  # fmt: skip
    if (crashed := measured.crashes) is not None:
        found += [
            _none("crashes", "wrong sessions", crashed.wrong),
            _none("crashes", "faults before a kill", len(crashed.faults)),
        ]
    return found


def _least(measure: str, figure: str, value: float, bar: float) -> Bar:
    return Bar(measure, figure, value, f"at least {bar:g}", value >= bar)


def _none(measure: str, figure: str, count: int) -> Bar:
    return Bar(measure, figure, float(count), "0", count == 0)


def to_json(
    measured: Measured, backbone: Backbone, settings: dict[str, Any], measures: Sequence[str]
) -> dict[str, Any]:
    """What was measured with all that is needed to read it: settings, versions, hardware."""
    return {
        "command": "python -m evaluation serve",
        "settings": settings | {"measures": list(measures)},
        **environment(backbone),
        "rows": [asdict(bar) for bar in bars(measured)],
        **{name: result for name, result in asdict(measured).items() if result is not None},
    }
