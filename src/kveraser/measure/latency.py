"""Times each method against the bare forward pass of the same span (`kveraser bench latency`).

Each round times all methods and peers once, so that a slower machine affects all of them; results are medians over
rounds. Every edit is reverted before the next is timed.

Lengths beyond the backbone's positions are also timed where its positions are rotary: on random states of the same
shapes, without a fresh prefill and without answers. Their rows are `extended`.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import ContextLengthError, InputError, MeasurementError, RotationError
from kveraser.measure.environment import environment
from kveraser.measure.peer import Peer, PeerRow, PeerTask, medians
from kveraser.measure.quality import NOTICE_TOKENS
from kveraser.methods import Method
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy, rewound
from kveraser.text.spans import Span

FILLER = (
    "The harbour office keeps a ledger of every ship that comes in. The clerk notes the hour, the cargo and the "
    "captain's name, and at the end of the week the sheets are sewn together and put on the shelf. "
)
QUESTION = "\n\nQuestion: What does the clerk note for every ship?\nAnswer: For every ship, the clerk notes"
DECODED_TOKENS = 4
ANSWER_TOKENS = 16
SLOW_SECONDS = 10.0
"""A method slower than this in the warm-up is not timed again; its result is that of the warm-up."""
PAIRS = 15
"""Number of pairs of bare forward pass and erase that time a learned method."""
PAPER_GROWTH = {"kveraser": 1.24, "recompute": 17.6}
"""Seconds of an erase at 32K tokens of context over those at 1K, arXiv:2606.17034."""
GIBIBYTE = 2**30

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LatencyRow:
    """One method at one context length.

    Attributes:
        method: name and parameters.
        context, span: tokens in the cache, and of them erased.
        extended: the context exceeds the backbone's positions; see above.
        rounds: number of timed rounds; 1 for slow methods (`SLOW_SECONDS`).
        seconds: median of the erase.
        floor_seconds: median of the bare forward pass of the span's tokens on the same prefix, adapter off.
        floor_ratio: median, over pairs timed one after the other, of the erase over the bare forward pass.
        first_token_seconds: median from the start of the erase to the first token of an answer.
        prefill_first_token_seconds: the same for a fresh prefill of the context without the span; None if extended.
        extra_bytes: bytes held after the erase beyond the cache itself (for undo), and any growth of the cache.
        span_bytes: bytes of the span's keys and values.
        peak_bytes: largest increase of memory in use by erase and first token: of tensors on CUDA, of the process on
            Linux (memory that it already held is not counted); None elsewhere.
        recomputed: tokens run through the backbone.
        decode_seconds_before, decode_seconds_after: median seconds per decoded token, before and after the erase.
        rest_unchanged: prefix and suffix are bit-identical; None for methods that change them.
        answer: the greedy answer's text after the erase; None if extended.
    """

    method: str
    context: int
    span: int
    extended: bool
    rounds: int
    seconds: float
    floor_seconds: float
    floor_ratio: float
    first_token_seconds: float
    prefill_first_token_seconds: float | None
    extra_bytes: int
    span_bytes: int
    peak_bytes: int | None
    recomputed: int
    decode_seconds_before: float
    decode_seconds_after: float
    rest_unchanged: bool | None
    answer: str | None


@dataclass
class Measured:
    """Results of a run.

    Attributes:
        rows: one for every method and context length.
        peers: one for every peer, operation and context length.
        left_out: context lengths that were not timed, with reasons.
        skipped: peers that were not timed, with reasons.
        notes: on the peers that ran.
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

    Lengths that do not fit and peers that can't run are left out, unless no length fits. Peers are timed at lengths
    within the backbone's positions only.

    Args:
        lengths: context lengths in tokens.
        span: tokens to erase.
        depth: where the span begins, as a fraction of the context.
        repeats: timed rounds, after one round of warm-up.

    Raises:
        InputError: a span that does not fit, a depth outside [0, 1), too few rounds, a length given twice, or no
            length that the machine has memory for.
        ContextLengthError: no length that the backbone has positions for, and they can't be extended.
        MeasurementError: a method that must change only the span changed other states.
    """
    if not 0 <= depth < 1:
        raise InputError(f"depth is {depth}: give a fraction of the context, at least 0 and below 1")
    if repeats < 1:
        raise InputError(f"repeats is {repeats}: time at least 1 round")
    if len(set(lengths)) < len(lengths):
        raise InputError(f"the lengths are {', '.join(map(str, lengths))}: give each once")
    progress = progress or (lambda _: None)
    question = tuple(backbone.tokenize(QUESTION, follows=True)[0])
    asked = len(question) + ANSWER_TOKENS
    reserved = NOTICE_TOKENS + asked
    measured, failures, tasks = Measured(), list[Exception](), list[tuple[PeerTask, bool]]()
    filler, _ = backbone.tokenize(FILLER, follows=True)
    for length in lengths:
        start = int(length * depth)
        if span < 1 or start + span >= length:
            raise InputError(f"a span of {span} tokens at depth {depth} does not fit into a context of {length}")
        try:
            _check_memory(backbone, length + reserved)
            extended = _must_extend(backbone, length + reserved)
        except (InputError, ContextLengthError) as error:
            failures.append(error)
            measured.left_out.append((length, str(error)))
        else:
            tokens = tuple((filler * (length // len(filler) + 1))[:length])
            tasks.append((PeerTask(tokens, Span(start, start + span), question, ANSWER_TOKENS), extended))
    with ExitStack() as stack:
        engines: list[Peer] = []
        within = [len(task.tokens) for task, extended in tasks if not extended]
        for kind in peers if within else ():
            progress(f"starting {kind.name}")
            reason = kind.available(backbone)
            if reason is None:
                try:
                    engines.append(stack.enter_context(closing(kind(backbone, max(within) + asked))))
                    measured.notes.append(kind.note)
                except Exception as error:
                    # Any failure of another engine only skips that engine.
                    reason = f"it does not start ({type(error).__name__}: {error})"
            if reason is not None:
                measured.skipped.append((kind.name, reason))
        for task, extended in tasks:
            ready: list[Peer] = []
            for engine in () if extended else engines:
                progress(f"{len(task.tokens)} tokens: prefill by {engine.name}")
                try:
                    engine.prepare(task)
                    ready.append(engine)
                except Exception as error:
                    measured.skipped.append((engine.name, f"{len(task.tokens)} tokens: {error}"))
            try:
                with _positions(backbone, len(task.tokens) + reserved if extended else None):
                    rows, peer_rows, failed = _run_length(backbone, methods, ready, task, extended, repeats, progress)
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = f"no memory: {str(error).splitlines()[0]}"
                failures.append(InputError(f"{len(task.tokens)} tokens: {reason}: give shorter lengths"))
                measured.left_out.append((len(task.tokens), reason))
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
    extended: bool,
    repeats: int,
    progress: Progress,
) -> tuple[list[LatencyRow], list[PeerRow], dict[str, str]]:
    tokens, span, length = task.tokens, task.span, len(task.tokens)
    progress(f"{length} tokens: {'random states' if extended else 'prefill'}")
    cache = _random_cache(backbone, length) if extended else backbone.prefill(tokens)
    timings = {method: _Timings() for method in methods}
    prefills: list[float] = []
    rounds: dict[str, list[list[PeerRow]]] = {engine.name: [] for engine in engines}
    failed: dict[str, str] = {}
    for repeat in range(repeats + 1):
        progress(f"{length} tokens: {f'round {repeat} of {repeats}' if repeat else 'warm-up'}")
        before = _decode(backbone, cache)
        if not extended and not _is_slow(prefills):
            prefills = [*prefills[repeat == 1 :], _prefill_to_first_token(backbone, task)]
        for method, timed in timings.items():
            if repeat and _is_slow(timed.seconds):
                continue
            if repeat == 1:
                timed.forget()
            # Directly before the erase, so that the two form a pair.
            bare = _floor(backbone, cache, tokens, span)
            allocated = cache.bytes_allocated
            peak = _watch_memory(backbone)
            with cache.edit() as journal:
                seconds, recomputed = _timed(backbone, partial(method, backbone, cache, tokens, span))
            grown = cache.bytes_allocated - allocated
            with rewound(cache):
                answering, _ = _timed(backbone, partial(_first_token, backbone, cache, task.question))
            risen = peak()
            timed.add(seconds, bare, answering, before, _decode(backbone, cache))
            if not repeat and not extended:
                answer = greedy(backbone, cache, task.question, task.answer_tokens)
                timed.answer = str(backbone.tokenizer.decode(answer, skip_special_tokens=True))
            if risen is not None:
                timed.peaks.append(risen)
            timed.extra, timed.recomputed = journal.bytes + grown, recomputed
            cache.revert(journal)
        for engine in engines:
            if engine.name not in failed:
                try:
                    measured = engine.measure()
                except Exception as error:
                    # Any failure of another engine only skips that engine.
                    failed[engine.name] = f"{length} tokens: {type(error).__name__}: {error}"
                else:
                    if repeat:
                        rounds[engine.name].append(measured)
    for method, timed in timings.items():
        if method.needs_eraser:
            progress(f"{length} tokens: {method} against the bare forward pass")
            timed.ratios = _paired_ratios(backbone, cache, tokens, span, method)
        if method.changes_only_span:
            _check_rest(backbone, cache, tokens, span, method)
    rows = [
        LatencyRow(
            method=str(method),
            context=length,
            span=len(span),
            extended=extended,
            rounds=len(timed.seconds),
            seconds=statistics.median(timed.seconds),
            floor_seconds=statistics.median(bare for timed in timings.values() for bare in timed.bare),
            floor_ratio=statistics.median(timed.ratios),
            first_token_seconds=statistics.median(timed.first),
            prefill_first_token_seconds=statistics.median(prefills) if prefills else None,
            extra_bytes=timed.extra,
            span_bytes=cache.nbytes // length * len(span),
            peak_bytes=max(timed.peaks, default=None),
            recomputed=timed.recomputed,
            decode_seconds_before=statistics.median(timed.decoding_before),
            decode_seconds_after=statistics.median(timed.decoding_after),
            rest_unchanged=method.changes_only_span or None,
            answer=timed.answer,
        )
        for method, timed in timings.items()
    ]
    return rows, [row for name in rounds if name not in failed for row in medians(rounds[name])], failed


@dataclass
class _Timings:
    """Measurements of one method by round, in seconds where no unit is given."""

    seconds: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    decoding_before: list[float] = field(default_factory=list)
    decoding_after: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    extra: int = 0
    recomputed: int = 0
    answer: str | None = None

    def add(self, seconds: float, bare: float, answering: float, before: float, after: float) -> None:
        """Count one round."""
        self.seconds.append(seconds)
        self.bare.append(bare)
        self.ratios.append(seconds / bare)
        self.first.append(seconds + answering)
        self.decoding_before.append(before)
        self.decoding_after.append(after)

    def forget(self) -> None:
        """Drop the times of the warm-up."""
        for timed in (self.seconds, self.bare, self.ratios, self.first, self.decoding_before, self.decoding_after):
            timed.clear()


def _is_slow(seconds: Sequence[float]) -> bool:
    return bool(seconds) and seconds[0] > SLOW_SECONDS


# Lengths beyond the positions or the memory


def _must_extend(backbone: Backbone, positions: int) -> bool:
    """Whether `positions` exceed those of the backbone.

    Raises:
        ContextLengthError: they do, and its positions are not rotary.
    """
    try:
        backbone.check_room(0, positions)
    except ContextLengthError as error:
        try:
            _ = backbone.rotation
        except RotationError:
            raise error from None
        return True
    return False


@contextmanager
def _positions(backbone: Backbone, positions: int | None) -> Iterator[None]:
    """Inside, the backbone accepts this many positions. None: no change."""
    before = backbone.max_positions
    backbone.max_positions = positions or before
    try:
        yield
    finally:
        backbone.max_positions = before


def _random_cache(backbone: Backbone, length: int) -> EditableCache:
    """A cache of `length` slots with random states of the backbone's shapes."""
    like = backbone.prefill([0]).read(0, 1)
    cache = backbone.new_cache(length)
    generator = torch.Generator(backbone.device).manual_seed(0)
    with torch.no_grad(), cache.appending(torch.arange(length, dtype=torch.float64)):
        for layer, pair in zip(cache.layers, like, strict=True):
            keys, values = (
                torch.randn(
                    (*state.shape[:2], length, state.shape[3]),
                    generator=generator,
                    dtype=state.dtype,
                    device=state.device,
                )
                for state in pair
            )
            layer.update(keys, values)
    return cache


