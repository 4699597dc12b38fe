"""Writing steering states: the passes with the eraser switched on, out of place and differentiable, a row a case.

Training learns through them, a layout a function. The methods run the same passes in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from transformers.cache_utils import DynamicCache

from kveraser.backbone import Backbone
from kveraser.cache import KeyValue
from kveraser.eraser import SLOT_EMBEDDINGS, SPAN_BIAS, Layout
from kveraser.scratch_cache import splice
from kveraser.spans import Span


def steering_positions(positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where the steering states of a span at `positions` (`[span]`) sit, float64 `[span]`.

    `keep`: where the span was. `closed` and `compact`: evenly between the last prefix token and the position of the
    span's first token, which the first suffix token will take.
    """
    if layout == "keep":
        return positions
    first = torch.ceil(positions[0])
    return first - 1 + torch.arange(1, len(positions) + 1, dtype=torch.float64) / (len(positions) + 1)


def suffix_mask(visible: torch.Tensor, span: Span, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the steered suffix tokens see, added to attention logits, `[batch, 1, tokens, slots]`.

    Args:
        visible: bool `[tokens, slots]`, or `[batch, tokens, slots]`.
        span: slots that are seen fainter: together they weigh `e^bias` (`[1]`, float32) of one token, so that a long
            span is no more in sight than a short one.
    """
    slots = visible.shape[-1]
    faint = torch.cat(
        [bias.new_zeros(span.start), (bias - log(len(span))).expand(len(span)), bias.new_zeros(slots - span.end)]
    )
    hidden = ~visible.to(bias.device)
    mask = faint.expand(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min).to(dtype)
    return mask.reshape(-1, 1, *visible.shape[-2:])


def span_states(
    backbone: Backbone, prefix: Sequence[KeyValue], tokens: Sequence[Sequence[int]], positions: torch.Tensor
) -> list[KeyValue]:
    """Layouts `keep` and `closed`: the span's tokens, seeing the prefix.

    Args:
        prefix: the prefix's states, one `(keys, values)` a layer, `[batch, kv_heads, prefix, head_dim]`.
        tokens: the span's token ids, a row a case.
        positions: where the steering states sit, `[span]`.

    Returns:
        One `(keys, values)` a layer, `[batch, kv_heads, span, head_dim]`.
    """
    return _run(backbone, splice(prefix), positions, tokens=tokens)


def compact_states(backbone: Backbone, before: Sequence[KeyValue], positions: torch.Tensor) -> list[KeyValue]:
    """Layout `compact`: as many of the learned tokens as there are `positions`, seeing prefix and span.

    Args:
        before: states of prefix and span, one `(keys, values)` a layer, `[batch, kv_heads, prefix + span, head_dim]`.

    Returns:
        One `(keys, values)` a layer, `[batch, kv_heads, positions, head_dim]`.
    """
    embeddings = backbone.require_eraser().extras[SLOT_EMBEDDINGS][: len(positions)].to(backbone.model.dtype)
    rows = embeddings.expand(before[0][0].shape[0], -1, -1)
    return _run(backbone, splice(before), positions, embeddings=rows)


def suffix_states(
    backbone: Backbone,
    before: Sequence[KeyValue],
    rest: Sequence[KeyValue],
    span: Span,
    tokens: Sequence[Sequence[int]],
    places: torch.Tensor,
    others: torch.Tensor,
) -> list[KeyValue]:
    """Layout `suffix`: some of the suffix's tokens, seeing what stands before them, and the span faintly.

    Args:
        before: states of prefix and span, one `(keys, values)` a layer, `[batch, kv_heads, prefix + span, head_dim]`.
        rest: states of the suffix tokens that are not steered, in the closed gap, `[batch, kv_heads, rest, head_dim]`.
        span: slots of the span, the last of `before`.
        tokens: the suffix tokens to steer, a row a case.
        places: of them in the suffix, increasing, int64 `[batch, steered]`; `others`: those of `rest`, `[batch, rest]`.

    Returns:
        One `(keys, values)` a layer, `[batch, kv_heads, steered, head_dim]`.
    """
    batch, steered = places.shape
    # What stands behind the last steered token of every case is seen by none.
    seen = int((others < places[:, -1:]).sum(dim=1).max()) if others.numel() else 0
    earlier = others[:, None, :seen] < places[:, :, None]
    always = torch.ones(batch, steered, span.end, dtype=torch.bool)
    among = torch.ones(steered, steered, dtype=torch.bool).tril().expand(batch, -1, -1)
    bias = backbone.require_eraser().extras[SPAN_BIAS]
    mask = suffix_mask(torch.cat([always, earlier, among], dim=2), span, bias, backbone.model.dtype)
    cache = splice(before, [(keys[:, :, :seen], values[:, :, :seen]) for keys, values in rest])
    return _run(backbone, cache, (span.start + places).double(), tokens=tokens, mask=mask)


def _run(
    backbone: Backbone,
    cache: DynamicCache,
    positions: torch.Tensor,
    tokens: Sequence[Sequence[int]] | None = None,
    embeddings: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> list[KeyValue]:
    with backbone.erasing():
        backbone.model.base_model(
            input_ids=None if tokens is None else torch.tensor(tokens, device=backbone.device),
            inputs_embeds=embeddings,
            position_ids=backbone.position_ids(positions),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
    new = positions.shape[-1]
    return [(layer.keys[:, :, -new:], layer.values[:, :, -new:]) for layer in cache.layers]  # type: ignore[index, union-attr]
