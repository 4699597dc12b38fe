"""`shift`: drop the span's states and move the suffix up against the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method, close_gap, open_slots, position_of, recompute_window
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Shift(Method):
    """Drop the span's states and re-rotate the suffix keys by minus the span's length; suffix values are unchanged."""

    name = "shift"
    summary = "drop the span's states, re-rotate the suffix keys into the gap"
    cost = "0 tokens; suffix keys are moved"
    source = "llama.cpp seq_rm + seq_add, https://github.com/ggml-org/llama.cpp"
    moves_keys = True

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        self.move(backbone, cache, span, inserted)
        if not inserted:
            return 0
        return recompute_window(backbone, cache, slot_tokens(cache, tokens), span.start, len(inserted))

    @staticmethod
    def move(backbone: Backbone, cache: EditableCache, span: Span, inserted: Sequence[int]) -> None:
        """Drop the span's slots, make slots for the inserted tokens, and move the suffix by the difference."""
        position = position_of(cache, span.start)
        cache.drop(span.start, span.end)
        close_gap(backbone, cache, span.start, position + len(inserted))
        open_slots(cache, span.start, position, inserted)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
