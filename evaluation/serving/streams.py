"""How many tokens a second several streams get together, against one alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Barrier
from typing import TYPE_CHECKING

from evaluation.serving.server import Server
from kveraser.errors import MeasurementError

if TYPE_CHECKING:
    import openai

BAR = 2.0
"""How many times one stream's tokens a second several streams are to have."""

PROMPT = "Office {number} counts the parcels one by one: "
COUNTED = 20
"""A model that has read so many numbers goes on counting, and doesn't end by itself."""


@dataclass(frozen=True)
class StreamSettings:
    """What is asked: the most streams at once, tokens of each answer, and rounds after one of warm-up."""

    streams: int = 8
    tokens: int = 128
    repeats: int = 3


@dataclass(frozen=True)
class StreamRow:
    """So many streams at once.

    Attributes:
        tokens, shortest: decoded in a round by all streams, and by the one that ended first; medians.
        seconds: median from the first request to the end of the last answer; prompts are read in it.
        rate: median of tokens per second, of all streams together.
    """

    streams: int
    tokens: int
    shortest: int
    seconds: float
    rate: float


@dataclass(frozen=True)
class StreamResult:
    """A row for one stream, a row for several, and how many times one stream's rate the several have."""

    rows: tuple[StreamRow, ...]
    ratio: float
    bar: float = BAR


def measure(server: Server, settings: StreamSettings, progress: Callable[[str], None] | None = None) -> StreamResult:
    """Time one stream and several, in turn within each round."""
    report = progress or (lambda _: None)
    counts = (1, settings.streams)
    rounds: dict[int, list[tuple[list[int], float]]] = {count: [] for count in counts}
    model, number = server.model(), 0
    with closing(server.client()) as client:
        for repeat in range(settings.repeats + 1):
            for count in counts:
                report(f"{'warm-up' if not repeat else f'round {repeat} of {settings.repeats}'}: {count} at once")
                said, seconds = _together(client, model, range(number, number + count), settings.tokens)
                number += count
                if repeat:
                    rounds[count].append((said, seconds))
    rows = tuple(
        StreamRow(
            streams=count,
            tokens=int(statistics.median(sum(said) for said, _ in measured)),
            shortest=int(statistics.median(min(said) for said, _ in measured)),
            seconds=statistics.median(seconds for _, seconds in measured),
            rate=statistics.median(sum(said) / seconds for said, seconds in measured),
        )
        for count, measured in rounds.items()
    )
    return StreamResult(rows, rows[-1].rate / rows[0].rate)


def _together(client: openai.OpenAI, model: str, numbers: range, tokens: int) -> tuple[list[int], float]:
    """Tokens of each answer, and seconds in all."""
    started = list[float]()
    barrier = Barrier(len(numbers), lambda: started.append(time.perf_counter()))

    def one(number: int) -> int:
        prompt = PROMPT.format(number=number) + "".join(f"{parcel}, " for parcel in range(1, COUNTED)).rstrip()
        barrier.wait()
        used = None
        with client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
            stream_options={"include_usage": True},
        ) as stream:  # fmt: skip
            for chunk in stream:
                used = chunk.usage or used
        if used is None:
            raise MeasurementError("the server's answer broke off: see its log")
        return used.completion_tokens

    with ThreadPoolExecutor(len(numbers)) as threads:
        said = list(threads.map(one, numbers))
    return said, time.perf_counter() - started[0]
