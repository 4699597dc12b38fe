"""Writing steering states: the passes with the eraser switched on, out of place and differentiable, a row a case.

Training learns through them, a layout a function. The methods run the same passes in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import DynamicCache

from kveraser.cache.editable import KeyValue
from kveraser.cache.probe import splice
from kveraser.model.backbone import Backbone
from kveraser.model.eraser import SLOT_EMBEDDINGS, Layout


def steering_positions(positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where the steering states of a span at `positions` (`[span]`) sit, float64 `[span]`.

    `keep`: where the span was. `closed` and `compact`: evenly between the last prefix token and the position of the
    span's first token, which the first suffix token will take.
    """
    if layout == "keep":
        return positions
    first = torch.ceil(positions[0])
    return first - 1 + torch.arange(1, len(positions) + 1, dtype=torch.float64) / (len(positions) + 1)


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


def _run(
    backbone: Backbone,
    cache: DynamicCache,
    positions: torch.Tensor,
    tokens: Sequence[Sequence[int]] | None = None,
    embeddings: torch.Tensor | None = None,
) -> list[KeyValue]:
    with backbone.erasing():
        backbone.model.base_model(
            input_ids=None if tokens is None else torch.tensor(tokens, device=backbone.device),
            inputs_embeds=embeddings,
            position_ids=backbone.position_ids(positions),
            past_key_values=cache,
            use_cache=True,
        )
    new = positions.shape[-1]
    return [(layer.keys[:, :, -new:], layer.values[:, :, -new:]) for layer in cache.layers]  # type: ignore[index, union-attr]
