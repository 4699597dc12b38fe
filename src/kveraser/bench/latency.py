"""`kveraser bench latency`: what each method costs, against the bare forward pass of the same span.

All methods of a context are timed in turn within each round, peers among them, so that a machine that slows down slows
them all; medians over rounds. Every edit is reverted before the next is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kveraser.backbone import Backbone
from kveraser.bench.environment import environment
from kveraser.bench.peers import Peer, PeerRow, PeerTask, medians
from kveraser.cache import EditableCache
from kveraser.decode import greedy, rewound
from kveraser.errors import ContextLengthError, InputError
from kveraser.methods import Method
from kveraser.spans import Span

FILLER = (
    "The harbour office keeps a ledger of every ship that comes in. The clerk notes the hour, the cargo and the "
    "captain's name, and at the end of the week the sheets are sewn together and put on the shelf. "
)
QUESTION = "\n\nQuestion: What does the clerk note for every ship?\nAnswer: For every ship, the clerk notes"
DECODED_TOKENS = 8
ANSWER_TOKENS = 16

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LatencyRow:
    """One method at one context length.

    Attributes:
        method: name and parameters.
        context, span: tokens in the cache, and of them erased.
        seconds: median of the erase.
        floor_seconds: median of the bare forward pass of the span's tokens on the same prefix, adapter off.
        first_token_seconds: median from the erase's begin to the first token of an answer: erase, question, token.
        prefill_first_token_seconds: the same for a fresh prefill of the context without the span.
        extra_bytes: bytes held after the erase beyond the cache itself (for undo), and any growth of the cache.
        span_bytes: bytes of the span's keys and values.
        peak_bytes: by how much erase and first token raised the memory in use at most, over rounds: on CUDA of tensors,
            on Linux of the process (memory that it had kept from earlier work does not show); None elsewhere.
        recomputed: tokens run through the backbone.
        decode_seconds_before, decode_seconds_after: median seconds per decoded token, before and after the erase.
        answer: the greedy answer's text after the erase.
    """

    method: str
    context: int
    span: int
    seconds: float
    floor_seconds: float
    first_token_seconds: float
    prefill_first_token_seconds: float
    extra_bytes: int
    span_bytes: int
    peak_bytes: int | None
    recomputed: int
    decode_seconds_before: float
    decode_seconds_after: float
    answer: str


@dataclass
class Measured:
    """All that a run measured, and what it could not.

    Attributes:
        rows: a row a method and context length.
        peers: a row a peer, operation and context length.
        left_out: context lengths, with reasons.
        skipped: peers by name, with reasons.
        notes: what a reader has to know of the peers that ran.
    """

    rows: list[LatencyRow] = field(default_factory=list)
    peers: list[PeerRow] = field(default_factory=list)
    left_out: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    backbone: Backbone,
    methods: Sequence[Method],
    lengths: Sequence[int],
    span: int,
    depth: float,
    repeats: int,
    progress: Progress | None = None,
    peers: Sequence[type[Peer]] = (),
) -> Measured:
    """Time `methods` and `peers` at every context length.

    A length that does not fit is left out where another one does, and so is a peer that can't run.

    Args:
        lengths: context lengths in tokens.
        span: tokens to erase.
        depth: where the span begins, as a fraction of the context.
        repeats: timed rounds, after one round of warm-up.

    Raises:
        InputError: a span that does not fit, a depth outside [0, 1), too few rounds.
        ContextLengthError: no length that the backbone has positions for.
        MemoryError, RuntimeError: no length that the machine has memory for.
    """
    if not 0 <= depth < 1:
        raise InputError(f"depth is {depth}: give a fraction of the context, at least 0 and below 1")
    if repeats < 1:
        raise InputError(f"repeats is {repeats}: time at least 1 round")
    progress = progress or (lambda _: None)
    question = tuple(backbone.tokenizer.encode(QUESTION, add_special_tokens=False))
    room = len(question) + ANSWER_TOKENS
    measured, failures, tasks = Measured(), list[Exception](), list[PeerTask]()
    filler = backbone.tokenizer.encode(FILLER, add_special_tokens=False)
    for length in lengths:
        start = int(length * depth)
        if span < 1 or start + span >= length:
            raise InputError(f"a span of {span} tokens at depth {depth} does not fit into a context of {length}")
        tokens = tuple((filler * (length // len(filler) + 1))[:length])
        try:
            backbone.check_room(0, length + room)
        except ContextLengthError as error:
            failures.append(error)
            measured.left_out.append((length, str(error)))
        else:
            tasks.append(PeerTask(tokens, Span(start, start + span), question, ANSWER_TOKENS))
    with ExitStack() as stack:
        engines: list[Peer] = []
        for kind in peers if tasks else ():
            progress(f"starting {kind.name}")
            reason = kind.available(backbone)
            if reason is None:
                try:
                    longest = max(len(task.tokens) for task in tasks) + room
                    engines.append(stack.enter_context(closing(kind(backbone, longest))))
                    measured.notes.append(kind.note)
                except Exception as error:
                    # Another project's engine fails in ways of its own, and our figures don't need it.
                    reason = f"it does not start ({type(error).__name__}: {error})"
            if reason is not None:
                measured.skipped.append((kind.name, reason))
        for task in tasks:
            ready: list[Peer] = []
            for engine in engines:
                progress(f"{len(task.tokens)} tokens: prefill by {engine.name}")
                try:
                    engine.prepare(task)
                    ready.append(engine)
                except Exception as error:
                    measured.skipped.append((engine.name, f"{len(task.tokens)} tokens: {error}"))
            try:
                rows, peer_rows, failed = _run_length(backbone, methods, ready, task, repeats, progress)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                # The frames of the traceback hold the cache that there is no room for.
                failures.append(error.with_traceback(None))
                measured.left_out.append((len(task.tokens), f"no memory: {str(error).splitlines()[0]}"))
            else:
                measured.rows += rows
                measured.peers += peer_rows
                measured.skipped += failed.items()
    if failures and not measured.rows:
        raise failures[0]
    return measured


def _run_length(
    backbone: Backbone,
    methods: Sequence[Method],
    engines: Sequence[Peer],
    task: PeerTask,
    repeats: int,
    progress: Progress,
) -> tuple[list[LatencyRow], list[PeerRow], dict[str, str]]:
    tokens, span, length = task.tokens, task.span, len(task.tokens)
    progress(f"{length} tokens: prefill")
    cache = backbone.prefill(tokens)
    timings: dict[Method, list[float]] = {method: [] for method in methods}
    first: dict[Method, list[float]] = {method: [] for method in methods}
    decoding: dict[Method, list[tuple[float, float]]] = {method: [] for method in methods}
    extra, recomputed = dict.fromkeys(methods, 0), dict.fromkeys(methods, 0)
    peaks: dict[Method, list[int]] = {method: [] for method in methods}
    answers: dict[Method, str] = {}
    floor: list[float] = []
    prefills: list[float] = []
    rounds: dict[str, list[list[PeerRow]]] = {engine.name: [] for engine in engines}
    failed: dict[str, str] = {}
    for repeat in range(repeats + 1):
        progress(f"{length} tokens: {f'round {repeat} of {repeats}' if repeat else 'warm-up'}")
        timed = repeat > 0
        seconds = _floor(backbone, cache, tokens, span)
        prefill = _prefill_to_first_token(backbone, task)
        if timed:
            floor.append(seconds)
            prefills.append(prefill)
        for method in methods:
            before = _decode(backbone, cache)
            # Decoding may have grown the buffers; what the erase itself allocates counts from here.
            allocated = cache.bytes_allocated
            peak = _watch_memory(backbone)
            with cache.edit() as journal:
                seconds, erased = _timed(backbone, partial(method, backbone, cache, tokens, span))
            grown = cache.bytes_allocated - allocated
            with rewound(cache):
                answering, _ = _timed(backbone, partial(_first_token, backbone, cache, task.question))
            risen = peak()
            after = _decode(backbone, cache)
            if timed:
                timings[method].append(seconds)
                first[method].append(seconds + answering)
                decoding[method].append((before, after))
            else:
                answer = greedy(backbone, cache, task.question, task.answer_tokens)
                answers[method] = str(backbone.tokenizer.decode(answer, skip_special_tokens=True))
            if risen is not None:
                peaks[method].append(risen)
            extra[method] = journal.bytes + grown
            recomputed[method] = erased.recomputed
            cache.revert(journal)
        for engine in engines:
            if engine.name not in failed:
                try:
                    measured = engine.measure()
                except Exception as error:
                    # Another project's engine fails in ways of its own; our figures stand without it.
                    failed[engine.name] = f"{length} tokens: {type(error).__name__}: {error}"
                else:
                    if timed:
                        rounds[engine.name].append(measured)
    rows = [
        LatencyRow(
            method=str(method),
            context=length,
            span=len(span),
            seconds=statistics.median(timings[method]),
            floor_seconds=statistics.median(floor),
            first_token_seconds=statistics.median(first[method]),
            prefill_first_token_seconds=statistics.median(prefills),
            extra_bytes=extra[method],
            span_bytes=cache.nbytes // length * len(span),
            peak_bytes=max(peaks[method], default=None),
            recomputed=recomputed[method],
            decode_seconds_before=statistics.median(before for before, _ in decoding[method]),
            decode_seconds_after=statistics.median(after for _, after in decoding[method]),
            answer=answers[method],
        )
        for method in methods
    ]
    return rows, [row for name in rounds if name not in failed for row in medians(rounds[name])], failed


# One measurement


def _timed(backbone: Backbone, work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it returns: by events on CUDA, whose clock is the device's."""
    if backbone.device.type == "cuda":
        stream = torch.cuda.current_stream(backbone.device)
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream.synchronize()
        begun.record(stream)
        value = work()
        ended.record(stream)
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000, value
    started = time.perf_counter()
    value = work()
    return time.perf_counter() - started, value


