"""Writing steering states: the passes with the eraser switched on, out of place and differentiable, a row a case.

Training learns through them, a layout a function. The methods run the same passes in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from kveraser.backbone import Backbone
from kveraser.cache import KeyValue
from kveraser.eraser import SLOT_EMBEDDINGS, SPAN_BIAS, Layout
from kveraser.scratch_cache import splice


def steering_positions(positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where the steering states of a span at `positions` (`[span]`) sit, float64 `[span]`.

    `keep`: where the span was. `closed` and `compact`: evenly between the last prefix token and the position of the
    span's first token, which the first suffix token will take.
    """
    if layout == "keep":
        return positions
    first = torch.ceil(positions[0])
    return first - 1 + torch.arange(1, len(positions) + 1, dtype=torch.float64) / (len(positions) + 1)


def suffix_mask(prefix: int, span: int, window: int, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the steered suffix tokens see, added to attention logits, `[1, 1, window, prefix + span + window]`.

    The prefix and each other as always, the erased span by `bias` (`[1]`, float32) fainter.
    """
    seen = torch.cat([bias.new_zeros(prefix), bias.expand(span), bias.new_zeros(window)])
    later = torch.ones(window, window, dtype=torch.bool, device=bias.device).triu(1)
    hidden = torch.nn.functional.pad(later, (prefix + span, 0))
    return seen.expand(window, -1).masked_fill(hidden, torch.finfo(dtype).min)[None, None].to(dtype)


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
    backbone: Backbone, before: Sequence[KeyValue], span: int, tokens: Sequence[Sequence[int]], position: int
) -> list[KeyValue]:
    """Layout `suffix`: the first suffix tokens, seeing the prefix, each other, and faintly the span.

    Args:
        before: states of prefix and span, one `(keys, values)` a layer, `[batch, kv_heads, prefix + span, head_dim]`.
        span: tokens of the span.
        tokens: the suffix tokens to steer, a row a case.
        position: of the first of them, in the closed gap.

    Returns:
        One `(keys, values)` a layer, `[batch, kv_heads, steered, head_dim]`.
    """
    window = len(tokens[0])
    bias = backbone.require_eraser().extras[SPAN_BIAS]
    mask = suffix_mask(before[0][0].shape[2] - span, span, window, bias, backbone.model.dtype)
    positions = position + torch.arange(window, dtype=torch.float64)
    return _run(backbone, splice(before), positions, tokens=tokens, mask=mask)


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
    new = len(positions)
    return [(layer.keys[:, :, -new:], layer.values[:, :, -new:]) for layer in cache.layers]  # type: ignore[index, union-attr]
