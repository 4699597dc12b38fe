"""Where in a cache the tokens of a text are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.text.spans import Place, Span


@dataclass(frozen=True)
class Edit:
    """Tokens to erase and tokens to put in their place, by their indices in the text; one of the two may be empty.

    The new tokens follow the erased ones in the text.
    """

    targets: AbstractSet[int]
    inserted: range = range(0)


@dataclass(frozen=True)
class SlotEdit:
    """Slots to erase and tokens to put in their place.

    Attributes:
        span: adjacent slots; a `Place` erases none, and the tokens go before it.
        inserted: indices of tokens in the text.
    """

    span: Span
    inserted: Sequence[int] = ()


def slot_tokens(cache: EditableCache, tokens: Sequence[int]) -> list[int]:
    """The token id in every slot of the cache, `NO_TOKEN` where there is none to run.

    Args:
        tokens: ids by index in the text, as a method gets them.
    """
    return [NO_TOKEN if index == NO_TOKEN else tokens[index] for index in cache.slot_to_token.tolist()]


def slots_of(cache: EditableCache, indices: Iterable[int]) -> list[int]:
    """The slots that hold one of these tokens, increasing."""
    found: list[int] = np.flatnonzero(_holding(cache, indices)).tolist()
    return found


def slot_edits(cache: EditableCache, edits: Iterable[Edit]) -> list[SlotEdit]:
    """The edits by slots of the cache as it is, increasing; new tokens go with the first run of erased slots."""
    found = []
    for edit in edits:
        runs, inserted = slot_runs(cache, edit.targets), edit.inserted
        if inserted and not runs:
            runs = [_place(cache, inserted.start)]
        found += [SlotEdit(run, () if number else inserted) for number, run in enumerate(runs)]
    return found


def slot_runs(cache: EditableCache, targets: Iterable[int]) -> list[Span]:
    """Runs of adjacent slots that hold one of these tokens."""
    slots = np.flatnonzero(_holding(cache, targets))
    borders = np.flatnonzero(np.diff(slots) != 1) + 1
    return [Span(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, borders) if len(run)]


def _place(cache: EditableCache, index: int) -> Place:
    """The slot before which token `index` of the text goes: after the last slot of an earlier token."""
    held = cache.slot_to_token.numpy()
    earlier = np.flatnonzero((held != NO_TOKEN) & (held < index))
    slot = int(earlier[-1]) + 1 if len(earlier) else 0
    return Place(slot, slot)


def _holding(cache: EditableCache, indices: Iterable[int]) -> npt.NDArray[np.bool_]:
    """Which slots hold one of these tokens."""
    return np.isin(cache.slot_to_token.numpy(), np.fromiter(indices, dtype=np.int64))
