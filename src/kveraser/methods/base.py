"""The contract that every erasing method keeps, and the steps that several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil, inf
from typing import Any, ClassVar

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import MethodError
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span

NOT_LIVE = -1
"""Stands for a slot that holds no token of the text: steering states, blanked values, a method's own words."""

LONG_VALUE = 24


@dataclass(frozen=True)
class Erased:
    """What an erase left behind: all that anything downstream needs to know of it.

    Attributes:
        cache: the edited cache; every slot in it is visible, at the position in `cache.positions`.
        next_position: where the next token goes.
        slots: for every slot of the edited cache, the slot that held the same live token before, or `NOT_LIVE`.
        recomputed: tokens that were run through the backbone.
        exact: the cache equals a fresh prefill of the live tokens. Read off the cache's own ledger, not claimed.
    """

    cache: EditableCache
    next_position: int
    slots: tuple[int, ...]
    recomputed: int
    exact: bool


class Method(ABC):
    """One way of erasing: a frozen dataclass whose fields are its parameters.

    Calling it edits the cache in place, inside `with cache.edit():`, so that whatever goes wrong is undone.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    cost: ClassVar[str]
    source: ClassVar[str]
    needs_eraser: ClassVar[bool] = False
    moves_keys: ClassVar[bool] = False
    removes_text: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        """Erase `span` from `cache`.

        Args:
            backbone: the model that filled the cache.
            cache: the cache to edit in place; its edit is open.
            tokens: the token id in every slot of the cache, `NOT_LIVE` where there is none.
            span: the slots to erase, all live.

        Raises:
            KVEraserError: the method can't serve this backbone or cache; the open edit then restores every bit.
        """

    @abstractmethod
    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        """Tokens it will run through the backbone, by which methods are ordered from cheap to dear."""

    def settled(self, backbone: Backbone) -> Method:
        """The method with open parameters filled in for `backbone`, and its one-time measurements made.

        Raises:
            EraserError: it needs an eraser and none is loaded.
            RotationError: it moves keys, and the backbone's can't be moved.
        """
        if self.moves_keys:
            # Measured once a backbone, and no part of what an erase costs.
            _ = backbone.rotation
        return self

    @property
    def changes_only_span(self) -> bool:
        """Whether every bit outside the span's slots stays as it is, as shared, paged or quantized caches need."""
        return False

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, Any]:
        """The parameters by name, without open ones."""
        return {name: value for name, value in self.parameters.items() if value is not None}

    def __str__(self) -> str:
        """The name and the parameters, as `make_method` reads them; open ones and long texts are left out."""
        shown = [f"{name}={value!r}" for name, value in self.given.items() if len(repr(value)) < LONG_VALUE]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def result(cache: EditableCache, slots: Sequence[int], recomputed: int) -> Erased:
    """Close an erase: read next position and exactness off the cache."""
    assert len(slots) == cache.length
    return Erased(cache, cache.next_position, tuple(slots), recomputed, cache.exact_length == cache.length)


def without(length: int, span: Span) -> list[int]:
    """Slots of a cache of `length` slots that remain when the span's are dropped."""
    return [*range(span.start), *range(span.end, length)]


def silenced(length: int, span: Span) -> list[int]:
    """Slots of a cache of `length` slots when the span's stay but hold no live token any more."""
    return [*range(span.start), *[NOT_LIVE] * len(span), *range(span.end, length)]


def close_gap(backbone: Backbone, cache: EditableCache, start: int, position: int) -> None:
    """Move the slots from `start` on so that the first of them comes to `position`; keys are re-rotated, values stay.

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
    """Run the live tokens among the `window` slots from `start` on again, in place, each seeing all that lies before.

    Args:
        tokens: the token id in every slot of the cache as it is now.

    Returns:
        Tokens run. Slots without a live token keep their states.
    """
    end = min(start + window, cache.length)
    recomputed = 0
    while start < end:
        if tokens[start] == NOT_LIVE:
            start += 1
            continue
        stop = next((slot for slot in range(start, end) if tokens[slot] == NOT_LIVE), end)
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
    """Run the live tokens in `slots` (increasing, from `start` on) again in one pass, in place.

    Each sees all that lies before it; the others keep their states.
    """
    if not slots:
        return
    chosen, positions = torch.tensor(slots), cache.positions[list(slots)]
    # Those that follow the exact slots without a gap become exact.
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


def check_widths(name: str, window: int | None, per_span: float | None, echoes: float | None = None) -> None:
    """Refuse counts of suffix tokens that no method can run; None is open.

    Raises:
        MethodError: naming the parameter and its value.
    """
    if window is not None and (type(window) is not int or window < 1):
        raise MethodError(f"{name}: window is {window!r}, but it is a count of tokens from 1 on; or use shift")
    for key, share in (("per_span", per_span), ("echoes", echoes)):
        if share is not None and (type(share) not in (int, float) or not 0 <= share < inf):
            raise MethodError(f"{name}: {key} is {share!r}, but it is tokens per token of the span, from 0 on")
