"""A request's tokens against a cached context: the cheapest way from one to the other.

A client that edits its history sends the cached tokens with spans missing, replaced or inserted, and new ones at the
end. `reuse` finds how much of a context serves a request: a common prefix, then any number of changed spans with the
kept tokens between them, then new tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kveraser.text.spans import Place, Span

SPAN_TOKENS = 32
"""What a removed span must save, in tokens. Erasing one costs about as much (`repair(32)`), and is not exact."""

MOST_WORK = 1_000_000
"""Places looked at for one alignment. Texts that repeat themselves without end are given up there: what was found till
then is right, though more could be kept."""

STATE_WORK = 100
"""What following one state costs, in places looked at."""

Tokens = npt.NDArray[np.int32]
Ranks = npt.NDArray[np.int64]
Borders = Callable[[int, int], Sequence[int]]
"""The message borders among places `[first, last]` of the cached tokens, in order."""


@dataclass(frozen=True)
class Reuse:
    """How a request takes up a context's live tokens.

    Attributes:
        kept: leading tokens of the request that the context holds, once `removed` are gone.
        removed: spans of the context's live tokens to erase, in order, with kept tokens between and after them; a
            `Place` where tokens are only inserted.
        held: leading live tokens of the context that are kept or removed; later ones are to be forgotten.
        inserted: for every span in `removed`, the tokens `(start, end)` of the request that take its place; empty where
            nothing is inserted anywhere.
    """

    kept: int
    removed: tuple[Span, ...]
    held: int
    inserted: tuple[tuple[int, int], ...] = ()

    @property
    def new(self) -> int:
        """Tokens of the request among the `kept` that the context does not hold yet."""
        return sum(end - start for start, end in self.inserted)

    def saved(self, span_tokens: int) -> int:
        """Tokens that need not run, less `span_tokens` for every span."""
        return self.kept - self.new - span_tokens * len(self.removed)

    @property
    def prefix(self) -> int:
        """Tokens up to the first difference."""
        return self.removed[0].start if self.removed else self.kept


def reuse(
    cached: Sequence[int] | Tokens,
    request: Sequence[int] | Tokens,
    span_tokens: int = SPAN_TOKENS,
    borders: Borders | None = None,
) -> Reuse:
    """The reuse of `cached` for `request` that keeps most tokens, less `span_tokens` for every changed span.

    Equals are decided for fewer spans. Where a span can begin at several places, because the text repeats at its
    ends, it is laid between message borders; without any it begins as late as it can.

    Args:
        cached: a context's live tokens, in order.
        request: the tokens wanted.
        span_tokens: at least 1.
        borders: where messages of `cached` begin and end.
    """
    held, wanted = np.asarray(cached, dtype=np.int32), np.asarray(request, dtype=np.int32)
    prefix = common_prefix(held, wanted)
    islands = [(0, prefix, 0)]
    if prefix + span_tokens < len(wanted) and prefix + span_tokens < len(held):
        islands = _Search(held[prefix:], wanted[prefix:], span_tokens).best(prefix)
    removed: list[Span] = []
    for (_, end, shift), (start, stop, further) in pairwise(islands):
        assert end == start
        # The span may be moved back as far as its two ends read the same, but not into the span before it.
        first = removed[-1].end + 1 if removed else 0
        span = Span(end + shift, start + further)
        removed.append(span if borders is None else _between(held, span, first, borders))
        assert stop > start
    kept, last_shift = islands[-1][1], islands[-1][2]
    found = Reuse(kept, tuple(removed), kept + last_shift)
    assert np.array_equal(without(held, found), wanted[:kept])
    return found


def align(
    cached: Sequence[int] | Tokens,
    request: Sequence[int] | Tokens,
    span_tokens: int = SPAN_TOKENS,
    borders: Borders | None = None,
) -> Reuse:
    """As `reuse`, and with tokens replaced and inserted where that keeps more tokens, less `span_tokens` a span."""
    held, wanted = np.asarray(cached, dtype=np.int32), np.asarray(request, dtype=np.int32)
    found = reuse(held, wanted, span_tokens, borders)
    replaced = _replaced(held, wanted, common_prefix(held, wanted), span_tokens)
    return replaced if replaced.inserted and replaced.saved(span_tokens) > found.saved(span_tokens) else found


def _replaced(held: Tokens, wanted: Tokens, prefix: int, least: int) -> Reuse:
    """The reuse by runs of at least `least` tokens that occur once on either side (patience diff), after the prefix.

    Each run begins with a window of `least` tokens that is unique in both, and is extended as far as both agree.
    """
    ours, theirs = (_unique(_windows(tokens[prefix:], least)) for tokens in (held, wanted))
    anchors = _increasing(sorted((theirs[key] + prefix, ours[key] + prefix) for key in theirs.keys() & ours.keys()))
    removed, inserted, kept, reached = list[Span](), list[tuple[int, int]](), prefix, prefix
    for there, here in anchors:
        same = np.array_equal(held[here : here + least], wanted[there : there + least])
        if there < kept or here < reached or not same:
            # Inside the run before it, or two windows of one hash.
            continue
        back = 0
        while there - back > kept and here - back > reached and held[here - back - 1] == wanted[there - back - 1]:
            back += 1
        start, place = here - back, there - back
        removed.append(Span(reached, start) if reached < start else Place(start, start))
        inserted.append((kept, place))
        run = common_prefix(held[here:], wanted[there:])
        kept, reached = there + run, here + run
    return Reuse(kept, tuple(removed), reached, tuple(inserted) if any(start < end for start, end in inserted) else ())


def _windows(tokens: Tokens, size: int) -> npt.NDArray[np.uint64]:
    """A hash of 64 bits for every window of `size` tokens."""
    if len(tokens) < size:
        return np.empty(0, dtype=np.uint64)
    # The products overflow as they should.
    factors = np.random.default_rng(0).integers(1, 2**63, size, dtype=np.uint64) | np.uint64(1)
    hashes: npt.NDArray[np.uint64] = np.convolve(tokens.astype(np.uint64), factors, "valid")
    return hashes


def _unique(hashes: npt.NDArray[np.uint64]) -> dict[int, int]:
    """The places of hashes that occur once."""
    values, places, counts = np.unique(hashes, return_index=True, return_counts=True)
    once = counts == 1
    return dict(zip(values[once].tolist(), places[once].tolist(), strict=True))


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A longest subsequence of pairs, in order of their first numbers, whose second numbers increase."""
    tails: list[int] = []
    ends: list[int] = []
    before: list[int] = []
    for number, (_, second) in enumerate(pairs):
        place = bisect_left(tails, second)
        before.append(ends[place - 1] if place else -1)
        if place == len(tails):
            tails.append(second)
            ends.append(number)
        else:
            tails[place], ends[place] = second, number
    chain, last = list[tuple[int, int]](), ends[-1] if ends else -1
    while last >= 0:
        chain.append(pairs[last])
        last = before[last]
    return chain[::-1]