def _check_memory(backbone: Backbone, tokens: int) -> None:
    """Check that a context fits into the free memory, since a system that overcommits kills the process instead.

    Raises:
        InputError: the cache and a copy of it, for undo, are larger than the memory that is free.
    """
    needed, free = 2 * tokens * backbone.bytes_per_token, _free_bytes(backbone)
    if free is not None and needed > free:
        raise InputError(
            f"a context of {tokens} tokens takes {needed / GIBIBYTE:.1f} GiB with what undo keeps, "
            f"{free / GIBIBYTE:.1f} GiB of memory are free: give shorter lengths"
        )


def _free_bytes(backbone: Backbone) -> int | None:
    """Free memory for new tensors, where the system reports it."""
    if backbone.device.type == "cuda":
        return int(torch.cuda.mem_get_info(backbone.device)[0])
    try:
        return _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    except (OSError, LookupError):
        return None


# One measurement


def _timed(backbone: Backbone, work: Callable[[], Any]) -> tuple[float, Any]:
    """Run `work`, and return its seconds and its result. On CUDA, time is measured by events."""
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
    """Seconds of a forward pass of the span's tokens on the prefix, without snapshot and adapter."""
    positions = cache.positions[span.start : span.end]
    with cache.edit() as journal, cache.overwriting(span.start, positions):
        seconds, _ = _timed(backbone, lambda: backbone.forward(tokens[span.start : span.end], cache, positions))
    cache.revert(journal)
    return seconds


