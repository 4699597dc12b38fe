"""`follow`: shift, then recompute the first suffix tokens and those that repeat the span's words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.methods.base import Method, check_widths, recompute_scattered
from kveraser.methods.overlap import most_contaminated
from kveraser.methods.shift import Shift
from kveraser.methods.slots import Edit, SlotEdit, slot_edits, slot_tokens, slots_of
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Follow(Method):
    """Shift, then recompute the first suffix tokens and later ones that repeat the span's words.

    The first `window + per_span x span` suffix tokens are recomputed, and `overlap x span` of those that repeat the
    span's tokens. With `overlap=0` this is `repair`; with the defaults it runs span + 32 tokens. Several edits of one
    call run in one pass.
    """

    window: int = 32
    per_span: float = 0.25
    overlap: float = 0.75

    name = "follow"
    summary = "shift, then recompute the first suffix tokens and those that repeat the span's words"
    cost = "window + (per_span + overlap) x span tokens; suffix keys are moved"
    source = "this project"
    moves_keys = True

    def __post_init__(self) -> None:
        check_widths(self.name, self.window, self.per_span, self.overlap)

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self._apply(backbone, cache, tokens, [SlotEdit(span)])

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        return self._apply(backbone, cache, tokens, [SlotEdit(span, inserted)])

    def edit(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], edits: Sequence[Edit]) -> int:
        return self._apply(backbone, cache, tokens, slot_edits(cache, edits))

    def _apply(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], edits: Sequence[SlotEdit]) -> int:
        """Shift for every edit, then run the inserted tokens and the chosen ones of all edits in one pass."""
        if not edits:
            return 0
        chosen = self._choose(cache, tokens, edits)
        moved = 0
        for edit in edits:
            place = type(edit.span)(edit.span.start + moved, edit.span.end + moved)
            Shift.move(backbone, cache, place, edit.inserted)
            moved += len(edit.inserted) - len(edit.span)
        slots = slots_of(cache, chosen.union(*(edit.inserted for edit in edits)))
        recompute_scattered(backbone, cache, slot_tokens(cache, tokens), edits[0].span.start, slots)
        return len(slots)

    def _choose(self, cache: EditableCache, tokens: Sequence[int], edits: Sequence[SlotEdit]) -> set[int]:
        """Tokens to recompute, by their indices in the text; none of them is erased by another edit."""
        held, ids = cache.slot_to_token.tolist(), slot_tokens(cache, tokens)
        kept = list(ids)
        for edit in edits:
            kept[edit.span.start : edit.span.end] = [NO_TOKEN] * len(edit.span)
        chosen: set[int] = set()
        for edit in edits:
            span, new = edit.span, [tokens[index] for index in edit.inserted]
            visible = [*kept[: span.start], *ids[span.start : span.end], *kept[span.end :]]
            widths = self.widths(max(len(span), len(new)))
            chosen.update(held[slot] for slot in most_contaminated(visible, span, *widths, new))
        return chosen

    def resolve(self, backbone: Backbone) -> Self:
        # Some attention implementations don't take the mask of scattered tokens: refused before the pass.
        _ = backbone.attention_mask(torch.ones(1, 1, dtype=torch.bool))
        return super().resolve(backbone)

    def widths(self, span: int) -> tuple[int, int]:
        """Suffix tokens recomputed after a span of `span` tokens: the first ones, and those that repeat its tokens."""
        return self.window + round(self.per_span * span), round(self.overlap * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(sum(self.widths(span)), suffix)
