"""`zero_value`: keep the span's keys and silence what they carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Erased, Method, result, silenced
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class ZeroValue(Method):
    """Attention still goes to the span's slots and finds zeros there, so that no other slot is attended to more."""

    name = "zero_value"
    summary = "keep the span's keys, zero its values"
    cost = "0 tokens"
    source = "LineageKV"

    @property
    def changes_only_span(self) -> bool:
        return True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        cache.zero_values(span.start, span.end)
        return result(cache, silenced(cache.length, span), recomputed=0)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0
