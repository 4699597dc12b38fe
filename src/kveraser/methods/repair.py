"""`repair`: shift, then prefill the first suffix tokens again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import EditableCache
from kveraser.methods.base import Method, check_widths, recompute_window
from kveraser.methods.shift import Shift
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Repair(Method):
    """Recompute the suffix tokens next to the span, which attended to it most.

    Attributes:
        window: tokens to recompute.
        per_span: more of them for every token of the span.
    """

    window: int = 32
    per_span: float = 0.0

    name = "repair"
    summary = "shift, then recompute the first suffix tokens"
    cost = "window + per_span x span tokens; suffix keys are moved"
    source = "arXiv:2609.17983"
    moves_keys = True

    def __post_init__(self) -> None:
        check_widths(self.name, self.window, self.per_span)

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        shifted = Shift().replace(backbone, cache, tokens, span, inserted)
        ids, start = slot_tokens(cache, tokens), span.start + len(inserted)
        return shifted + recompute_window(backbone, cache, ids, start, self.width(max(len(span), len(inserted))))

    def width(self, span: int) -> int:
        """Suffix tokens that are recomputed after a span of `span` tokens."""
        return self.window + round(self.per_span * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(self.width(span), suffix)
