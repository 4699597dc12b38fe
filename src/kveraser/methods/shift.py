"""`shift`: drop the span's states and move the suffix up against the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method, close_gap
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

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        position = ceil(float(cache.positions[span.start]))
        cache.drop(span.start, span.end)
        close_gap(backbone, cache, span.start, position)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
