"""`kveraser` and `kveraser+repair`: learned steering states in the span's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch
from transformers.cache_utils import DynamicCache

from kveraser.cache.editable import EditableCache, KeyValue
from kveraser.cache.probe import concat_kv
from kveraser.errors import MethodError
from kveraser.methods.base import Method, check_widths, clear_tokens, close_gap, recompute_window
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.steering.layouts import LAYOUTS, unknown_layout
from kveraser.text.spans import Span

DEFAULT_WINDOW = 16
"""The repair window of an eraser trained without one."""


@dataclass(frozen=True)
class KVEraser(Method):
    """Overwrite the span with steering states, computed by the backbone with its eraser on (section 3 of the paper).

    The eraser never sees a question, so one erase serves all later ones.

    Attributes:
        layout: a name in `LAYOUTS`; None: as the eraser was trained.
    """

    layout: str | None = None

    name = "kveraser"
    summary = "learned steering states in place of the span"
    cost = "span tokens; layout compact: its slots"
    source = "arXiv:2606.17034"
    needs_eraser = True

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise MethodError(f"{self.name}: {unknown_layout(self.layout)}")

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        """The new tokens run in the span's first slots, with the eraser off; the others are steered."""
        layout = LAYOUTS[self.resolve(backbone).layout or "keep"]
        count = len(inserted)
        if count > len(span) or (count and layout.moves_suffix):
            raise MethodError(
                f"{self.name} can put {count} tokens in the place of {len(span)} only by layout keep, and no more than "
                "it erases: use follow or recompute"
            )
        if count:
            cache.set_tokens(span.start, inserted)
            recompute_window(backbone, cache, slot_tokens(cache, tokens), span.start, count)
            if count == len(span):
                return count
            span = Span(span.start + count, span.end)
        store = CacheStore(backbone, cache, slot_tokens(cache, tokens), span)
        layout.write(store, backbone.require_eraser().extras)
        return count + store.states

    def resolve(self, backbone: Backbone) -> KVEraser:
        trained = backbone.require_eraser().settings
        layout = self.layout or trained.layout
        if layout != trained.layout and (LAYOUTS[layout].takes_slots or LAYOUTS[trained.layout].takes_slots):
            raise MethodError(
                f"{self.name}: the loaded eraser was trained for layout {trained.layout}, and can't be used for "
                f"{layout}: leave the layout out"
            )
        if LAYOUTS[layout].moves_suffix:
            # Raises where the backbone's positions can't be moved.
            _ = backbone.rotation
        return replace(self, layout=layout)

    @property
    def changes_only_span(self) -> bool:
        return self.layout == "keep"

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span


@dataclass(frozen=True)
class KVEraserRepair(Method):
    """`kveraser`, then recompute the first suffix tokens, which attend to prefix and steering states.

    Attributes:
        window, per_span: tokens to recompute, and more for every token of the span; None: as it was trained.
    """

    window: int | None = None
    layout: str | None = None
    per_span: float | None = None

    name = "kveraser+repair"
    summary = "steering states, then recompute the first suffix tokens"
    cost = "span + window + per_span x span tokens"
    source = "this project"
    needs_eraser = True

    def __post_init__(self) -> None:
        KVEraser(self.layout)
        check_widths(self.name, self.window, self.per_span)

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        resolved, suffix = self.resolve(backbone), cache.length - span.end
        steered = KVEraser(resolved.layout)(backbone, cache, tokens, span)
        ids, start = slot_tokens(cache, tokens), cache.length - suffix
        return steered + recompute_window(backbone, cache, ids, start, resolved.width(len(span)))

    def resolve(self, backbone: Backbone) -> KVEraserRepair:
        trained = backbone.require_eraser().settings
        layout = KVEraser(self.layout).resolve(backbone).layout
        window = self.window or trained.repair or DEFAULT_WINDOW
        share = trained.repair_per_span if self.window is None else 0.0
        return replace(self, layout=layout, window=window, per_span=share if self.per_span is None else self.per_span)

    def width(self, span: int) -> int:
        """Suffix tokens recomputed after a span of `span` tokens, once resolved."""
        return (self.window or DEFAULT_WINDOW) + round((self.per_span or 0.0) * span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span + min(self.width(span), suffix)


class CacheStore:
    """A live cache as a layout's store. See `kveraser.steering.layouts.Store`, whose methods these are.

    Args:
        ids: the token id in every slot.

    Attributes:
        states: steering states written so far, which are the tokens run.
    """

    def __init__(self, backbone: Backbone, cache: EditableCache, ids: Sequence[int], span: Span) -> None:
        self.backbone, self.cache, self.ids, self.span = backbone, cache, ids, span
        self.span_positions = cache.positions[span.start : span.end]
        self.states = 0

    def run_span(self, positions: torch.Tensor) -> None:
        """No copy of the cache is made."""
        start, end = self.span.start, self.span.end
        with self.backbone.erasing(), self.cache.overwriting(start, positions):
            self.backbone.forward(self.ids[start:end], self.cache, positions)
        clear_tokens(self.cache, self.span)
        self.states = len(self.span)

    def run_slots(self, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
        """Reads a temporary copy of prefix and span, since the slots that it writes are the span's own."""
        start, end, count = self.span.start, self.span.end, len(positions)
        with torch.no_grad():
            before = concat_kv(self.cache.read(0, end))
            states = run_eraser(self.backbone, before, positions, embeddings=embeddings)
        with self.cache.overwriting(start, positions):
            for layer, (keys, values) in enumerate(states):
                self.cache.update(keys, values, layer)
        clear_tokens(self.cache, Span(start, start + count))
        self.cache.drop(start + count, end)
        self.states = count

    def close_gap(self) -> None:
        close_gap(self.backbone, self.cache, self.span.start + self.states, ceil(float(self.span_positions[0])))


def run_eraser(
    backbone: Backbone,
    cache: DynamicCache,
    positions: torch.Tensor,
    tokens: Sequence[Sequence[int]] | None = None,
    embeddings: torch.Tensor | None = None,
) -> list[KeyValue]:
    """The steering states of one pass with the eraser on, out of place and differentiable.

    Args:
        cache: what the pass attends to, a row a case; the new states are appended to it.
        positions: of the steering states, float64 `[states]`.
        tokens: token ids, a row a case; or
        embeddings: `[states, hidden]`, the same for all rows.

    Returns:
        One `(keys, values)` a layer, `[batch, kv_heads, states, head_dim]`.
    """
    count = positions.shape[-1]
    rows = cache.layers[0].keys.shape[0]  # type: ignore[union-attr]
    if embeddings is not None:
        embeddings = embeddings.to(backbone.model.dtype).expand(rows, -1, -1)
    with backbone.erasing():
        backbone.model.base_model(
            input_ids=None if tokens is None else torch.tensor(tokens, device=backbone.device),
            inputs_embeds=embeddings,
            position_ids=backbone.position_ids(positions),
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys[:, :, -count:], layer.values[:, :, -count:]) for layer in cache.layers]  # type: ignore[index, union-attr]
