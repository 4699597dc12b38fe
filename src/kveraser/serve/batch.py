"""Decode one token of several contexts in one forward pass, one row per context.

A step spends most of its time reading weights, which are read once for all rows. Keys and values stay in the cache of
each row, and attention runs per row. Contexts of any length, with or without position gaps, can be batched without
padding or copies, and no row can read the cache of another. Source: selective batching, B. Yu et al., Orca (OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from kveraser.cache.editable import EditableCache
from kveraser.cache.layer import EditableLayer
from kveraser.model.backbone import Backbone

ROWS = "kveraser_rows_over_"
"""Prefix of the name of the attention function that runs a model's own attention row by row."""


class _RowsLayer(CacheLayerMixin):
    """One layer of several caches. Keys and values are returned as lists with one tensor per row."""

    is_sliding = False

    def __init__(self, rows: Sequence[EditableLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the rows have their own buffers."""

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        states = [
            row.update(keys, values)
            for row, keys, values in zip(self.rows, key_states.split(1), value_states.split(1), strict=True)
        ]
        return [keys for keys, _ in states], [values for _, values in states]

    def get_seq_length(self) -> int:
        return max(row.length for row in self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def step_together(backbone: Backbone, caches: Sequence[EditableCache], tokens: Sequence[int]) -> torch.Tensor:
    """Append one token to each of several caches, at its next position, in one forward pass.

    Args:
        caches: distinct caches of this backbone.
        tokens: one per cache.

    Returns:
        Logits, float32 `[caches, vocabulary]`, equal to those of `Backbone.logits` for each cache up to rounding.

    Raises:
        ContextLengthError: a cache has no position left. After any exception all caches are unchanged.
    """
    for cache in caches:
        backbone.check_room(cache.next_position, 1)
    positions = torch.tensor([[cache.next_position] for cache in caches], dtype=torch.float64)
    layers: list[Any] = [_RowsLayer([cache.layers[layer] for cache in caches]) for layer in range(backbone.layers)]
    with backbone.lock, torch.no_grad(), ExitStack() as appending, _row_by_row(backbone):
        for cache, position in zip(caches, positions, strict=True):
            appending.enter_context(cache.appending(position))
        output = backbone.model(
            input_ids=torch.tensor([[token] for token in tokens], device=backbone.device),
            position_ids=backbone.position_ids(positions),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
    logits: torch.Tensor = output.logits[:, -1]
    return logits.float()


def can_step_together(backbone: Backbone) -> bool:
    """Whether batched steps of the backbone agree with single ones, tested on two short caches.

    Models whose attention is not in the attention registry of transformers are not supported.
    """
    if not _registered(backbone):
        return False
    vocabulary = backbone.model.get_input_embeddings().num_embeddings
    short, long = ([token % vocabulary for token in tokens] for tokens in ((1, 2), (3, 4, 5, 6)))
    caches = [backbone.prefill(short), backbone.prefill(long)]
    alone = torch.cat([backbone.logits(cache.fork(), [7 % vocabulary]) for cache in caches])
    try:
        together = step_together(backbone, caches, [7 % vocabulary] * 2)
    except Exception:
        # Model code between the cache and the attention can fail on lists with any exception.
        return False
    tolerance = 1e-3 if backbone.model.dtype == torch.float32 else 5e-2
    return float((together - alone).norm() / alone.norm()) < tolerance


def _registered(backbone: Backbone) -> bool:
    from transformers import AttentionInterface

    return _config(backbone)._attn_implementation in AttentionInterface().valid_keys()


def _config(backbone: Backbone) -> Any:
    """The configuration that selects the attention of the decoder layers."""
    return backbone.model.config.get_text_config(decoder=True)


@contextmanager
def _row_by_row(backbone: Backbone) -> Iterator[None]:
    """Within the context the model's attention runs row by row. The caller must hold `backbone.lock`."""
    from transformers import AttentionInterface

    config = _config(backbone)
    own = config._attn_implementation
    interface = AttentionInterface()
    if ROWS + own not in interface.valid_keys():
        AttentionInterface.register(ROWS + own, partial(_attend, interface[own]))
    config._attn_implementation = ROWS + own
    try:
        yield
    finally:
        config._attn_implementation = own


def _attend(
    own: Any,
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    attention_mask: None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Run the attention `own` for every row of `query` (`[rows, heads, 1, head_dim]`), with all slots visible."""
    rows = [
        own(module, row, key, value, None, **options)[0]
        for row, key, value in zip(query.split(1), keys, values, strict=True)
    ]
    return torch.cat(rows), None
