"""Attention on a CPU without copies: heads that share keys and values read the same ones.

transformers repeats keys and values for every query head whenever a mask is given, since other devices have no kernel
for that case. On a CPU the kernel of torch takes shared heads as they are, and a step over a long cache spends most of
its time on those copies. Nor does the kernel skip what a mask hides: tokens that are run again early in a long cache
are handed the part of it that they see.
"""

from __future__ import annotations

from typing import Any

import torch

SHARED_HEADS = "kveraser_shared_heads"
"""The name of this attention in a model's configuration."""
TOKENS_TOGETHER = 32
"""Neighbouring tokens that are handed the same slots: as many as the kernel takes in one step."""


def share_heads(model: Any) -> None:
    """Let a model on a CPU that runs `sdpa` attention run this one instead; others stay as they are."""
    config = model.config.get_text_config(decoder=True)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
    if model.device.type != "cpu" or model.config._attn_implementation != "sdpa" or not grouped:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # Under a name of its own: other models of this process keep theirs.
    AttentionInterface.register(SHARED_HEADS, attend)
    AttentionMaskInterface.register(SHARED_HEADS, sdpa_mask)
    model.set_attn_implementation(SHARED_HEADS)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention: that of transformers' `sdpa`, to rounding where a mask hides the last slots.

    Args:
        query: `[batch, heads, tokens, head_dim]`.
        key, value: `[batch, kv_heads, slots, head_dim]`.
        attention_mask: as `sdpa` takes it. Without one, with gradients or with options, `sdpa` itself runs.

    Returns:
        `[batch, tokens, heads, head_dim]`, and no attention weights.
    """
    gradients = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    special = any(options.get(name) is not None for name in ("position_bias", "cache")) or dropout > 0
    if attention_mask is None or gradients or special:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    # Rows of a batch see as much as the longest of them.
    together = TOKENS_TOGETHER if len(query) == 1 else query.shape[2]
    parts = []
    for start in range(0, query.shape[2], together):
        tokens = slice(start, start + together)
        seen = _seen(attention_mask[..., tokens, :])
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, tokens],
                key[:, :, :seen],
                value[:, :, :seen],
                attn_mask=attention_mask[..., tokens, :seen],
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _seen(mask: torch.Tensor) -> int:
    """How many of the first slots a mask `[1, 1, tokens, slots]` lets any of the tokens see."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    slots = visible.flatten(0, -2).any(dim=0).nonzero()
    return int(slots[-1]) + 1 if len(slots) else mask.shape[-1]
