"""Faster linear layers for training on a CPU: oneDNN kernels with packed copies of the frozen weights."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

PACKED_FOR = 64
"""Number of tokens that the packed layout is chosen for; it works with any number."""
COPIES = 3
"""Copies of the weights in memory: the model's own, and packed ones for the forward and the backward pass."""


def pack_linear_layers(model: torch.nn.Module, processes: int = 1) -> int:
    """Let the frozen float32 linear layers of a model on a CPU compute with packed weights, for good.

    Outputs and gradients agree with the original layers to rounding. Nothing changes where this build of torch has no
    such kernel, or where the copies of all `processes` take more than half of the memory.

    Returns:
        Number of packed layers.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        # A subclass may use its weight differently.
        if type(layer) is torch.nn.Linear
        and "lora_" not in name
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]
    size = COPIES * processes * sum(layer.weight.nbytes for layer in layers)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernels = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(kernels, "_linear_pointwise")) or size > physical / 2:
        return 0
    for layer in layers:
        weight = layer.weight.detach()
        packed = [kernels._reorder_linear_weight(one.contiguous(), PACKED_FOR) for one in (weight, weight.t())]
        layer.forward = partial(_PackedLinear.apply, *packed, layer.bias)  # type: ignore[method-assign]
    return len(layers)


class _PackedLinear(torch.autograd.Function):
    """`states @ weight.T + bias` of a frozen weight; the backward pass needs only the weight."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        ctx.transposed = transposed
        return _multiply(states, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, torch.Tensor]:
        return None, None, None, _multiply(gradient.contiguous(), ctx.transposed, None)


def _multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product
