"""Caches for one forward pass: probing a model's early layers, and training through concatenated states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from kveraser.cache.editable import EditableCache, KeyValue


class StopForward(Exception):
    """Raised by a probing cache layer to end a forward pass once it has seen enough."""


class ProbingCache(EditableCache):
    """A cache that stops the forward pass at one layer and keeps the states computed for it.

    The pass raises `StopForward`; `captured` then holds `(keys, values)` of layer `stop_layer`. This reads the
    early layers of any model.
    """

    def __init__(self, layers: int, stop_layer: int, source: EditableCache, length: int) -> None:
        """Start from a copy of the first `length` slots of `source`, in the layers below `stop_layer` only."""
        super().__init__(layers, capacity=max(length, 1))
        self.stop_layer = stop_layer
        self.captured: KeyValue | None = None
        with torch.no_grad():
            for layer, (keys, values) in zip(self.layers[:stop_layer], source.read(0, length), strict=False):
                layer.update(keys, values)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx == self.stop_layer:
            self.captured = (key_states, value_states)
            raise StopForward
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def concat_kv(*parts: Sequence[KeyValue]) -> DynamicCache:
    """Concatenate runs of states into a new cache, so that gradients flow through every part.

    Args:
        parts: runs of slots in order; each is one `(keys, values)` a layer, `[batch, kv_heads, slots, head_dim]`.

    Returns:
        A `DynamicCache` whose forward pass is differentiable with respect to the parts (training only).
    """
    joined = [
        (
            torch.cat([part[layer][0] for part in parts], dim=2),
            torch.cat([part[layer][1] for part in parts], dim=2),
        )
        for layer in range(len(parts[0]))
    ]
    return DynamicCache(ddp_cache_data=joined)