def without(cached: Tokens, found: Reuse) -> Tokens:
    """The tokens of `cached` that stay."""
    stays = np.ones(found.held, dtype=bool)
    for span in found.removed:
        stays[span.start : span.end] = False
    return cached[: found.held][stays]


def common_prefix(one: Tokens, other: Tokens) -> int:
    """How many leading tokens two sequences share."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size


def run_again(cached: Tokens, request: Tokens, least: int) -> int:
    """How many tokens of `request` lie in runs of `least` or more that `cached` has as well, wherever they stand."""
    if min(len(cached), len(request)) < least:
        return 0
    ours, theirs = _windows(request, least), _windows(cached, least)
    inside = np.convolve(np.isin(ours, theirs), np.ones(least, dtype=np.int64)) > 0
    return min(int(inside.sum()), len(cached))


class _Search:
    """The best chain of islands that lie at ever greater shifts: an island is text that context and request share.

    A state is an island followed to its end: all that counts of it is the request's place `reached` and the `shift` of
    the context's places against the request's. Leaving an island earlier gains nothing, since what is left would match
    there too, shifted. A state that has got less far at no smaller shift with no fewer spans is dropped: whatever leads
    on from it leads on from the other. So states are few, and each is expanded once.

    Common lengths come from ranks: `levels[t]` numbers the different runs of `2**t` tokens in context and request.
    """

    def __init__(self, held: Tokens, wanted: Tokens, span_tokens: int) -> None:
        self.held, self.wanted, self.span_tokens = len(held), len(wanted), span_tokens
        self.levels = _ranks(held, wanted, span_tokens)
        # Places in the context, by their token, and in order for each.
        self.order = np.argsort(self.levels[0][: self.held], kind="stable") if self.levels else np.empty(0, np.int64)
        self.sorted = self.levels[0][: self.held][self.order] if self.levels else self.order

    def best(self, prefix: int) -> list[tuple[int, int, int]]:
        """Islands `(start, end, shift)` in the request's places, `prefix` added; the first is the common prefix."""
        # For each state: the place reached, its shift, and the state it came from.
        states: list[tuple[int, int, int]] = [(0, 0, -1)]
        # The states that no other one beats: by shift, which gets farther the greater it is.
        shifts, reaches = [0], [0]
        frontier, spans, work = [0], 0, 0
        best, best_score = 0, 0
        while self.levels and frontier and self.wanted - (spans + 1) * self.span_tokens > best_score:
            spans += 1
            found: list[tuple[int, int, int]] = []
            for state in frontier:
                reached, shift, _ = states[state]
                places = self._occurrences(reached, reached + shift)
                work += STATE_WORK + len(places)
                if work > MOST_WORK:
                    break
                lengths = self._common(places, reached)
                farther = _records(lengths)
                found += [
                    (int(place) - reached, -reached - int(length), state)
                    for place, length in zip(places[farther], lengths[farther], strict=True)
                ]
            frontier = []
            for shift, negative, origin in sorted(found):
                reached, place = -negative, bisect_right(shifts, shift)
                if reaches[place - 1] >= reached:
                    continue
                beaten = place
                while beaten < len(shifts) and reaches[beaten] <= reached:
                    beaten += 1
                shifts[place:beaten], reaches[place:beaten] = [shift], [reached]
                states.append((reached, shift, origin))
                frontier.append(len(states) - 1)
                if reached - spans * self.span_tokens > best_score:
                    best, best_score = len(states) - 1, reached - spans * self.span_tokens
            if work > MOST_WORK:
                break
        chain: list[tuple[int, int, int]] = []
        while best >= 0:
            reached, shift, origin = states[best]
            start = states[origin][0] + prefix if origin >= 0 else 0
            chain.append((start, reached + prefix, shift))
            best = origin
        return chain[::-1]

    def _occurrences(self, reached: int, place: int) -> npt.NDArray[np.int64]:
        """Places behind `place` where the context has the request's token at `reached`."""
        if reached >= self.wanted:
            return self.order[:0]
        token = self.levels[0][self.held + 1 + reached]
        low, high = np.searchsorted(self.sorted, token, "left"), np.searchsorted(self.sorted, token, "right")
        places = self.order[low:high]
        return places[np.searchsorted(places, place, "right") :]

    def _common(self, places: npt.NDArray[np.int64], reached: int) -> npt.NDArray[np.int64]:
        """How many tokens the context from each of `places` on shares with the request from `reached` on."""
        lengths = np.zeros(len(places), dtype=np.int64)
        for size, ranks in reversed([(2**level, ranks) for level, ranks in enumerate(self.levels)]):
            here, there = places + lengths, self.held + 1 + reached + lengths
            same = (here + size <= self.held) & (there + size <= self.held + 1 + self.wanted)
            same[same] = ranks[here[same]] == ranks[there[same]]
            lengths[same] += size
        return lengths


