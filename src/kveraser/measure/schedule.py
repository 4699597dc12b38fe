"""When to edit: how often to erase stale text from a context that grows, so that the total cost is least.

An edit costs `edit`, in seconds or money. A stale token costs `carry` in each turn while it is in the context, and
each turn leaves `per_turn` stale tokens behind. Edits every d turns cost `edit / d` a turn, and the stale tokens
between them `carry * per_turn * d / 2`: the sum is least at d = sqrt(2 * edit / (carry * per_turn)), as for the lot
size of an inventory (https://en.wikipedia.org/wiki/Economic_order_quantity).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """When to edit, and what it costs, in the unit of the costs.

    Attributes:
        edits: turns before which to edit, from 0 (now); empty: it never pays.
        stale: stale tokens at which an edit is due; None: no tokens become stale later.
        cost: of these edits and of the stale tokens.
        cost_never, cost_always: without any edit, and with one before every turn.
    """

    edits: tuple[int, ...]
    stale: float | None
    cost: float
    cost_never: float
    cost_always: float


def best_schedule(edit: float, carry: float, stale: int, per_turn: float, turns: int) -> Schedule:
    """The cheapest edits of a context over its next turns, up to the rounding to whole turns.

    Args:
        edit: cost of an edit: the price or seconds of a token of prefill, times the tokens that the method runs.
        carry: cost of a stale token for a turn: the price of a cached token, or the seconds that it adds.
        stale: stale tokens in the context now.
        per_turn: tokens that become stale in each turn.
        turns: turns to come.

    Raises:
        InputError: a negative or infinite number, or no turn.
    """
    for name, value in (("edit", edit), ("carry", carry), ("stale", stale), ("per_turn", per_turn)):
        if not 0 <= value < math.inf:
            raise InputError(f"{name} is {value}: give a finite number of 0 or more")
    if turns < 1:
        raise InputError(f"turns is {turns}: give 1 or more")

    def cost(edits: Sequence[int]) -> float:
        return schedule_cost(edit, carry, stale, per_turn, turns, edits)

    candidates: list[tuple[int, ...]] = [(), (0,)]
    due = None
    if carry * per_turn > 0:
        distance = max(1.0, math.sqrt(2 * edit / (carry * per_turn)))
        due = distance * per_turn
        # The first edit comes now, or later: then the stale tokens of now count as turns that have gone by.
        for earliest, before in ((0, 0.0), (1, stale / per_turn)):
            intervals = (before + turns) / distance
            for count in (math.floor(intervals), math.ceil(intervals)):
                step = (before + turns) / max(count, 1)
                places = {round(number * step - before) for number in range(count)}
                candidates.append(tuple(sorted(turn for turn in places if earliest <= turn < turns)))
    best = min(candidates, key=cost)
    return Schedule(best, due, cost(best), cost(()), cost(range(turns)))


def schedule_cost(edit: float, carry: float, stale: float, per_turn: float, turns: int, edits: Sequence[int]) -> float:
    """The cost of editing before the turns in `edits`. Tokens become stale evenly: a turn carries half of its own."""
    total, due = 0.0, set(edits)
    for turn in range(turns):
        if turn in due:
            total, stale = total + edit, 0
        total, stale = total + carry * (stale + per_turn / 2), stale + per_turn
    return total
