"""Edit the tokens of a cache by a method, or by the exact one where it costs about the same."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.errors import MethodError
from kveraser.methods import Method, make_method
from kveraser.methods.slots import Edit, slot_runs, slots_of
from kveraser.model.backbone import Backbone

EXACT_SHARE = 0.75
"""A method that would run this share of the tokens that `recompute` runs is replaced by it: exact at that cost."""


@dataclass(frozen=True)
class Plan:
    """The method that an erase will use.

    Attributes:
        method: resolved; the requested one, or `recompute` instead.
        reason: why it differs from the requested one; None where it does not.
    """

    method: Method
    reason: str | None = None


def plan_erase(
    backbone: Backbone,
    cache: EditableCache,
    method: Method,
    targets: AbstractSet[int],
    force: bool = False,
    inserted: int = 0,
) -> Plan:
    """Resolve `method` for an erase of `targets`; use `recompute` instead where it costs about the same.

    Args:
        targets: indices of the tokens to erase, as in `cache.slot_to_token`.
        force: keep `method` whatever `recompute` costs.
        inserted: tokens that every method has to run besides.

    Raises:
        EraserError, RotationError: see `Method.resolve`.
        MethodError: it can't insert.
    """
    if inserted and not method.inserts:
        raise MethodError(f"{method} can't insert text: use recompute, shift, repair, follow or selective")
    resolved, runs = method.resolve(backbone), slot_runs(cache, targets)
    if force or resolved.is_reference or not runs:
        return Plan(resolved)
    held = cache.slot_to_token.numpy()
    kept = np.setdiff1d(np.flatnonzero(held != NO_TOKEN), slots_of(cache, targets))

    def kept_before(slot: int) -> int:
        return int(np.searchsorted(kept, slot))

    planned = sum(resolved.estimate(kept_before(run.start), len(run), len(kept) - kept_before(run.end)) for run in runs)
    exact = len(kept) - kept_before(min(runs[0].start, cache.exact_length))
    if planned < EXACT_SHARE * exact:
        return Plan(resolved)
    reason = f"{resolved} would run {planned} tokens and exact recomputation {exact}"
    return Plan(make_method("recompute").resolve(backbone), reason)


def edit_tokens(
    backbone: Backbone, cache: EditableCache, method: Method, tokens: Sequence[int], edits: Sequence[Edit]
) -> int:
    """Apply edits, in the order of the text, to the cache. Needs an open `cache.edit()`.

    Args:
        method: a resolved method.
        tokens: ids of all tokens of the text, erased and inserted ones included.

    Returns:
        Tokens run through the backbone.

    Raises:
        MethodError: the method can't insert, or left erased tokens in the cache.
    """
    recomputed = method.edit(backbone, cache, tokens, edits)
    for edit in edits:
        if slots_of(cache, edit.targets) or len(slots_of(cache, edit.inserted)) != len(edit.inserted):
            raise MethodError(f"{method} left tokens to erase in the cache: choose another method")
    return recomputed


def erase_tokens(
    backbone: Backbone, cache: EditableCache, method: Method, tokens: Sequence[int], targets: AbstractSet[int]
) -> int:
    """Erase `targets` (indices in `tokens`) from the cache; see `edit_tokens`."""
    return edit_tokens(backbone, cache, method, tokens, [Edit(targets)])
