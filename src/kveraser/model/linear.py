"""Linear layers on a CPU with their weights laid out once, as oneDNN multiplies fastest: for long runs of one model.

Laid out, weights take their memory a second time; a pass of few tokens gains most, and the vocabulary's layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

USUAL_TOKENS = 64
"""Tokens of a pass that the layout is chosen for; others run with it as well."""


def lay_out_weights(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Let the frozen float32 linear layers of a model on a CPU read a copy of their weights that is laid out for it.

    The numbers agree to rounding. Weights must not change behind it; adapters stay as they are, and so does every
    layer where this build of torch has no such kernel, or where gradients are wanted.

    Returns:
        The layers that were laid out, for `give_back`.
    """
    kernels = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(kernels, "_linear_pointwise"):
        return []
    layers: list[torch.nn.Linear] = []
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        # A subclass may mean something else by its weight.
        if type(layer) is not torch.nn.Linear or weight is None or "lora_" in name:
            continue
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad:
            laid_out = kernels._reorder_linear_weight(weight.detach(), USUAL_TOKENS)
            layer.forward = partial(_multiply, layer, laid_out)  # type: ignore[method-assign]
            layers.append(layer)
    return layers


def give_back(layers: Sequence[torch.nn.Linear]) -> None:
    """Let layers read their own weights again, and let the copies go."""
    for layer in layers:
        vars(layer).pop("forward", None)


def _multiply(layer: torch.nn.Linear, weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and states.requires_grad:
        return torch.nn.functional.linear(states, layer.weight, layer.bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, layer.bias, "none", [], "")
    return product
