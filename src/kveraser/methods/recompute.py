"""`recompute`: the exact erase. Prefill the suffix again on the prefix's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.methods.base import Method
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

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        start = min(span.start, cache.exact_length)
        held = cache.slot_to_token.tolist()
        order = [*held[start : span.start], *inserted, *held[span.end :]]
        kept = [(index, tokens[index]) for index in order if index != NO_TOKEN and tokens[index] != NO_TOKEN]
        cache.truncate(start)
        # Slots before `start` are exact, so slot and position agree there.
        cache.set_next_position(start)
        backbone.extend(cache, [token for _, token in kept])
        cache.set_tokens(start, [index for index, _ in kept])
        return len(kept)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return suffix
