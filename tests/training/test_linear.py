"""Packed linear layers have the outputs and gradients of the original ones."""

from __future__ import annotations

import pytest
import torch

from kveraser.training.distill import case_losses, prepare
from kveraser.training.linear import pack_linear_layers
from tests.tiny import attach_random_eraser, tiny_backbone
from tests.training.test_distill import CASE, OTHER, VARIANTS, difference

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN kernels"
)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packing_keeps_losses_and_gradients(family: str) -> None:
    settings = VARIANTS[1]
    results = []
    for packed in (False, True):
        backbone = tiny_backbone(family)
        eraser = attach_random_eraser(backbone, settings=settings)
        for parameter in eraser.parameters().values():
            parameter.requires_grad_(True)
        if packed:
            # Seven projections in each of three layers, and the head.
            assert pack_linear_layers(backbone.model) == 22
        losses = case_losses(backbone, prepare(backbone, [CASE, OTHER]), settings, "kl", 1.0)
        losses.sum().backward()
        results.append((losses.detach(), {name: one.grad for name, one in eraser.parameters().items()}))
    (plain, gradients), (losses, packed_gradients) = results
    assert difference(plain, losses) < 1e-6 < 0.01 < float(plain.min())
    for name, gradient in gradients.items():
        other = packed_gradients[name]
        assert (gradient is None) == (other is None)
        assert gradient is None or other is None or difference(gradient, other) < 1e-5


def test_layers_without_a_kernel_or_memory_stay_as_they_are() -> None:
    assert pack_linear_layers(tiny_backbone().model.to(torch.bfloat16)) == 0
    assert pack_linear_layers(tiny_backbone("gpt2").model) == 1
    model = tiny_backbone().model
    assert pack_linear_layers(model, processes=10**9) == 0
    assert not any("forward" in vars(module) for module in model.modules())
