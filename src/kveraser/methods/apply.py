"""Erase tokens from a cache by a method: one call for every run of adjacent slots."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.errors import MethodError
from kveraser.methods import Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Place, Span

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
    resolved, runs = method.resolve(backbone), _runs(cache, targets)
    if force or resolved.is_reference or not runs:
        return Plan(resolved)
    held = cache.slot_to_token.numpy()
    kept = np.flatnonzero((held != NO_TOKEN) & ~_among(held, targets))

    def kept_before(slot: int) -> int:
        return int(np.searchsorted(kept, slot))

    planned = sum(resolved.estimate(kept_before(run.start), len(run), len(kept) - kept_before(run.end)) for run in runs)
    exact = len(kept) - kept_before(min(runs[0].start, cache.exact_length))
    if planned < EXACT_SHARE * exact:
        return Plan(resolved)
    reason = f"{resolved} would run {planned} tokens and exact recomputation {exact}"
    return Plan(make_method("recompute").resolve(backbone), reason)


@dataclass(frozen=True)
class Edit:
    """Tokens to erase and tokens to put in their place, by their indices in the text; one of the two may be empty.

    The new tokens follow the erased ones in the text.
    """

    targets: AbstractSet[int]
    inserted: range = range(0)


def edit_tokens(
    backbone: Backbone, cache: EditableCache, method: Method, tokens: Sequence[int], edits: Sequence[Edit]
) -> int:
    """Apply edits to the cache, the first run of slots first. Needs an open `cache.edit()`.

    Args:
        method: a resolved method.
        tokens: ids of all tokens of the text, erased and inserted ones included.

    Returns:
        Tokens run through the backbone.

    Raises:
        MethodError: the method can't insert, or left erased tokens in the cache.
    """
    targets = frozenset[int]().union(*(edit.targets for edit in edits))
    recomputed = 0
    for edit in edits:
        inserted: Sequence[int] = edit.inserted
        while (runs := _runs(cache, edit.targets)) or inserted:
            run = runs[0] if runs else _place(cache, edit.inserted.start)
            erased = set(cache.slot_to_token[run.start : run.end].tolist())
            # Methods that recompute must not run the tokens of the other spans again.
            readable = list(tokens)
            for index in targets - erased:
                readable[index] = NO_TOKEN
            if inserted:
                recomputed += method.replace(backbone, cache, readable, run, inserted)
            else:
                recomputed += method(backbone, cache, readable, run)
            held = cache.slot_to_token.numpy()
            if _among(held, erased).any() or _among(held, set(inserted)).sum() != len(inserted):
                raise MethodError(f"{method} left tokens of the span {run} in the cache: choose another method")
            inserted = ()
    return recomputed


def erase_tokens(
    backbone: Backbone, cache: EditableCache, method: Method, tokens: Sequence[int], targets: AbstractSet[int]
) -> int:
    """Erase `targets` (indices in `tokens`) from the cache; see `edit_tokens`."""
    return edit_tokens(backbone, cache, method, tokens, [Edit(targets)])


def _place(cache: EditableCache, index: int) -> Place:
    """The slot before which token `index` of the text goes: after the last slot of an earlier token."""
    held = cache.slot_to_token.numpy()
    earlier = np.flatnonzero((held != NO_TOKEN) & (held < index))
    slot = int(earlier[-1]) + 1 if len(earlier) else 0
    return Place(slot, slot)


def _runs(cache: EditableCache, targets: AbstractSet[int]) -> list[Span]:
    """Runs of adjacent slots that hold tokens to erase."""
    slots = np.flatnonzero(_among(cache.slot_to_token.numpy(), targets))
    borders = np.flatnonzero(np.diff(slots) != 1) + 1
    return [Span(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, borders) if len(run)]


def _among(held: npt.NDArray[np.int64], targets: AbstractSet[int]) -> npt.NDArray[np.bool_]:
    """Which slots hold one of these tokens."""
    return np.isin(held, np.fromiter(targets, dtype=np.int64, count=len(targets)))
