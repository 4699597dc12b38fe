"""`zero_value`: keep the span's keys and silence what they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method, clear_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class ZeroValue(Method):
    """Keep the span's keys and zero its values: attention to its slots adds nothing, and no other slot gains weight."""

    name = "zero_value"
    summary = "keep the span's keys, zero its values"
    cost = "0 tokens"
    source = "LineageKV"

    @property
    def changes_only_span(self) -> bool:
        return True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        cache.zero_values(span.start, span.end)
        clear_tokens(cache, span)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
