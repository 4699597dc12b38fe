"""`recompute`: the exact erase. Prefill the suffix again on the prefix's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.methods.base import Method, slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Recompute(Method):
    """Prefill the suffix again: the cache then equals a fresh prefill of the text without the span.

    Recomputation starts where the cache stops being exact, so traces of earlier approximate erases are removed too.
    """

    name = "recompute"
    summary = "exact: prefill the suffix again"
    cost = "suffix tokens"
    source = "the exact reference"
    is_reference = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        start = min(span.start, cache.exact_length)
        held = zip(cache.slot_to_token.tolist(), slot_tokens(cache, tokens), strict=True)
        kept = [
            (index, token)
            for slot, (index, token) in enumerate(held)
            if slot >= start and not span.start <= slot < span.end and token != NO_TOKEN
        ]
        cache.truncate(start)
        # Slots before `start` are exact, so slot and position agree there.
        cache.set_next_position(start)
        backbone.extend(cache, [token for _, token in kept])
        cache.set_tokens(start, [index for index, _ in kept])
        return len(kept)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return suffix
