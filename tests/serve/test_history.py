"""A request's tokens against a cached context: equal to brute force, and safe on any input."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from kveraser.serve import history
from kveraser.serve.history import Reuse, align, reuse
from kveraser.text.spans import Place, Span


def brute_score(held: tuple[int, ...], wanted: tuple[int, ...], span_tokens: int) -> int:
    """The best `kept - span_tokens * spans` over every way to lay the request's beginning into the context."""

    @cache
    def best(i: int, j: int, adjacent: bool) -> int:
        """From the context's place `i` and the request's `j` on; `adjacent`: a token taken here opens no new span."""
        if i == len(held) or j == len(wanted):
            return 0
        take = (0 if adjacent else -span_tokens) + 1 + best(i + 1, j + 1, True) if held[i] == wanted[j] else 0
        return max(0, take, best(i + 1, j, False))

    return best(0, 0, True)


def taken(held: list[int], found: Reuse) -> list[int]:
    removed = {place for span in found.removed for place in range(span.start, span.end)}
    return [token for place, token in enumerate(held[: found.held]) if place not in removed]


def check(held: list[int], wanted: list[int], span_tokens: int) -> Reuse:
    """The reuse, after what holds of every one."""
    found = reuse(held, wanted, span_tokens)
    assert taken(held, found) == wanted[: found.kept]
    assert all(first.end < second.start for first, second in zip(found.removed, found.removed[1:], strict=False))
    assert not found.removed or found.removed[-1].end < found.held <= len(held)
    assert held[: found.prefix] == wanted[: found.prefix]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_brute_force_on_any_two_texts(seed: int) -> None:
    draw = random.Random(seed)
    spans = 0
    for _ in range(250):
        letters = draw.choice([2, 3, 6])
        held = [draw.randrange(letters) for _ in range(draw.randrange(18))]
        wanted = [draw.randrange(letters) for _ in range(draw.randrange(14))]
        span_tokens = draw.choice([1, 1, 2, 3])
        found = check(held, wanted, span_tokens)
        spans += len(found.removed)
        assert found.kept - span_tokens * len(found.removed) == brute_score(tuple(held), tuple(wanted), span_tokens)
    assert spans > 50


@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_brute_force_on_edited_texts(seed: int) -> None:
    draw = random.Random(100 + seed)
    several = 0
    for _ in range(150):
        held = [draw.randrange(5) for _ in range(draw.randrange(10, 40))]
        wanted = [token for token in edited(held, draw, draw.randrange(1, 4))] + [draw.randrange(6) for _ in range(3)]
        span_tokens = draw.choice([1, 2, 4])
        found = check(held, wanted, span_tokens)
        several += len(found.removed) > 1
        assert found.kept - span_tokens * len(found.removed) == brute_score(tuple(held), tuple(wanted), span_tokens)
    assert several > 20


