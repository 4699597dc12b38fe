"""Measures what a server gains from edited histories and from streams at once, each on a server of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.serving import history, streams
from evaluation.serving.server import Server, ServerSettings
from kveraser.errors import InputError
from kveraser.measure.environment import environment
from kveraser.model.backbone import Backbone

MEASURES = ("history", "streams")


@dataclass(frozen=True)
class ServingSettings:
    """How the measurements run."""

    history: history.HistorySettings
    streams: streams.StreamSettings


@dataclass
class Measured:
    """Results; None for measurements that were not asked for."""

    history: history.HistoryResult | None = None
    streams: streams.StreamResult | None = None


@dataclass(frozen=True)
class Bar:
    """A figure, its bar, and whether the bar is held."""

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
        backbone: the same model in this process, for the tokenizer.

    Raises:
        InputError: an unknown measurement, a client that is not installed, or a server that does not start.
        MeasurementError: a server that ends during a measurement.
    """
    check_measures(measures, MEASURES)
    measured, report = Measured(), progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="kveraser-serve-") as root:
        if "history" in measures:
            report("history: starting a server")
            with Server(server, Path(root)) as running:
                measured.history = history.measure(
                    running, backbone, settings.history, server.method, lambda step: report(f"history: {step}")
                )
        if "streams" in measures:
            report("streams: starting a server")
            with Server(server, Path(root)) as running:
                measured.streams = streams.measure(running, settings.streams, lambda step: report(f"streams: {step}"))
    return measured


def check_measures(measures: Sequence[str], known: Sequence[str]) -> None:
    """Check that measurements exist, and that the clients they need are installed.

    Raises:
        InputError: they don't, or aren't.
    """
    unknown = [name for name in measures if name not in known]
    if unknown or not measures:
        raise InputError(f"no measurement {unknown[0] if unknown else ''!r}: there are {', '.join(known)}")
    try:
        import httpx2  # noqa: F401
        import openai  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise InputError(f"the benchmark needs {error.name}: pip install 'kveraser[serve,bench]'") from error


def bars(measured: Measured) -> list[Bar]:
    """Every figure that has a bar."""
    found = list[Bar]()
    if (one := measured.history) is not None:
        found += [
            _least("history", f"times sooner to the first token, {change}", ratio, one.bar)
            for change, ratio in one.ratios.items()
        ]
        agreement = one.agreement
        within = agreement.kl is not None and agreement.kl <= agreement.budget
        found.append(Bar("history", "KL to exact", agreement.kl, f"at most {agreement.budget:g}", within))
    if (several := measured.streams) is not None:
        figure = f"times one stream's tokens a second, of {several.rows[-1].streams}"
        found.append(_least("streams", figure, several.ratio, several.bar))
    return found


def _least(measure: str, figure: str, value: float, bar: float) -> Bar:
    return Bar(measure, figure, value, f"at least {bar:g}", value >= bar)


def to_json(
    measured: Measured, backbone: Backbone, settings: dict[str, Any], measures: Sequence[str]
) -> dict[str, Any]:
    """Results with all that is needed to read them: settings, versions, hardware."""
    return {
        "command": "python -m evaluation serve",
        "settings": settings | {"measures": list(measures)},
        **environment(backbone),
        "rows": [asdict(bar) for bar in bars(measured)],
        **{name: result for name, result in asdict(measured).items() if result is not None},
    }
