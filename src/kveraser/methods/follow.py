"""`follow`: shift, then recompute the first suffix tokens and those that repeat the span's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Erased, Method, check_widths, recompute_scattered, result
from kveraser.methods.overlap import most_contaminated
from kveraser.methods.shift import Shift
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Follow(Method):
    """`repair` that goes where the span's words went: a restatement far behind the seam is computed afresh as well.

    The first `window + per_span x span` suffix tokens, and `echoes x span` of those that repeat it. With no echoes this
    is `repair`; with the defaults it costs the span plus 32 tokens.
    """

    window: int = 32
    per_span: float = 0.25
    echoes: float = 0.75

    name = "follow"
    summary = "shift, then recompute the first suffix tokens and those that repeat the span's words"
    cost = "window + (per_span + echoes) x span tokens; suffix keys are moved"
    source = "this project"
    moves_keys = True

    def __post_init__(self) -> None:
        check_widths(self.name, self.window, self.per_span, self.echoes)

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        window, echoes = self.widths(len(span))
        chosen = [slot - len(span) for slot in most_contaminated(tokens, span, window, echoes)]
        shifted = Shift()(backbone, cache, tokens, span)
        remaining = [tokens[slot] for slot in shifted.slots]
        recompute_scattered(backbone, cache, remaining, span.start, chosen)
        return result(cache, shifted.slots, recomputed=len(chosen))

    def settled(self, backbone: Backbone) -> Method:
        # Refuse before the pass: only some attentions take the mask by which scattered tokens see what precedes them.
        _ = backbone.attention_mask(torch.ones(1, 1, dtype=torch.bool))
        return super().settled(backbone)

    def widths(self, span: int) -> tuple[int, int]:
        """Suffix tokens recomputed after a span of `span` tokens: those next to it, and those that repeat its words."""
        return self.window + round(self.per_span * span), round(self.echoes * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(sum(self.widths(span)), suffix)