def edited(held: list[int], draw: random.Random, removals: int) -> list[int]:
    """A text with spans cut out of it."""
    left = list(held)
    for _ in range(removals):
        start = draw.randrange(len(left))
        del left[start : start + draw.randrange(1, 1 + len(left) // removals)]
        if not left:
            break
    return left


def conversation(draw: random.Random, turns: int) -> list[list[int]]:
    """Messages of tokens, each with the same opening and closing, a few of them alike."""
    messages: list[list[int]] = []
    for index in range(turns):
        body = [draw.randrange(10, 3000) for _ in range(draw.randrange(5, 120))]
        if index > 3 and draw.random() < 0.2:
            body = draw.choice(messages)[3:-2]
        messages.append([1, 5 + index % 3, 3, *body, 2, 3])
    return messages


@pytest.mark.parametrize("seed", range(20))
def test_removed_messages_are_found_and_all_that_remains_is_kept(seed: int) -> None:
    draw = random.Random(seed)
    messages = conversation(draw, 40)
    borders = np.cumsum([0, *map(len, messages)])
    gone = sorted(draw.sample(range(1, 36), draw.randrange(1, 5)))
    held = [token for message in messages for token in message]
    remaining = [token for index, message in enumerate(messages) if index not in gone for token in message]
    question = [1, 5, 3, 9, 9, 9, 2, 3]

    found = reuse(
        held,
        remaining + question,
        borders=lambda first, last: [int(place) for place in borders if first <= place <= last],
    )

    assert taken(held, found) == remaining + question[: found.kept - len(remaining)]
    removed = [place for span in found.removed for place in range(span.start, span.end)]
    assert len(removed) == sum(len(messages[index]) for index in gone)
    for span in found.removed:
        assert {span.start, span.end} <= set(borders.tolist())


def test_a_span_lies_between_borders_where_both_ends_can() -> None:
    opening, closing = [1, 5, 3], [2, 3]
    first, second, third = ([*opening, *body, *closing] for body in ([10] * 40, [20] * 40, [30] * 40))
    held = first + second + third
    wanted = first + third
    length = len(first)
    late = reuse(held, wanted)
    assert late.removed == (Span(length + 3, 2 * length + 3),)
    snapped = reuse(held, wanted, borders=lambda low, high: [p for p in (0, length, 2 * length) if low <= p <= high])
    assert snapped.removed == (Span(length, 2 * length),)
    # A border at the beginning alone counts as well; one that the text does not allow counts for nothing.
    begun = reuse(held, wanted, borders=lambda low, high: [p for p in (length + 1,) if low <= p <= high])
    assert begun.removed == (Span(length + 1, 2 * length + 1),)
    off = reuse(held, wanted, borders=lambda low, high: [p for p in (length - 3, length + 9) if low <= p <= high])
    assert off.removed == late.removed


def test_of_two_equal_messages_the_second_goes() -> None:
    same = [1, *range(100, 140), 2]
    held = [9, *same, *same, *range(200, 260)]
    borders = [1, 1 + len(same), 1 + 2 * len(same)]
    found = reuse(
        held, [9, *same, *range(200, 260)], borders=lambda low, high: [p for p in borders if low <= p <= high]
    )
    assert found.removed == (Span(borders[1], borders[2]),)


def test_appending_truncating_and_changing_remove_nothing() -> None:
    held = list(range(100, 400))
    assert reuse(held, [*held, 1, 2, 3]) == Reuse(300, (), 300)
    assert reuse(held, held[:120]) == Reuse(120, (), 120)
    assert reuse(held, [*held[:50], 7, *held[50:]]) == Reuse(50, (), 50)
    assert reuse(held, [7, *held[1:]]) == Reuse(0, (), 0)
    assert reuse([], held) == reuse(held, []) == Reuse(0, (), 0)


def test_a_span_must_save_more_than_it_costs() -> None:
    held = list(range(100, 200))
    wanted = held[:40] + held[60:]
    assert reuse(held, wanted, span_tokens=39) == Reuse(80, (Span(40, 60),), 100)
    assert reuse(held, wanted, span_tokens=40) == Reuse(40, (), 40)


def test_short_text_between_two_removed_spans_is_kept() -> None:
    held = list(range(1000, 3000))
    wanted = held[:100] + held[600:605] + held[900:] + [1, 2]
    assert reuse(held, wanted).removed == (Span(100, 600), Span(605, 900))


def test_work_is_bounded_on_texts_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given up early, what is found is still right."""
    draw = random.Random(5)
    held = [draw.choice([1, 1, 1, 2]) for _ in range(3000)]
    wanted = [draw.choice([1, 1, 1, 2]) for _ in range(2000)]
    examined = []
    original = history._Search._common

    def counting(self: history._Search, places: history.Ranks, reached: int) -> history.Ranks:
        examined.append(len(places))
        return original(self, places, reached)

    monkeypatch.setattr(history._Search, "_common", counting)
    monkeypatch.setattr(history, "MOST_WORK", 200_000)
    check(held, wanted, 2)
    assert 0 < sum(examined) <= 200_000


# Replaced and inserted tokens


def rebuilt(held: list[int], wanted: list[int], found: Reuse) -> list[int]:
    """The context after the edit, by hand."""
    out, reached = list[int](), 0
    for number, span in enumerate(found.removed):
        start, end = found.inserted[number] if found.inserted else (0, 0)
        out += held[reached : span.start] + wanted[start:end]
        reached = span.end
    return out + held[reached : found.held]


@pytest.mark.parametrize("seed", range(5))
def test_replacements_insertions_and_removals_are_found_and_rebuild_the_request(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        held = [draw.randrange(1000) for _ in range(600)]
        wanted, edits, place = list[int](), 0, 0
        for end in sorted(draw.sample(range(60, 540, 60), draw.randrange(1, 4))):
            wanted += held[place:end]
            removed, added = draw.randrange(30), draw.randrange(20)
            wanted += [1000 + draw.randrange(1000) for _ in range(added)]
            place, edits = end + removed, edits + bool(removed or added)
        tail = [draw.randrange(1000) for _ in range(draw.randrange(9))]
        wanted += held[place:] + tail
        found = align(held, wanted, 8)
        assert rebuilt(held, wanted, found) == wanted[: found.kept] and found.kept >= len(wanted) - len(tail)
        assert len(found.removed) == edits and found.saved(8) >= reuse(held, wanted, 8).saved(8)
        spans = [(span.start, span.end) for span in found.removed]
        assert all(end < start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize("seed", range(4))
def test_any_two_texts_are_aligned_safely(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        letters = draw.choice([2, 4, 9])
        held = [draw.randrange(letters) for _ in range(draw.randrange(40))]
        wanted = [draw.randrange(letters) for _ in range(draw.randrange(40))]
        found = align(held, wanted, draw.choice([1, 2, 4]))
        assert rebuilt(held, wanted, found) == wanted[: found.kept] and found.held <= len(held)


def test_a_short_suffix_is_not_worth_an_edit_and_a_pure_insertion_has_no_span() -> None:
    held = list(range(200))
    inserted = align(held, [*range(100), *range(500, 510), *range(100, 200)], 32)
    assert inserted.removed == (Place(100, 100),) and inserted.inserted == ((100, 110),) and inserted.new == 10
    assert inserted.kept == 210 and inserted.held == 200 and inserted.saved(32) == 168
    short = align(held, [*range(190), *range(500, 510), *range(190, 200)], 32)
    assert short.removed == () and short.kept == 190
