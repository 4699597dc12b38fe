"""From tokens to runs of slots: a method takes one run at a time, and a text's spans may lie in several."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.errors import MethodError
from kveraser.methods import NOT_LIVE, Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span

EXACT_SHARE = 0.75
"""A method that plans to run this share of what `recompute` would run is replaced by it: exact, at that price."""


@dataclass(frozen=True)
class Plan:
    """What an erase is to run.

    Attributes:
        method: settled; the one asked for, or `recompute` in its place.
        reason: why it is another than the one asked for; None: it is that one.
    """

    method: Method
    reason: str | None = None


def plan_erase(
    backbone: Backbone,
    cache: EditableCache,
    method: Method,
    slots: Sequence[int],
    targets: AbstractSet[int],
    force: bool = False,
) -> Plan:
    """Settle `method` for an erase of `targets`, and choose `recompute` instead where it costs about the same.

    Args:
        slots, targets: as of `erase_tokens`.
        force: take `method` whatever `recompute` costs, as measurements of it need.

    Raises:
        EraserError, RotationError: as `Method.settled`.
    """
    settled = method.settled(backbone)
    runs = _runs(slots, targets)
    if force or settled.is_reference or not runs:
        return Plan(settled)
    kept = [slot for slot, source in enumerate(slots) if source != NOT_LIVE and source not in targets]
    planned = sum(
        settled.estimate(bisect_left(kept, run.start), len(run), len(kept) - bisect_left(kept, run.end)) for run in runs
    )
    left = len(kept) - bisect_left(kept, min(runs[0].start, cache.exact_length))
    if planned < EXACT_SHARE * left:
        return Plan(settled)
    reason = f"{settled} would run {planned} tokens and exact recomputation {left}"
    return Plan(make_method("recompute").settled(backbone), reason)


def erase_tokens(
    backbone: Backbone,
    cache: EditableCache,
    method: Method,
    tokens: Sequence[int],
    slots: Sequence[int],
    targets: AbstractSet[int],
) -> tuple[list[int], int]:
    """Erase `targets` from the cache, run by run from the front; its edit is open.

    Args:
        method: a settled method.
        tokens: ids of all tokens that were ever read.
        slots: which of them every slot of the cache holds, `NOT_LIVE` where there is none.
        targets: places in `tokens` that go.

    Returns:
        `slots` of the edited cache, and the tokens that were run through the backbone.

    Raises:
        MethodError: the method says that slots hold erased tokens, or tokens where there is no slot.
    """
    held, recomputed = list(slots), 0
    while runs := _runs(held, targets):
        gone = set(held[runs[0].start : runs[0].end])
        # The other spans are no text any more either: what recomputes must not read them again.
        readable = [
            NOT_LIVE
            if source == NOT_LIVE or (source in targets and not runs[0].start <= slot < runs[0].end)
            else tokens[source]
            for slot, source in enumerate(held)
        ]
        erased = method(backbone, cache, readable, runs[0])
        recomputed += erased.recomputed
        held = [NOT_LIVE if slot == NOT_LIVE else held[slot] for slot in erased.slots]
        if len(held) != cache.length or not gone.isdisjoint(held):
            raise MethodError(
                f"{method} left a cache of {cache.length} slots and says what {len(held)} hold, "
                f"erased tokens {'not ' if gone.isdisjoint(held) else ''}among them: choose another method"
            )
    return held, recomputed


def _runs(slots: Sequence[int], targets: AbstractSet[int]) -> list[Span]:
    """Runs of neighbouring slots that hold tokens to erase."""
    runs: list[Span] = []
    for slot, source in enumerate(slots):
        if source in targets:
            if runs and runs[-1].end == slot:
                runs[-1] = Span(runs[-1].start, slot + 1)
            else:
                runs.append(Span(slot, slot + 1))
    return runs
