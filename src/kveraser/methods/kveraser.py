"""`kveraser` and `kveraser+repair`: learned steering states in the span's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import MethodError
from kveraser.methods.base import NOT_LIVE, Erased, Method, check_widths, close_gap, recompute_window, result, silenced
from kveraser.model.backbone import Backbone
from kveraser.model.eraser import LAYOUTS, SLOT_EMBEDDINGS, Layout, unknown_layout
from kveraser.steering.states import compact_states, steering_positions
from kveraser.text.spans import Span

DEFAULT_WINDOW = 16
"""The repair window of an eraser that was not trained for one."""


@dataclass(frozen=True)
class KVEraser(Method):
    """Steering states, written by the backbone with its eraser switched on (section 3 of the paper).

    They never see the question, so one erase serves all later ones. Where they sit is the eraser's layout:

    - `keep`, the paper's: one pass over the span's tokens overwrites its slots; prefix and suffix are untouched.
    - `closed`: the same at fractional positions; the suffix keys are re-rotated, so that no position gap is left.
    - `compact`: a fixed number of learned tokens attends to prefix and span, and replaces the span.

    Attributes:
        layout: `keep` or `closed` instead of the other; None: as the eraser was trained.
    """

    layout: Layout | None = None

    name = "kveraser"
    summary = "learned steering states in place of the span"
    cost = "span tokens; layout compact: its slots"
    source = "arXiv:2606.17034"
    needs_eraser = True

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise MethodError(f"{self.name}: {unknown_layout(self.layout)}")

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        settled = self.settled(backbone)
        if settled.layout == "compact":
            return _steer_compact(backbone, cache, span)
        first = ceil(float(cache.positions[span.start]))
        positions = steering_positions(cache.positions[span.start : span.end], settled.layout or "keep")
        with backbone.erasing(), cache.overwriting(span.start, positions):
            backbone.forward(tokens[span.start : span.end], cache, positions)
        if settled.layout == "closed":
            close_gap(backbone, cache, span.end, first)
        return result(cache, silenced(cache.length, span), recomputed=len(span))

    def settled(self, backbone: Backbone) -> KVEraser:
        trained = backbone.require_eraser().settings
        layout = self.layout or trained.layout
        if layout != trained.layout and "compact" in {layout, trained.layout}:
            raise MethodError(
                f"{self.name}: the loaded eraser was trained for layout {trained.layout}, and can't be used for "
                f"{layout}: leave the layout out"
            )
        if layout != "keep":
            # Refuse before the pass: only rotary models can run at these positions.
            _ = backbone.rotation
        return replace(self, layout=layout)

    @property
    def changes_only_span(self) -> bool:
        return self.layout == "keep"

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span


def _steer_compact(backbone: Backbone, cache: EditableCache, span: Span) -> Erased:
    """Put the states of the learned tokens in the span's place, and close the gap.

    The pass reads a temporary copy of prefix and span, since the slots that it writes are the span's own.
    """
    first = ceil(float(cache.positions[span.start]))
    # A span shorter than the slots has no room for all of them.
    count = min(len(backbone.require_eraser().extras[SLOT_EMBEDDINGS]), len(span))
    positions = steering_positions(torch.full((count,), float(first), dtype=torch.float64), "compact")
    with torch.no_grad():
        states = compact_states(backbone, cache.read(0, span.end), positions)
    with cache.overwriting(span.start, positions):
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer)
    slots = [*range(span.start), *[NOT_LIVE] * count, *range(span.end, cache.length)]
    cache.drop(span.start + count, span.end)
    close_gap(backbone, cache, span.start + count, first)
    return result(cache, slots, recomputed=count)


@dataclass(frozen=True)
class KVEraserRepair(Method):
    """`kveraser`, then recompute the first suffix tokens, which attend to prefix and steering states.

    Attributes:
        window, per_span: tokens to recompute, and more for every token of the span; None: as it was trained.
    """

    window: int | None = None
    layout: Layout | None = None
    per_span: float | None = None

    name = "kveraser+repair"
    summary = "steering states, then recompute the first suffix tokens"
    cost = "span + window + per_span x span tokens"
    source = "this project"
    needs_eraser = True

    def __post_init__(self) -> None:
        KVEraser(self.layout)
        check_widths(self.name, self.window, self.per_span)

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        settled = self.settled(backbone)
        steered = KVEraser(settled.layout)(backbone, cache, tokens, span)
        remaining = [NOT_LIVE if slot == NOT_LIVE else tokens[slot] for slot in steered.slots]
        seam = next((place for place, slot in enumerate(steered.slots) if slot >= span.end), cache.length)
        recomputed = recompute_window(backbone, cache, remaining, seam, settled.width(len(span)))
        return result(cache, steered.slots, steered.recomputed + recomputed)

    def settled(self, backbone: Backbone) -> KVEraserRepair:
        trained = backbone.require_eraser().settings
        layout = KVEraser(self.layout).settled(backbone).layout
        window = self.window or trained.repair or DEFAULT_WINDOW
        share = trained.repair_per_span if self.window is None else 0.0
        return replace(self, layout=layout, window=window, per_span=share if self.per_span is None else self.per_span)

    def width(self, span: int) -> int:
        """Suffix tokens recomputed after a span of `span` tokens; settled only."""
        return (self.window or DEFAULT_WINDOW) + round((self.per_span or 0.0) * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span + min(self.width(span), suffix)