def _floor(backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> float:
    """The span's tokens once through the backbone on the prefix: no snapshot, no adapter, the same buffers."""
    positions = cache.positions[span.start : span.end]
    with cache.edit() as journal, cache.overwriting(span.start, positions):
        seconds, _ = _timed(backbone, lambda: backbone.forward(tokens[span.start : span.end], cache, positions))
    cache.revert(journal)
    return seconds


def _prefill_to_first_token(backbone: Backbone, task: PeerTask) -> float:
    """A new cache of the context without the span, then the question, to the first token."""

    def work() -> None:
        cache = backbone.new_cache(len(task.edited) + len(task.question))
        backbone.extend(cache, task.edited)
        _first_token(backbone, cache, task.question)

    return _timed(backbone, work)[0]


def _first_token(backbone: Backbone, cache: EditableCache, question: Sequence[int]) -> int:
    return int(backbone.logits(cache, question)[0].argmax())


def _decode(backbone: Backbone, cache: EditableCache) -> float:
    """Median seconds of one decoding step."""
    with rewound(cache):
        steps = [_timed(backbone, lambda: backbone.logits(cache, [0]))[0] for _ in range(DECODED_TOKENS)]
    return statistics.median(steps)


def _watch_memory(backbone: Backbone) -> Callable[[], int | None]:
    """From here on; called, the result tells by how many bytes the memory in use has risen at most, or None."""
    device = backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    try:
        # Linux: 5 sets the peak of the resident memory back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        held = _resident_bytes("VmRSS")
    except (OSError, LookupError):
        return lambda: None
    return lambda: max(0, _resident_bytes("VmHWM") - held)


def _resident_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(kilobytes[name]) * 1024


def _is_out_of_memory(error: Exception) -> bool:
    # torch's allocator of the CPU raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# The result


def growth(rows: Sequence[LatencyRow]) -> list[dict[str, Any]]:
    """By how much each method's erase, and the floor, take longer at the longest context than at the shortest."""
    listed = []
    for method in dict.fromkeys(row.method for row in rows):
        same = sorted((row for row in rows if row.method == method), key=lambda row: row.context)
        shortest, longest = same[0], same[-1]
        if shortest.context < longest.context:
            listed.append(
                {
                    "method": method,
                    "shortest": shortest.context,
                    "longest": longest.context,
                    "growth": longest.seconds / shortest.seconds,
                    "floor_growth": longest.floor_seconds / shortest.floor_seconds,
                }
            )
    return listed


def ratios(rows: Sequence[LatencyRow], peers: Sequence[PeerRow]) -> list[dict[str, Any]]:
    """How many times sooner the first token comes after our erase than after a peer's operation, context by context."""
    return [
        {
            "method": row.method,
            "peer": peer.peer,
            "operation": peer.operation,
            "context": row.context,
            "first_token_seconds": row.first_token_seconds,
            "peer_first_token_seconds": peer.first_token_seconds,
            "ratio": peer.first_token_seconds / row.first_token_seconds,
        }
        for row in rows
        for peer in peers
        if peer.context == row.context
    ]


def to_json(
    measured: Measured, backbone: Backbone, settings: dict[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What was measured with all that is needed to read it: settings, versions, hardware."""
    return {
        "command": "kveraser bench latency",
        "settings": settings,
        **environment(backbone),
        "notes": [*notes, *measured.notes],
        "rows": [asdict(row) for row in measured.rows],
        "growth": growth(measured.rows),
        "left_out": [{"length": length, "reason": reason} for length, reason in measured.left_out],
        "peers": [asdict(row) for row in measured.peers],
        "peers_skipped": [{"peer": name, "reason": reason} for name, reason in measured.skipped],
        "ratios": ratios(measured.rows, measured.peers),
    }
