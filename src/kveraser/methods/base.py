"""The contract that every erasing method keeps, and the steps that several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from math import ceil, inf
from typing import Any, ClassVar, Self

import torch

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.errors import MethodError
from kveraser.methods.slots import Edit, slot_edits, slots_of
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span

LONG_VALUE = 24


class Method(ABC):
    """One way of erasing: a frozen dataclass whose fields are its parameters.

    Calling it edits the cache in place inside `with cache.edit():`; an exception restores every bit. Which tokens the
    slots hold, the next position and exactness are read off the cache afterwards.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str]
    source: ClassVar[str]
    needs_eraser: ClassVar[bool] = False
    moves_keys: ClassVar[bool] = False
    removes_text: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False
    inserts: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        """Erase `span` from `cache`.

        Args:
            backbone: the model that filled the cache.
            cache: the cache to edit in place; its edit is open.
            tokens: ids of all tokens of the text, by the indices in `cache.slot_to_token`; `NO_TOKEN` for tokens that
                must not be run.
            span: the slots to erase; all of them hold tokens.

        Returns:
            Tokens run through the backbone.

        Raises:
            KVEraserError: the method can't serve this backbone or cache.
        """

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        """As `__call__`, and put tokens in the span's place.

        Args:
            span: may be a `Place`: nothing is erased then, and the tokens go before that slot.
            inserted: indices in `tokens` of the tokens to insert.

        Raises:
            MethodError: the method only erases.
        """
        raise MethodError(f"{self} can't insert text: use recompute, shift, repair, follow or selective")

    def edit(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], edits: Sequence[Edit]) -> int:
        """Apply edits in the order of the text, one run of adjacent slots after the other.

        A method that can do all of them in one pass overrides this.

        Args:
            tokens: ids of all tokens of the text, erased and inserted ones included.

        Returns, raises: as `__call__` and `replace`.
        """
        targets = frozenset[int]().union(*(edit.targets for edit in edits))
        recomputed = 0
        for edit in edits:
            inserted = edit.inserted
            while runs := slot_edits(cache, [Edit(edit.targets, inserted)]):
                span = runs[0].span
                erased = set(cache.slot_to_token[span.start : span.end].tolist())
                # Methods that recompute must not run the tokens of the other spans again.
                readable = list(tokens)
                for index in targets - erased:
                    readable[index] = NO_TOKEN
                if inserted:
                    recomputed += self.replace(backbone, cache, readable, span, inserted)
                else:
                    recomputed += self(backbone, cache, readable, span)
                if slots_of(cache, erased):
                    raise MethodError(f"{self} left tokens of the span {span} in the cache: choose another method")
                inserted = range(0)
        return recomputed

    @abstractmethod
    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        """Tokens that an erase will run through the backbone."""

    def resolve(self, backbone: Backbone) -> Self:
        """The method with its open parameters set for `backbone`.

        Raises:
            EraserError: it needs an eraser and none is loaded.
            RotationError: it moves keys, and the backbone's can't be moved.
        """
        if self.moves_keys:
            # Measured once per backbone; done here so that no erase includes it.
            _ = backbone.rotation
        return self

    @property
    def changes_only_span(self) -> bool:
        """Whether nothing outside the span's slots changes, as shared, paged or quantized caches need."""
        return False

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, Any]:
        """The parameters by name, without those that are None."""
        return {name: value for name, value in self.parameters.items() if value is not None}

    def __str__(self) -> str:
        """The name and parameters as `make_method` reads them, without None and long texts."""
        shown = [f"{name}={value!r}" for name, value in self.given.items() if len(repr(value)) < LONG_VALUE]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def clear_tokens(cache: EditableCache, span: Span) -> None:
    """Mark the slots of `span` as holding no token of the text."""
    cache.set_tokens(span.start, [NO_TOKEN] * len(span))


def position_of(cache: EditableCache, slot: int) -> int:
    """The position of a token that would take the place of the one in `slot`."""
    return ceil(float(cache.positions[slot])) if slot < cache.length else cache.next_position


def open_slots(cache: EditableCache, slot: int, position: int, inserted: Sequence[int]) -> None:
    """Make slots at `slot` for tokens at positions from `position` on; their states are zero until they are run.

    Later slots keep their states and positions.

    Args:
        inserted: indices of the tokens in the text.
    """
    if not inserted:
        return
    end = position + len(inserted)
    following = max(cache.next_position, end)
    cache.insert(slot, torch.arange(position, end, dtype=torch.float64))
    cache.set_tokens(slot, inserted)
    cache.set_next_position(following)


def close_gap(backbone: Backbone, cache: EditableCache, start: int, position: int) -> None:
    """Re-rotate the keys from slot `start` on so that the first of them is at `position`; values are unchanged.

    Raises:
        RotationError: the backbone's positions can't be moved.
    """
    rotation = backbone.rotation
    if start == cache.length:
        cache.set_next_position(position)
        return
    delta = position - ceil(float(cache.positions[start]))
    keys = [keys for keys, _ in cache.read(start, cache.length)]
    cache.rotate(start, cache.length, rotation.rotated(keys, delta), delta)


def recompute_window(backbone: Backbone, cache: EditableCache, tokens: Sequence[int], start: int, window: int) -> int:
    """Recompute in place the tokens among the `window` slots from `start` on; each attends to all slots before it.

    Args:
        tokens: the token id in every slot.

    Returns:
        Tokens run. Slots without a token keep their states.
    """
    end = min(start + window, cache.length)
    recomputed = 0
    while start < end:
        if tokens[start] == NO_TOKEN:
            start += 1
            continue
        stop = next((slot for slot in range(start, end) if tokens[slot] == NO_TOKEN), end)
        positions = cache.positions[start:stop]
        exact = cache.exact_length >= start and positions.tolist() == list(range(start, stop))
        with cache.overwriting(start, positions):
            backbone.forward(tokens[start:stop], cache, positions)
        if exact:
            cache.mark_exact(stop)
        recomputed += stop - start
        start = stop
    return recomputed


def recompute_scattered(
    backbone: Backbone, cache: EditableCache, tokens: Sequence[int], start: int, slots: Sequence[int]
) -> None:
    """Recompute in place, in one pass, the tokens in `slots` (increasing, from `start` on).

    Each attends to all slots before it; the other slots keep their states.

    Args:
        tokens: the token id in every slot.
    """
    if not slots:
        return
    chosen, positions = torch.tensor(slots), cache.positions[list(slots)]
    # Slots recomputed directly after the exact ones are exact too.
    run = next((place for place, slot in enumerate(slots) if slot != start + place), len(slots))
    exact = cache.exact_length >= start and positions[:run].tolist() == list(range(start, start + run))
    with cache.overwriting_scattered(start, chosen):
        backbone.forward(
            [tokens[slot] for slot in slots],
            cache,
            positions,
            attention_mask=backbone.attention_mask(torch.arange(cache.length)[None, :] <= chosen[:, None]),
        )
    if exact:
        cache.mark_exact(start + run)


def check_widths(name: str, window: int | None, per_span: float | None, overlap: float | None = None) -> None:
    """Check counts of suffix tokens; None is an open parameter.

    Raises:
        MethodError: naming the parameter and its value.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise MethodError(f"{name}: window is {window!r}, but it must be at least 1 token; without a window use shift")
    for key, share in (("per_span", per_span), ("overlap", overlap)):
        if share is not None and (type(share) not in (int, float) or not 0 <= share < inf):
            raise MethodError(f"{name}: {key} is {share!r}, but it must be tokens per token of the span, at least 0")
