"""When to edit: the square root's schedule against the best of all schedules, found by dynamic programming."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from kveraser.errors import InputError
from kveraser.measure.schedule import best_schedule, schedule_cost


def least_cost(edit: float, carry: float, stale: float, per_turn: float, turns: int) -> float:
    """The least cost over all 2**turns schedules."""

    @cache
    def left(turn: int, since: int | None) -> float:
        """From a turn on, when `since` turns have passed since an edit; None: there was none."""
        if turn == turns:
            return 0.0
        held = stale + turn * per_turn if since is None else since * per_turn
        go_on = carry * (held + per_turn / 2) + left(turn + 1, None if since is None else since + 1)
        return min(go_on, edit + carry * per_turn / 2 + left(turn + 1, 1))

    return left(0, None)


def test_no_schedule_is_much_cheaper() -> None:
    rng, edited, late = random.Random(0), 0, 0
    for _ in range(300):
        edit, carry = rng.uniform(0, 50), rng.uniform(0.001, 0.1)
        stale, per_turn, turns = (
            rng.choice([0, rng.randrange(2000)]),
            rng.choice([0, rng.uniform(1, 300)]),
            rng.randrange(1, 60),
        )
        found = best_schedule(edit, carry, stale, per_turn, turns)
        best = least_cost(edit, carry, stale, per_turn, turns)
        assert found.cost == pytest.approx(schedule_cost(edit, carry, stale, per_turn, turns, found.edits))
        assert best - 1e-9 <= found.cost <= 1.03 * best + 1e-9
        assert found.cost <= found.cost_never + 1e-9
        edited, late = edited + (len(found.edits) > 1), late + (bool(found.edits) and found.edits[0] > 0)
    assert edited > 50 and late > 50


def test_the_distance_grows_with_the_square_root_of_the_cost_of_an_edit() -> None:
    distances = []
    for edit in (10.0, 40.0, 160.0):
        found = best_schedule(edit, carry=0.01, stale=0, per_turn=20, turns=1000)
        distances.append(found.edits[1] - found.edits[0])
        assert found.stale == pytest.approx(20 * math.sqrt(2 * edit / 0.2))
        assert found.cost < min(found.cost_never, found.cost_always)
    assert distances == [10, 20, 40]


def test_edits_that_cost_nothing_are_made_always_and_those_that_save_nothing_never() -> None:
    assert best_schedule(0, 0.1, 50, 10, 8).edits == tuple(range(8))
    assert best_schedule(1, 0, 50, 10, 8).edits == ()
    # Nothing becomes stale later: now, if what is stale costs more than an edit, or never.
    assert best_schedule(7.9, 0.1, 10, 0, 8).edits == (0,) and best_schedule(8.1, 0.1, 10, 0, 8).edits == ()


@pytest.mark.parametrize(
    ("name", "value"), [("edit", -1), ("carry", math.nan), ("stale", -1), ("per_turn", math.inf), ("turns", 0)]
)
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    given = {"edit": 1.0, "carry": 0.1, "stale": 5, "per_turn": 3.0, "turns": 9} | {name: value}
    with pytest.raises(InputError, match=rf"{name} is"):
        best_schedule(**given)  # type: ignore[arg-type]
