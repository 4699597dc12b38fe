"""Packed weights give the same numbers to rounding, and only layers that are frozen, float32 and on a CPU use them."""

from __future__ import annotations

import pytest
import torch

from kveraser.model.backbone import Backbone
from kveraser.model.linear import packed_weights
from tests.tiny import random_tokens, tiny_backbone

TOKENS = random_tokens(40, seed=1)


def kernels(states: torch.Tensor, layer: torch.nn.Module) -> set[str]:
    """The operators that `layer` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(states)
    return {event.key for event in profiler.key_averages()}


def last_logits(backbone: Backbone) -> torch.Tensor:
    cache = backbone.prefill(TOKENS[:-1])
    return backbone.logits(cache, TOKENS[-1:])


@pytest.fixture
def backbone() -> Backbone:
    backbone = tiny_backbone()
    with packed_weights(backbone.model) as layers:
        if not layers:
            pytest.skip("this build of torch has no such kernel")
    return backbone


def test_all_linear_layers_give_the_same_numbers(backbone: Backbone) -> None:
    expected = last_logits(backbone)
    linear = [layer for layer in backbone.model.modules() if type(layer) is torch.nn.Linear]
    with packed_weights(backbone.model) as layers:
        assert layers == linear and len(linear) > 7
        assert torch.allclose(last_logits(backbone), expected, atol=1e-5) and float(expected.abs().max()) > 0.01
        for layer in linear:
            with torch.no_grad():
                assert "mkldnn::_linear_pointwise" in kernels(torch.randn(3, layer.in_features), layer)


def test_layers_use_their_own_weights_again_afterwards(backbone: Backbone) -> None:
    expected = last_logits(backbone)
    with pytest.raises(KeyboardInterrupt), packed_weights(backbone.model) as layers:
        layers[-1].weight.mul_(2)
        assert torch.allclose(last_logits(backbone), expected, atol=1e-5), "the copy is used"
        raise KeyboardInterrupt
    assert not torch.allclose(last_logits(backbone), expected, atol=1e-2)
    layers[-1].weight.div_(2)
    assert torch.equal(last_logits(backbone), expected)


def test_gradients_flow_through_the_own_weights(backbone: Backbone) -> None:
    layer = backbone.model.lm_head
    states = torch.randn(3, layer.in_features, requires_grad=True)
    with packed_weights(backbone.model):
        assert "mkldnn::_linear_pointwise" not in kernels(states, layer)
        layer(states).sum().backward()
    assert states.grad is not None and torch.allclose(states.grad, layer.weight.sum(dim=0).expand(3, -1), atol=1e-5)


def test_adapters_trainable_layers_and_subclasses_are_left_alone() -> None:
    class Other(torch.nn.Linear):
        pass

    trained, half = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    adapter = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(8, 8).requires_grad_(False)})
    other, biased = Other(8, 8).requires_grad_(False), torch.nn.Linear(8, 8).requires_grad_(False)
    model = torch.nn.ModuleList([trained, half, adapter, other])
    with packed_weights(model) as layers:
        assert layers == []
    model.append(biased)
    states = torch.randn(2, 8)
    with packed_weights(model) as layers, torch.no_grad():
        assert layers in ([], [biased])
        assert torch.allclose(biased(states), torch.nn.functional.linear(states, biased.weight, biased.bias))
