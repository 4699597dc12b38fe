"""`kveraser` and `kveraser+repair`: learned steering states, in the span's slots or in those behind the seam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache
from kveraser.echoes import most_contaminated, widths
from kveraser.eraser import LAYOUTS, SLOT_EMBEDDINGS, SPAN_BIAS, Layout
from kveraser.errors import EraserError, MethodError
from kveraser.methods.base import (
    NOT_LIVE,
    Erased,
    Method,
    check_widths,
    close_gap,
    recompute_window,
    result,
    silenced,
    without,
)
from kveraser.spans import Span
from kveraser.steering import compact_states, steering_positions, suffix_mask

DEFAULT_WINDOW = 16
"""The repair window of an eraser that was not trained for one."""


@dataclass(frozen=True)
class KVEraser(Method):
    """Steering states, written by the backbone with its eraser switched on (section 3 of the paper).

    They never see the question, so one erase serves all later ones. Where they sit is the eraser's layout:

    - `keep`, the paper's: one pass over the span's tokens overwrites its slots; prefix and suffix are untouched.
    - `closed`: the same at fractional positions; the suffix keys are re-rotated against the prefix, so that the text
      reads on without a hole.
    - `compact`: a fixed number of learned tokens sees prefix and span, and takes the span's place.
    - `suffix`: the span's slots are given back; the suffix tokens that `follow` would compute afresh are run again with
      the eraser on, seeing the span faintly, and become the steering states. With nothing learnt and nothing seen this
      is `follow`.

    Attributes:
        layout: `keep` or `closed` instead of the other; None: as the eraser was trained.
        window, per_span, echoes: of `suffix`: tokens to steer behind the seam, more for every token of the span, and
            tokens that repeat it for every token of the span; None: as it was trained.
    """

    layout: Layout | None = None
    window: int | None = None
    per_span: float | None = None
    echoes: float | None = None

    name = "kveraser"
    summary = "learned steering states in place of the span"
    cost = "span tokens; layout suffix: window + (per_span + echoes) x span"
    source = "arXiv:2606.17034"
    needs_eraser = True

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise MethodError(f"{self.name}: layout is {self.layout!r}, but it is one of {', '.join(LAYOUTS)}")
        check_widths(self.name, self.window, self.per_span, self.echoes)

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        settled = self.settled(backbone)
        if settled.layout == "suffix":
            return _steer_suffix(backbone, cache, tokens, span, *settled.widths(len(span)))
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
        if layout != trained.layout and {layout, trained.layout} & {"compact", "suffix"}:
            raise MethodError(
                f"{self.name}: the loaded eraser was trained for layout {trained.layout}, and can't be used for "
                f"{layout}: leave the layout out"
            )
        if layout == "suffix":
            # Refuse before the pass: only some attentions take the mask by which the suffix sees the span.
            _ = backbone.attention_mask(torch.ones(1, 1, dtype=torch.bool))
        if layout != "keep":
            # The same: only rotary models can run at these positions.
            _ = backbone.rotation
        if layout != "suffix":
            if (self.window, self.per_span, self.echoes) != (None, None, None):
                raise MethodError(
                    f"{self.name}: window, per_span and echoes are of layout suffix, and the loaded eraser's is "
                    f"{layout}: leave them out, or use kveraser+repair"
                )
            return replace(self, layout=layout)
        # A window of the user's own is what it says.
        per_span, echoes = (trained.repair_per_span, trained.echoes) if self.window is None else (0.0, 0.0)
        return replace(
            self,
            layout=layout,
            window=trained.repair if self.window is None else self.window,
            per_span=per_span if self.per_span is None else self.per_span,
            echoes=echoes if self.echoes is None else self.echoes,
        )

    def widths(self, span: int) -> tuple[int, int]:
        """Tokens that `suffix` steers after a span of `span` tokens: behind the seam, and echoes. Settled only."""
        return widths(span, self.window or 0, self.per_span or 0.0, self.echoes or 0.0)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(sum(self.widths(span)), suffix) if self.layout == "suffix" else span


def _steer_suffix(
    backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, window: int, echoes: int
) -> Erased:
    """Close the gap, run the most contaminated suffix tokens with the eraser on, then give the span's slots back."""
    bias = backbone.require_eraser().extras[SPAN_BIAS]
    chosen = most_contaminated(tokens, span, window, echoes)
    close_gap(backbone, cache, span.end, ceil(float(cache.positions[span.start])))
    if chosen:
        slots = torch.tensor(chosen)
        visible = torch.arange(cache.length)[None, :] <= slots[:, None]
        mask = suffix_mask(visible, span, bias.detach(), backbone.model.dtype)
        with backbone.erasing(), cache.overwriting_scattered(span.end, slots):
            backbone.forward([tokens[slot] for slot in chosen], cache, cache.positions[slots], mask)
    kept = without(cache.length, span)
    cache.drop(span.start, span.end)
    return result(cache, kept, recomputed=len(chosen))


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
    """`kveraser`, then the first suffix tokens are computed afresh on prefix and steering states.

    Attributes:
        window, per_span: tokens to compute afresh, and more for every token of the span; None: as it was trained.
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
        if layout == "suffix":
            raise EraserError(
                f"{self.name}: the loaded eraser steers the suffix tokens that a repair would compute: use kveraser"
            )
        window = self.window or trained.repair or DEFAULT_WINDOW
        share = trained.repair_per_span if self.window is None else 0.0
        return replace(self, layout=layout, window=window, per_span=share if self.per_span is None else self.per_span)

    def width(self, span: int) -> int:
        """Suffix tokens computed afresh after a span of `span` tokens; settled only."""
        return widths(span, self.window or DEFAULT_WINDOW, self.per_span or 0.0)[0]

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span + min(self.width(span), suffix)
