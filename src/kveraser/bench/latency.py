"""`kveraser bench latency`: what each method costs, against the bare forward pass of the same span.

All methods of a context are timed in turn within each round, so that a machine that slows down slows them all; medians
over rounds. Every edit is reverted before the next is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from kveraser.backbone import Backbone
from kveraser.bench.environment import environment
from kveraser.cache import EditableCache
from kveraser.decode import rewound
from kveraser.errors import InputError
from kveraser.methods import Method
from kveraser.spans import Span

FILLER = (
    "The harbour office keeps a ledger of every ship that comes in. The clerk notes the hour, the cargo and the "
    "captain's name, and at the end of the week the sheets are sewn together and put on the shelf. "
)
DECODED_TOKENS = 8


@dataclass(frozen=True)
class LatencyRow:
    """One method at one context length.

    Attributes:
        method: name and parameters.
        context, span: tokens in the cache, and of them erased.
        seconds: median of the erase.
        floor_seconds: median of the bare forward pass of the span's tokens on the same prefix, adapter off.
        extra_bytes: bytes held after the erase beyond the cache itself (for undo), and any growth of the cache.
        span_bytes: bytes of the span's keys and values.
        recomputed: tokens run through the backbone.
        decode_seconds_before, decode_seconds_after: median seconds per decoded token, before and after the erase.
    """

    method: str
    context: int
    span: int
    seconds: float
    floor_seconds: float
    extra_bytes: int
    span_bytes: int
    recomputed: int
    decode_seconds_before: float
    decode_seconds_after: float


def run(
    backbone: Backbone,
    methods: Sequence[Method],
    lengths: Sequence[int],
    span: int,
    depth: float,
    repeats: int,
    progress: Callable[[str], None] | None = None,
) -> list[LatencyRow]:
    """Time `methods` at every context length.

    Args:
        lengths: context lengths in tokens.
        span: tokens to erase.
        depth: where the span begins, as a fraction of the context.
        repeats: timed rounds, after one round of warm-up.

    Raises:
        InputError: a span that does not fit, a depth outside [0, 1], too few rounds.
        ContextLengthError: a length the backbone has no positions for.
    """
    if not 0 <= depth < 1:
        raise InputError(f"depth is {depth}: give a fraction of the context, at least 0 and below 1")
    if repeats < 1:
        raise InputError(f"repeats is {repeats}: time at least 1 round")
    rows: list[LatencyRow] = []
    for length in lengths:
        start = int(length * depth)
        if span < 1 or start + span >= length:
            raise InputError(f"a span of {span} tokens at depth {depth} does not fit into a context of {length}")
        backbone.check_room(0, length + DECODED_TOKENS)
        rows += _run_length(backbone, methods, length, Span(start, start + span), repeats, progress or (lambda _: None))
    return rows


def _run_length(
    backbone: Backbone,
    methods: Sequence[Method],
    length: int,
    span: Span,
    repeats: int,
    progress: Callable[[str], None],
) -> list[LatencyRow]:
    progress(f"{length} tokens: prefill")
    filler = backbone.tokenizer.encode(FILLER, add_special_tokens=False)
    tokens = (filler * (length // len(filler) + 1))[:length]
    cache = backbone.prefill(tokens)
    timings: dict[Method, list[float]] = {method: [] for method in methods}
    decoding: dict[Method, list[tuple[float, float]]] = {method: [] for method in methods}
    extra, recomputed = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0)
    floor: list[float] = []
    for repeat in range(repeats + 1):
        progress(f"{length} tokens: {f'round {repeat} of {repeats}' if repeat else 'warm-up'}")
        timed = repeat > 0
        seconds = _floor(backbone, cache, tokens, span)
        if timed:
            floor.append(seconds)
        for method in methods:
            before = _decode(backbone, cache)
            # Decoding may have grown the buffers; what the erase itself allocates counts from here.
            capacity = _capacity_bytes(cache)
            with cache.edit() as journal:
                seconds, erased = _timed(backbone, partial(method, backbone, cache, tokens, span))
            grown = _capacity_bytes(cache) - capacity
            after = _decode(backbone, cache)
            if timed:
                timings[method].append(seconds)
                decoding[method].append((before, after))
            extra[method] = journal.bytes + grown
            recomputed[method] = erased.recomputed
            cache.revert(journal)
    return [
        LatencyRow(
            method=str(method),
            context=length,
            span=len(span),
            seconds=statistics.median(timings[method]),
            floor_seconds=statistics.median(floor),
            extra_bytes=extra[method],
            span_bytes=cache.nbytes // length * len(span),
            recomputed=recomputed[method],
            decode_seconds_before=statistics.median(before for before, _ in decoding[method]),
            decode_seconds_after=statistics.median(after for _, after in decoding[method]),
        )
        for method in methods
    ]


def _timed(backbone: Backbone, work: Callable[[], Any]) -> tuple[float, Any]:
    cuda = backbone.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(backbone.device)
    started = time.perf_counter()
    value = work()
    if cuda:
        torch.cuda.synchronize(backbone.device)
    return time.perf_counter() - started, value


def _floor(backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> float:
    """The span's tokens once through the backbone on the prefix: no snapshot, no adapter, the same buffers."""
    positions = cache.positions[span.start : span.end]
    with cache.edit() as journal, cache.overwriting(span.start, positions):
        seconds, _ = _timed(backbone, lambda: backbone.forward(tokens[span.start : span.end], cache, positions))
    cache.revert(journal)
    return seconds


def _decode(backbone: Backbone, cache: EditableCache) -> float:
    """Median seconds of one decoding step."""
    with rewound(cache):
        steps = [_timed(backbone, lambda: backbone.logits(cache, [0]))[0] for _ in range(DECODED_TOKENS)]
    return statistics.median(steps)


def _capacity_bytes(cache: EditableCache) -> int:
    return cache.nbytes // max(cache.length, 1) * cache.layers[0].capacity


def to_json(
    rows: Sequence[LatencyRow], backbone: Backbone, settings: dict[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Rows with all that is needed to read them: settings, versions, hardware."""
    return {
        "command": "kveraser bench latency",
        "settings": settings,
        **environment(backbone),
        "notes": list(notes),
        "rows": [asdict(row) for row in rows],
    }
