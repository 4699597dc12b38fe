"""One layer of the editable cache: preallocated buffers, written at a cursor or at scattered slots."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kveraser.errors import CacheError

GROWTH_FACTOR = 1.5
GROWTH_MULTIPLE = 256


class EditableLayer(CacheLayerMixin):
    """One layer's buffers, `[batch, kv_heads, capacity, head_dim]`, of which the first `length` slots are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0
        self.limit: int | None = None
        self.scattered: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states, self.capacity)
        self.values = self._buffer(value_states, self.capacity)
        self.is_initialized = True

    @staticmethod
    def _buffer(like: torch.Tensor, capacity: int) -> torch.Tensor:
        # Tensors created in inference mode can't be written outside it, and a cache may be used in both.
        with torch.inference_mode(False):
            # Zeros: memory that another context gave back must not show in the unused slots.
            return torch.zeros(
                (like.shape[0], like.shape[1], capacity, like.shape[3]), dtype=like.dtype, device=like.device
            )

    def reserve(self, slots: int, exactly: bool = False) -> None:
        """Grow the buffers to hold at least `slots`, by a factor, so that appends cost amortized constant time.

        Args:
            exactly: allocate no more than `slots`.
        """
        if slots <= self.capacity:
            return
        wanted = slots if exactly else max(slots, int(self.capacity * GROWTH_FACTOR))
        self.capacity = wanted if exactly else -(-wanted // GROWTH_MULTIPLE) * GROWTH_MULTIPLE
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            for name, old in (("keys", self.keys), ("values", self.values)):
                new = self._buffer(old, self.capacity)
                new[:, :, : self.length] = old[:, :, : self.length]
                setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states at the cursor (or at the scattered slots) and return views of all slots in use."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise CacheError(
                "the editable cache writes in place and can't carry gradients: train on cache.probe.concat_kv(...), "
                "or wrap the forward pass in torch.no_grad()"
            )
        if not self.is_initialized:
            self.reserve(key_states.shape[-2])
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.scattered is not None:
            if key_states.shape[-2] != self.scattered.numel():
                raise CacheError(
                    f"the forward pass wrote {key_states.shape[-2]} slots where {self.scattered.numel()} were announced"
                )
            self.keys.index_copy_(2, self.scattered, key_states)
            self.values.index_copy_(2, self.scattered, value_states)
        else:
            end = self.length + key_states.shape[-2]
            if self.limit is not None and end > self.limit:
                raise CacheError(f"the forward pass wrote up to slot {end} where {self.limit} is the last one allowed")
            self.reserve(end)
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
            self.length = end
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length = self.cropped(tokens_to_remove)

    def cropped(self, tokens_to_remove: int) -> int:
        """The length after `crop`: a positive number of slots stays, a negative number is removed."""
        if tokens_to_remove > 0:
            return min(tokens_to_remove, self.length)
        return max(0, self.length + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys = self.keys.repeat_interleave(repeats, dim=0)
            self.values = self.values.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[indices, ...], self.values[indices, ...]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            self.keys = self.keys.index_select(0, beam_idx.to(self.keys.device))
            self.values = self.values.index_select(0, beam_idx.to(self.values.device))
