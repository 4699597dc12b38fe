"""Re-rotate keys to other positions under rotary position embeddings (RoPE, arXiv:2104.09864).

Models differ in how they rotate (half-split or interleaved pairs, clockwise, part of the head, before a norm, some
layers not at all). `detect` measures it: a single token attends only to itself, so its keys at two positions differ by
a rotation alone. A model whose keys differ in another way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import RotationError

Convention = Literal["half", "interleaved", "clockwise", "none"]
"""Pairs of dimensions that rotate; `clockwise`: half-split pairs that rotate in the other direction (nanochat)."""

# These scalings change the frequencies with the length of the text, from `fixed_frequencies_end` on.
LENGTH_DEPENDENT = ("dynamic", "longrope")

FREQUENCIES = ("inv_freq", "full_attention_inv_freq")
"""Where rotary modules keep their frequencies; the second where layers of several types have their own."""

NORM_OF_KEYS = ".key_layernorm"
"""The norms that keys may pass after their rotation; `detect` measures whether they do."""

PROBE_DISTANCE = 37
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2


def fixed_frequencies_end(config: Any) -> int | None:
    """The position from which a model rotates by other frequencies; None if it never does.

    Beyond it (`longrope`: Phi-3.5, Phi-4-mini, arXiv:2402.13753; `dynamic`) a key depends on the length of the text at
    its computation: a chunked prefill differs from a single one, and a cache shortened by an erase from a fresh one.

    Args:
        config: of the text model, with `rope_parameters` of its own or one set for each layer type.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    sets = [one for one in parameters.values() if isinstance(one, dict)] or [parameters]
    ends = [
        one.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        for one in sets
        if one.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min((int(end) for end in ends if end is not None), default=None)


@dataclass(frozen=True)
class Rotation:
    """How a backbone rotates its keys.

    Args:
        inverse_frequencies: float32 `[rotary_dim / 2]`.
        conventions: one a layer.
        scales: a layer, the weights `[head_dim]` of a norm that keys pass after their rotation (Hunyuan), or None.
    """

    inverse_frequencies: torch.Tensor
    conventions: tuple[Convention, ...]
    scales: tuple[torch.Tensor | None, ...]

    def rotate(self, keys: Sequence[torch.Tensor], delta: float) -> list[torch.Tensor]:
        """Keys moved by `delta` positions.

        Args:
            keys: one tensor a layer, `[batch, kv_heads, slots, head_dim]`, already rotated to their positions.
            delta: positions to move by; negative towards the beginning.

        Returns:
            New tensors of the same shapes and dtypes; the arithmetic is float32 whatever the dtype.
        """
        return list(self.rotated(keys, delta))

    def rotated(self, keys: Sequence[torch.Tensor], delta: float) -> Iterator[torch.Tensor]:
        """As `rotate`, a layer when it is asked for: one layer's keys fit where memory is fast."""
        for layer, convention, scale in zip(keys, self.conventions, self.scales, strict=True):
            yield rotate_keys(layer, self.inverse_frequencies, convention, delta, scale)


def rotate_keys(
    keys: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    convention: Convention,
    delta: float,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate one layer's keys `[..., head_dim]` by `delta` positions; what is not rotary passes through.

    Args:
        scale: `[head_dim]`, what the keys were multiplied by after their rotation.
    """
    if convention == "none" or delta == 0:
        return keys.clone()
    if convention == "clockwise":
        delta = -delta
    if scale is not None:
        unscaled = rotate_keys(keys.float() / scale.float(), inverse_frequencies, convention, delta)
        return (unscaled * scale.float()).to(keys.dtype)
    # In float64: a float32 product of a large delta and a frequency near 1 is less precise than the keys.
    angles = inverse_frequencies.to(device=keys.device, dtype=torch.float64) * delta
    cosine, sine = angles.cos().float(), angles.sin().float()
    rotary_dim = 2 * inverse_frequencies.numel()
    rotary = keys[..., :rotary_dim].float()
    if convention != "interleaved":
        first, second = rotary[..., : rotary_dim // 2], rotary[..., rotary_dim // 2 :]
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    else:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
        turned = torch.stack([first * cosine - second * sine, second * cosine + first * sine], dim=-1).flatten(-2)
    return torch.cat([turned.to(keys.dtype), keys[..., rotary_dim:]], dim=-1)


def detect(model: Any, layers: int) -> Rotation:
    """Measure how `model` rotates its keys, layer by layer.

    Args:
        model: a causal language model of transformers.
        layers: its number of decoder layers.

    Raises:
        RotationError: no rotary module, or keys that no known rotation explains.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    # A vision tower has frequencies of its own.
    decoder = model.get_decoder() or model
    cache = EditableCache(layers)
    token = torch.full((2, 1), min(5, config.vocab_size - 1), device=model.device)
    positions = torch.tensor([[1], [1 + PROBE_DISTANCE]], device=model.device)
    with torch.no_grad():
        model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
    # Read after the probe: where they depend on the length of the text, they are now those of a short one.
    frequencies = next(
        (getattr(module, buffer) for module in decoder.modules() for buffer in FREQUENCIES if hasattr(module, buffer)),
        None,
    )
    if frequencies is None:
        raise RotationError(
            f"{name} has no rotary position embedding with inv_freq (learned, other or no positions), so keys can't be "
            "moved. "
            "Use a method that keeps positions: recompute, mask, zero_value, blank, or kveraser with layout='keep'."
        )
    frequencies = frequencies.detach().float()
    tolerance = FLOAT32_TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    norms = [module.weight.detach() for path, module in decoder.named_modules() if path.endswith(NORM_OF_KEYS)]
    found: list[tuple[Convention, torch.Tensor | None]] = []
    for index, (keys, _) in enumerate(cache.read(0, 1)):
        here, there = keys[:1], keys[1:].float()
        kinds: tuple[Convention, ...] = ("half", "interleaved", "clockwise", "none")
        candidates = [(kind, scale) for scale in (None, *norms[index : index + 1]) for kind in kinds]
        errors = [
            float((rotate_keys(here, frequencies, kind, PROBE_DISTANCE, scale).float() - there).norm())
            for kind, scale in candidates
        ]
        best = min(range(len(candidates)), key=errors.__getitem__)
        if not errors[best] <= tolerance * float(there.norm()):
            raise RotationError(
                f"{name}: the keys of layer {index} change with the position by no known rotation "
                f"(relative error {errors[best] / float(there.norm()):.2g}). Use a method that keeps positions."
            )
        found.append(candidates[best])
    conventions, scales = zip(*found, strict=True)
    return Rotation(frequencies, conventions, scales)
