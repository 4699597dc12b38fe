"""Re-rotation of keys against the models' own keys at the new positions, in every family and scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.cache.rotation import rotate_keys
from kveraser.errors import RotationError
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span
from tests.tiny import POSITIONS, ROTARY_FAMILIES, distance, random_tokens, tiny_backbone, tiny_model, tiny_tokenizer

TOKENS = random_tokens(12)

HALF = ("half",) * 3
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [2.0] * 4, "long_factor": [8.0] * 4, "factor": 4.0,
        "original_max_position_embeddings": POSITIONS,
    },
    "original_max_position_embeddings": POSITIONS, "max_position_embeddings": 4 * POSITIONS,
}  # fmt: skip
ROTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ROTARY_FAMILIES},
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": (
        "qwen2",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256,
        }},
    ),
    "llama3": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }},
    ),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "longrope": ("phi3", LONGROPE),
}  # fmt: skip


def keys_at(backbone: Backbone, first: float) -> list[torch.Tensor]:
    """The model's own keys of TOKENS at positions `first`, `first + 1`, ..."""
    cache = backbone.new_cache()
    positions = first + torch.arange(len(TOKENS), dtype=torch.float64)
    with cache.appending(positions):
        backbone.forward(TOKENS, cache, positions)
    return [keys.clone() for keys, _ in cache.read(0, cache.length)]


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotated_keys_equal_the_models_own_keys_at_the_new_positions(name: str) -> None:
    family, overrides = ROTATIONS[name]
    backbone = tiny_backbone(family, **overrides)
    assert backbone.rotation.conventions == HALF and backbone.max_positions == POSITIONS
    for start, delta in ((0, 41), (100, -77), (900, -850), (3, 0.25)):
        here, there = keys_at(backbone, start), keys_at(backbone, start + delta)
        rotated = backbone.rotation.rotate(here, delta)
        assert distance(rotated, there) < 2e-4 < 0.2 < distance(here, there)


def test_only_the_rotary_part_of_a_head_turns(backbones: dict[str, Backbone]) -> None:
    backbone = backbones["gpt_neox"]
    here = keys_at(backbone, 0)
    rotary = 2 * backbone.rotation.inverse_frequencies.numel()
    assert rotary == 4 < here[0].shape[-1] == 8
    for old, new in zip(here, backbone.rotation.rotate(here, 41), strict=True):
        assert torch.equal(old[..., rotary:], new[..., rotary:]) and not torch.equal(old[..., 0], new[..., 0])


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "longrope"])
def test_a_scaled_rotation_is_not_the_plain_one(name: str) -> None:
    family, overrides = ROTATIONS[name]
    backbone, plain = tiny_backbone(family, **overrides), tiny_backbone(family)
    rotated = plain.rotation.rotate(keys_at(backbone, 0), 41)
    assert distance(rotated, keys_at(backbone, 41)) > 0.05


def test_frequencies_of_a_longer_text_do_not_stay() -> None:
    backbone = tiny_backbone("phi3", **LONGROPE)
    expected = tiny_backbone("phi3", **LONGROPE).rotation
    keys_at(backbone, 2 * POSITIONS)
    assert torch.equal(backbone.rotation.inverse_frequencies, expected.inverse_frequencies)


def test_what_can_not_be_moved_is_refused_and_still_prefilled() -> None:
    silent = tiny_model("hunyuan_v1_dense")
    with torch.no_grad():
        silent.model.layers[1].self_attn.key_layernorm.weight[0] = 0
    refused = {
        "no rotary position embedding": tiny_backbone("gpt2"),
        "keys of layer 1 change with the position by no known rotation": Backbone(silent, tiny_tokenizer()),
    }
    for message, backbone in refused.items():
        with pytest.raises(RotationError, match=message):
            backbone.rotation  # noqa: B018
        assert backbone.prefill(TOKENS).exact_length == len(TOKENS)


def test_detecting_leaves_the_model_as_it_was() -> None:
    backbone = tiny_backbone()
    before = backbone.logits(backbone.new_cache(), TOKENS)
    assert backbone.rotation is backbone.rotation
    assert torch.equal(backbone.logits(backbone.new_cache(), TOKENS), before)


@pytest.mark.parametrize("convention", ["half", "interleaved"])
def test_large_moves_keep_float32_accuracy(convention: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 5, 8, generator=generator)
    frequencies = 10_000.0 ** (-torch.arange(4) / 4) * 0.9
    delta = 99_991
    pairs = keys.unflatten(-1, (2, 4)).transpose(-1, -2) if convention == "half" else keys.unflatten(-1, (4, 2))

    def turned_by(angles: torch.Tensor) -> torch.Tensor:
        turned = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * torch.exp(1j * angles))
        return (turned.transpose(-1, -2) if convention == "half" else turned).flatten(-2).float()

    rotated = rotate_keys(keys, frequencies, convention, delta)
    assert distance([rotated], [turned_by(frequencies.double() * delta)]) < 1e-5
    assert distance([rotated], [turned_by((frequencies * delta).double())]) > 1e-4, "float32 angles are not enough"
    assert distance([rotate_keys(rotated, frequencies, convention, -delta)], [keys]) < 1e-5


def test_bfloat16_keys_turn_in_float32_and_stay_bfloat16() -> None:
    backbone = Backbone(tiny_model().to(torch.bfloat16), tiny_tokenizer())
    assert backbone.rotation.conventions == HALF
    here, there = keys_at(backbone, 0), keys_at(backbone, 41)
    rotated = backbone.rotation.rotate(here, 41)
    exact = backbone.rotation.rotate([keys.float() for keys in here], 41)
    for layer in range(backbone.layers):
        assert rotated[layer].dtype == torch.bfloat16
        assert torch.equal(rotated[layer], exact[layer].bfloat16())
        own = there[layer].float()
        assert (rotated[layer].float() - own).norm() < 0.05 * own.norm() < 0.5 * (here[layer].float() - own).norm()


def test_many_small_moves_end_where_one_large_one_does() -> None:
    backbone, live = tiny_backbone(), random_tokens(400)
    cache, shift = backbone.prefill(live), make_method("shift").resolve(backbone)
    last = [keys[:, :, 300:400].clone() for keys, _ in cache.read(0, 400)]
    for _ in range(50):
        with cache.edit():
            shift(backbone, cache, live, Span(100, 104))
        del live[100:104]
    moved = [keys[:, :, 100:200] for keys, _ in cache.read(0, 200)]
    assert distance(moved, backbone.rotation.rotate(last, -200)) < 1e-4 < distance(moved, last)
