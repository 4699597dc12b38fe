"""`recompute`: the exact erase. Prefill the suffix again on the prefix's states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.methods.base import Method
from kveraser.methods.slots import Edit, SlotEdit, slot_edits
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
        return self._apply(backbone, cache, tokens, [SlotEdit(span)])

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        return self._apply(backbone, cache, tokens, [SlotEdit(span, inserted)])

    def edit(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], edits: Sequence[Edit]) -> int:
        return self._apply(backbone, cache, tokens, slot_edits(cache, edits))

    @staticmethod
    def _apply(backbone: Backbone, cache: EditableCache, tokens: Sequence[int], edits: Sequence[SlotEdit]) -> int:
        if not edits:
            return 0
        start = min(edits[0].span.start, cache.exact_length)
        held, order, end = cache.slot_to_token.tolist(), list[int](), start
        for edit in edits:
            order += [*held[end : edit.span.start], *edit.inserted]
            end = edit.span.end
        order += held[end:]
        kept = [(index, tokens[index]) for index in order if index != NO_TOKEN and tokens[index] != NO_TOKEN]
        cache.truncate(start)
        # Slots before `start` are exact, so slot and position agree there.
        cache.set_next_position(start)
        backbone.extend(cache, [token for _, token in kept])
        cache.set_tokens(start, [index for index, _ in kept])
        return len(kept)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return suffix
