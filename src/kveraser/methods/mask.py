"""`mask`: drop the span's states and let everything else stand where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Mask(Method):
    """Drop the span's states and keep all positions, which leaves a position gap.

    The suffix states still carry what they took from the span. Slots are dropped rather than masked: attention gives
    the same result, and decoding needs no mask.
    """

    name = "mask"
    summary = "drop the span's states, keep all positions"
    cost = "0 tokens"
    source = "common practice"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        position = ceil(float(cache.positions[span.start]))
        cache.drop(span.start, span.end)
        if span.start == cache.length:
            # Nothing follows the span: the text ends earlier, without a gap.
            cache.set_next_position(position)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
