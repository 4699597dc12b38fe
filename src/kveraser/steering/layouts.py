"""Layouts of steering states: how many an erase writes, where they sit, and what they are computed from.

A layout runs the same code in place and in training; the two differ in the `Store` that it writes to. A new layout is a
class and a line in `LAYOUTS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch

SLOT_EMBEDDINGS = "slot_embeddings"


class Store(Protocol):
    """The states of prefix, span and suffix that a layout edits: a live cache, or spliced states with gradients."""

    @property
    def span_positions(self) -> torch.Tensor:
        """Positions of the span's tokens, float64 `[span]`."""

    def run_span(self, positions: torch.Tensor) -> None:
        """Overwrite the span's states: its tokens run with the eraser on, at `positions`, and attend to the prefix."""

    def run_slots(self, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
        """Replace the span's states by those of `embeddings` `[slots, hidden]`, which attend to prefix and span."""

    def close_gap(self) -> None:
        """Re-rotate the suffix keys so that the suffix begins at the position of the span's first token."""


class Layout(ABC):
    """Where steering states sit.

    Attributes:
        moves_suffix: the suffix keys are re-rotated, which needs rotary positions.
        takes_slots: `EraserSettings.slots` says how many states it writes.
    """

    name: ClassVar[str]
    moves_suffix: ClassVar[bool] = False
    takes_slots: ClassVar[bool] = False

    def states(self, span: float, slots: int) -> float:
        """Steering states for a span of `span` tokens."""
        return min(slots, span) if self.takes_slots else span

    def attended(self, prefix: float, span: float) -> float:
        """Slots that a steering state attends to beside other steering states."""
        return prefix + span if self.takes_slots else prefix

    def extras(self, slots: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that are trained beside the LoRA, by name."""
        return {SLOT_EMBEDDINGS: (slots, hidden)} if self.takes_slots else {}

    @abstractmethod
    def write(self, store: Store, extras: Mapping[str, torch.Tensor]) -> None:
        """Put the steering states in the span's place.

        Args:
            extras: the parameters that `extras()` names.
        """


class Keep(Layout):
    """The paper's: the span's tokens run again in the span's slots, at its positions. Nothing else changes."""

    name = "keep"

    def write(self, store: Store, extras: Mapping[str, torch.Tensor]) -> None:
        store.run_span(store.span_positions)


class Closed(Layout):
    """The same at fractional positions before the suffix, whose keys are re-rotated: no position gap is left."""

    name = "closed"
    moves_suffix = True

    def write(self, store: Store, extras: Mapping[str, torch.Tensor]) -> None:
        positions = store.span_positions
        store.run_span(between(positions[0], len(positions)))
        store.close_gap()


class Compact(Layout):
    """A fixed number of trained embeddings attend to prefix and span and replace the span; the gap is closed."""

    name = "compact"
    moves_suffix = True
    takes_slots = True

    def write(self, store: Store, extras: Mapping[str, torch.Tensor]) -> None:
        positions = store.span_positions
        # A span shorter than the slots has no space for all of them.
        embeddings = extras[SLOT_EMBEDDINGS][: len(positions)]
        store.run_slots(embeddings, between(positions[0], len(embeddings)))
        store.close_gap()


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Keep(), Closed(), Compact())}


def between(first: torch.Tensor, count: int) -> torch.Tensor:
    """`count` positions evenly between the last prefix token and `first`, the suffix's new start; float64 `[count]`."""
    return torch.ceil(first) - 1 + torch.arange(1, count + 1, dtype=torch.float64) / (count + 1)


def unknown_layout(layout: object) -> str:
    """The error message for a layout that is not in `LAYOUTS`."""
    if layout == "suffix":
        return "layout suffix was removed, because it equaled the method follow: use follow, or train with layout keep"
    return f"layout is {layout!r}, but it is one of {', '.join(LAYOUTS)}"
