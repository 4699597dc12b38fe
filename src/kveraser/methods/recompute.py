"""`recompute`: the exact erase. Prefill the suffix again on the prefix's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import NOT_LIVE, Erased, Method, result
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Recompute(Method):
    """Reference and fallback: afterwards the cache equals a fresh prefill of the text without the span.

    Starts where the cache stops being exact, so that traces of earlier approximate erases go as well.
    """

    name = "recompute"
    summary = "exact: prefill the suffix again"
    cost = "suffix tokens"
    source = "the exact reference"
    is_reference = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        start = min(span.start, cache.exact_length)
        kept = [
            slot
            for slot in range(start, cache.length)
            if not span.start <= slot < span.end and tokens[slot] != NOT_LIVE
        ]
        cache.truncate(start)
        # Slots before `start` are exact, so slot and position agree there.
        cache.set_next_position(start)
        backbone.extend(cache, [tokens[slot] for slot in kept])
        return result(cache, [*range(start), *kept], recomputed=len(kept))

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return suffix