def _paired_ratios(
    backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, method: Method
) -> list[float]:
    """Ratio of erase to bare forward pass by pair, in alternating order so that drift of the machine cancels."""

    def erase() -> float:
        with cache.edit() as journal:
            seconds, _ = _timed(backbone, partial(method, backbone, cache, tokens, span))
        cache.revert(journal)
        return seconds

    ratios = []
    for pair in range(PAIRS):
        if pair % 2:
            seconds = erase()
            bare = _floor(backbone, cache, tokens, span)
        else:
            bare = _floor(backbone, cache, tokens, span)
            seconds = erase()
        ratios.append(seconds / bare)
    return ratios


def _check_rest(backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, method: Method) -> None:
    """Check that an erase leaves prefix and suffix bit-identical.

    Raises:
        MeasurementError: it does not.
    """

    def digest() -> str:
        rest = hashlib.blake2b()
        for start, end in ((0, span.start), (span.end, cache.length)):
            for pair in cache.read(start, end):
                for states in pair:
                    rest.update(states.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return rest.hexdigest()

    before = digest()
    with cache.edit() as journal:
        method(backbone, cache, tokens, span)
    after = digest()
    cache.revert(journal)
    if after != before:
        raise MeasurementError(f"{method} changed states outside the span: please report it")


def _prefill_to_first_token(backbone: Backbone, task: PeerTask) -> float:
    """Seconds of a fresh prefill of the context without the span and of the question, to the first token."""

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
    """Start watching memory. The returned function gives the largest increase in bytes since, or None if unknown."""
    device = backbone.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    try:
        # On Linux, 5 resets the peak of the resident memory.
        Path("/proc/self/clear_refs").write_text("5", "ascii")
        held = _resident_bytes("VmRSS")
    except (OSError, LookupError):
        return lambda: None
    return lambda: max(0, _resident_bytes("VmHWM") - held)


def _resident_bytes(name: str) -> int:
    return _kilobytes("/proc/self/status", name) * 1024


def _kilobytes(path: str, name: str) -> int:
    lines = Path(path).read_text("ascii").splitlines()
    return int({line.partition(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}[name])


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU, torch raises a plain RuntimeError.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


# The result


def growth(rows: Sequence[LatencyRow]) -> list[dict[str, Any]]:
    """Seconds of each method and of the floor at the longest context, over those at the shortest.

    `paper` is the value that arXiv:2606.17034 reports for the method from 1K to 32K.
    """
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
                    "paper": PAPER_GROWTH.get(method.partition("(")[0]),
                }
            )
    return listed


def ratios(rows: Sequence[LatencyRow], peers: Sequence[PeerRow]) -> list[dict[str, Any]]:
    """Speedup of the first token after an erase over a peer's operation, by context."""
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
    measured: Measured, backbone: Backbone, settings: dict[str, Any], notes: Sequence[str], command: str
) -> dict[str, Any]:
    """Results with settings, versions and hardware."""
    return {
        "command": command,
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
