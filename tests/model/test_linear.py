"""Weights that are laid out once: the same numbers to rounding, and only where nothing else is wanted of them."""

from __future__ import annotations

import pytest
import torch

from kveraser.model.backbone import Backbone
from kveraser.model.linear import give_back, lay_out_weights
from tests.tiny import random_tokens, tiny_backbone

TOKENS = random_tokens(40, seed=1)


def kernels(states: torch.Tensor, layer: torch.nn.Module) -> set[str]:
    """What a pass of `layer` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(states)
    return {event.key for event in profiler.key_averages()}


def last_logits(backbone: Backbone) -> torch.Tensor:
    cache = backbone.prefill(TOKENS[:-1])
    return backbone.logits(cache, TOKENS[-1:])


@pytest.fixture
def laid_out() -> Backbone:
    backbone = tiny_backbone()
    if not lay_out_weights(backbone.model):
        pytest.skip("this build of torch has no such kernel")
    return backbone


def test_all_linear_layers_say_the_same(laid_out: Backbone) -> None:
    linear = [layer for layer in laid_out.model.modules() if type(layer) is torch.nn.Linear]
    assert len(lay_out_weights(tiny_backbone().model)) == len(linear) > 7
    expected, found = last_logits(tiny_backbone()), last_logits(laid_out)
    assert torch.allclose(found, expected, atol=1e-5) and float(expected.abs().max()) > 0.01
    for layer in linear:
        with torch.no_grad():
            assert "mkldnn::_linear_pointwise" in kernels(torch.randn(3, layer.in_features), layer)


def test_what_is_given_back_is_as_before(laid_out: Backbone) -> None:
    backbone = tiny_backbone()
    expected, layers = last_logits(backbone), lay_out_weights(backbone.model)
    layers[-1].weight.mul_(2)
    assert torch.allclose(last_logits(backbone), expected, atol=1e-5), "a copy is read"
    give_back(layers)
    assert not torch.allclose(last_logits(backbone), expected, atol=1e-2)
    layers[-1].weight.div_(2)
    assert torch.equal(last_logits(backbone), expected)


def test_gradients_flow_as_ever(laid_out: Backbone) -> None:
    layer = laid_out.model.lm_head
    states = torch.randn(3, layer.in_features, requires_grad=True)
    assert "mkldnn::_linear_pointwise" not in kernels(states, layer)
    layer(states).sum().backward()
    assert states.grad is not None and torch.allclose(states.grad, layer.weight.sum(dim=0).expand(3, -1), atol=1e-5)


def test_adapters_trained_weights_and_other_types_are_left_alone() -> None:
    class Other(torch.nn.Linear):
        pass

    trained, half = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8).to(torch.bfloat16).requires_grad_(False)
    adapter = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(8, 8).requires_grad_(False)})
    other = Other(8, 8).requires_grad_(False)
    model = torch.nn.ModuleList([trained, half, adapter, other])
    assert lay_out_weights(model) == []
    model.append(torch.nn.Linear(8, 8).requires_grad_(False))
    assert lay_out_weights(model) in ([], [model[-1]])
    # With one's own bias.
    states = torch.randn(2, 8)
    with torch.no_grad():
        assert torch.allclose(model[-1](states), torch.nn.functional.linear(states, model[-1].weight, model[-1].bias))
