"""`mask`: drop the span's states and let everything else stand where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Erased, Method, result, without
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Mask(Method):
    """The span can no longer be attended to; the suffix keeps what it took from it, behind a hole in the positions.

    Slots are dropped rather than masked: attention computes the same, and decoding needs no mask.
    """

    name = "mask"
    summary = "drop the span's states, keep all positions"
    cost = "0 tokens"
    source = "common practice"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        kept = without(cache.length, span)
        position = ceil(float(cache.positions[span.start]))
        cache.drop(span.start, span.end)
        if span.start == cache.length:
            # Nothing follows the span, so no position has to be kept and the text simply ends earlier.
            cache.set_next_position(position)
        return result(cache, kept, recomputed=0)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