def _ranks(held: Tokens, wanted: Tokens, span_tokens: int) -> list[Ranks]:
    """Ranks of runs of 1, 2, 4, ... tokens, while context and request share any.

    Empty when they share no run long enough to pay for a span: of the islands behind the first difference the
    longest has more than `span_tokens` tokens.
    """
    # A separator that occurs nowhere else keeps runs from reaching over.
    ranks = np.concatenate([held.astype(np.int64), [-1], wanted.astype(np.int64)])
    ranks = np.unique(ranks, return_inverse=True)[1].astype(np.int64)
    levels: list[Ranks] = []
    size = 1
    while size <= min(len(held), len(wanted)):
        if not np.isin(ranks[len(held) + 1 : len(ranks)], ranks[: max(0, len(held) + 1 - size)]).any():
            break
        levels.append(ranks)
        pairs = ranks[:-size] * (int(ranks.max()) + 1) + ranks[size:]
        ranks = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
        size *= 2
    return levels if size > span_tokens else []


def _records(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which lengths are greater than all before them."""
    before = np.concatenate([[0], np.maximum.accumulate(lengths)])[:-1]
    result: npt.NDArray[np.bool_] = lengths > before
    return result


def _between(held: Tokens, span: Span, first: int, borders: Borders) -> Span:
    """The span moved back, at most to `first`, so that it lies between two message borders, or begins at one."""
    most = 0
    while span.start - most > first and held[span.start - most - 1] == held[span.end - most - 1]:
        most += 1
    starts = [span.start - place for place in borders(span.start - most, span.start)]
    ends = {span.end - place for place in borders(span.end - most, span.end)}
    whole = [back for back in starts if back in ends]
    back = min(whole or starts, default=0)
    return Span(span.start - back, span.end - back)


__all__ = ["SPAN_TOKENS", "Reuse", "align", "common_prefix", "reuse", "run_again", "without"]
