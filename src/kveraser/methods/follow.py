"""`follow`: shift, then recompute the first suffix tokens and those that repeat the span's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method, check_widths, recompute_scattered, slot_tokens
from kveraser.methods.overlap import most_contaminated
from kveraser.methods.shift import Shift
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Follow(Method):
    """Shift, then recompute the first suffix tokens and later ones that repeat the span's words.

    The first `window + per_span x span` suffix tokens are recomputed, and `overlap x span` of those that repeat the
    span's tokens. With `overlap=0` this is `repair`; with the defaults it runs span + 32 tokens.
    """

    window: int = 32
    per_span: float = 0.25
    overlap: float = 0.75

    name = "follow"
    summary = "shift, then recompute the first suffix tokens and those that repeat the span's words"
    cost = "window + (per_span + overlap) x span tokens; suffix keys are moved"
    source = "this project"
    moves_keys = True

    def __post_init__(self) -> None:
        check_widths(self.name, self.window, self.per_span, self.overlap)

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        ids, new = slot_tokens(cache, tokens), [tokens[index] for index in inserted]
        widths = self.widths(max(len(span), len(inserted)))
        moved = len(inserted) - len(span)
        chosen = [slot + moved for slot in most_contaminated(ids, span, *widths, new)]
        shifted = Shift().replace(backbone, cache, tokens, span, inserted)
        recompute_scattered(backbone, cache, slot_tokens(cache, tokens), span.start + len(inserted), chosen)
        return shifted + len(chosen)

    def resolve(self, backbone: Backbone) -> Self:
        # Some attention implementations don't take the mask of scattered tokens: refused before the pass.
        _ = backbone.attention_mask(torch.ones(1, 1, dtype=torch.bool))
        return super().resolve(backbone)

    def widths(self, span: int) -> tuple[int, int]:
        """Suffix tokens recomputed after a span of `span` tokens: the first ones, and those that repeat its tokens."""
        return self.window + round(self.per_span * span), round(self.overlap * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(sum(self.widths(span)), suffix)
