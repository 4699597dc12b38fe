"""Which models are taken: by their layers, from the config, before weights are read, and with the right reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config

from kveraser.errors import BackboneError, InputError, UnsupportedModelError
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from tests.sessions import EXACT, TEXT, far
from tests.tiny import SHARED, distance, random_tokens, tiny_backbone, tiny_tokenizer

HYBRID = {"num_local_experts": 0, "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_d_head": 8}
FULL = ["full_attention"] * 3
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip

TAKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "Granite 4.0 dense": (
        "granitemoehybrid", {**HYBRID, "layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
    ),
    "Qwen 3.5, full layers": ("qwen3_5_text", {"layer_types": FULL, "head_dim": 16}),
    "Qwen3-Next, full layers": ("qwen3_next", {"layer_types": FULL, "head_dim": 16, "num_experts": 0}),
    "Gemma 3, full layers": ("gemma3_text", {"layer_types": FULL, "head_dim": 8}),
    "Olmo 3, full layers": ("olmo3", {"layer_types": FULL}),
    "LFM2, full layers": ("lfm2", {"layer_types": FULL}),
    "Gemma 2, full layers": ("gemma2", {"layer_types": FULL, "head_dim": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_full_attention_in_every_layer_is_taken_whatever_the_class_can_do(name: str) -> None:
    family, overrides = TAKEN[name]
    session = Session(tiny_backbone(family, **overrides), text=TEXT)
    for method in ("recompute", "shift"):
        receipt = session.erase("noon", method)
        assert receipt.exact is (method == "recompute") is (far(session) < EXACT)
        session.undo()


def test_keys_of_models_with_frequencies_a_layer_type_are_moved_rightly() -> None:
    backbone = tiny_backbone("gemma3_text", layer_types=FULL, head_dim=8)
    tokens = random_tokens(20)
    near, moved = backbone.prefill(tokens), backbone.new_cache()
    positions = torch.arange(20, dtype=torch.float64) + 7
    with moved.appending(positions):
        backbone.forward(tokens, moved, positions)
    rotated = backbone.rotation.rotate([keys for keys, _ in near.read(0, 20)], 7)
    assert distance(rotated, [keys for keys, _ in moved.read(0, 20)]) < 1e-3
    assert distance([keys for keys, _ in near.read(0, 20)], rotated) > 0.1


def folder_of(config: Any, tmp_path: Path) -> Path:
    """A folder with a config and a tokenizer, and no weights."""
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Granite 4.0 hybrid": ("granitemoehybrid", {**HYBRID, "layer_types": ["mamba", "attention", "mamba"]}, "linear"),
    "Qwen 3.5": ("qwen3_5_text", {"layer_types": ["linear_attention", "full_attention", "full_attention"]}, "linear"),
    "Gemma 3": ("gemma3_text", {"head_dim": 8}, "sliding_attention"),
    "Olmo 3": ("olmo3", {}, "sliding_attention"),
    "RecurrentGemma": ("recurrent_gemma", {}, "recurrent"),
    "RWKV": ("rwkv", {}, "linear_attention"),
    "DeepSeek-V3": ("deepseek_v3", {"kv_lora_rank": 16}, "multi_head_latent"),
    "DeepSeek-V3.2": ("deepseek_v32", {}, "indexed_attention"),
    "Falcon-RW": ("falcon", {"alibi": True}, "alibi"),
    "BLOOM": ("bloom", {}, "implicit_positions"),
    "MPT": ("mpt", {}, "implicit_positions"),
    "StarCoder2": ("starcoder2", {"sliding_window": 64}, "sliding_attention"),
    "T5": ("t5", {}, "cross_attention"),
    "Mistral with a window": ("mistral", {"sliding_window": 64}, "sliding_attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layers_are_refused_before_any_weights_are_there(name: str, tmp_path: Path) -> None:
    family, overrides, layer_type = REFUSED[name]
    config = AutoConfig.for_model(family, **({} if family == "t5" else {**SHARED, **overrides}))
    with pytest.raises(UnsupportedModelError, match=layer_type) as refusal:
        Backbone.load(folder_of(config, tmp_path))
    assert not list(tmp_path.glob("*.safetensors")) and "connection" not in str(refusal.value)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3"])
def test_the_text_of_a_model_with_images_is_loaded_and_served(family: str, tmp_path: Path) -> None:
    built = tiny_backbone(family)
    built.model.save_pretrained(tmp_path)
    built.tokenizer.save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path, device="cpu")
    assert loaded.fingerprint == built.fingerprint
    session = Session(loaded, text=TEXT)
    assert session.erase("noon", "recompute").exact and far(session) < EXACT
    with pytest.raises(InputError, match=r"content that is not text \(image\)"):
        Session(loaded, messages=[{"role": "user", "content": [{"type": "image", "url": "a.png"}]}])


@pytest.mark.parametrize("layer_types", [None, FULL])
def test_a_multimodal_model_is_judged_by_its_text_layers(tmp_path: Path, layer_types: list[str] | None) -> None:
    text = {**SHARED, "head_dim": 8, **({"layer_types": layer_types} if layer_types else {})}
    config = Gemma3Config(text_config=text, vision_config=VISION)
    if layer_types is None:
        with pytest.raises(UnsupportedModelError, match="sliding_attention"):
            Backbone.load(folder_of(config, tmp_path))
        return
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    session = Session(Backbone.load(tmp_path), text=TEXT)
    assert session.erase("noon", "recompute").exact and far(session) < EXACT
    session.undo()
    assert not session.erase("noon", "shift").exact


@pytest.mark.parametrize(
    ("quantization", "needs"),
    [
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
            "awq.*gptqmodel",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq.*optimum|gptq.*gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "exl9"}, "exl9"),
    ],
)
def test_quantized_weights_that_can_not_be_run_name_what_is_missing(
    tmp_path: Path, quantization: dict[str, Any], needs: str
) -> None:
    folder = folder_of(AutoConfig.for_model("llama", **SHARED), tmp_path)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}), "utf-8")
    with pytest.raises(BackboneError, match=f"(?s)quantized with .*{needs}") as refusal:
        Backbone.load(folder)
    assert "unquantized" in str(refusal.value) and "connection" not in str(refusal.value)


def test_a_model_that_continues_no_text_is_refused_by_its_kind(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="is a vit model, which is no causal language model"):
        Backbone.load(folder_of(AutoConfig.for_model("vit"), tmp_path))


def test_only_what_may_be_on_the_hub_is_blamed_on_the_connection(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="connection"):
        Backbone.load("nobody/no-such-model")
    folder = folder_of(AutoConfig.for_model("llama", **SHARED), tmp_path)
    with pytest.raises(BackboneError, match="as save_pretrained writes it") as refusal:
        Backbone.load(folder)
    assert "connection" not in str(refusal.value)
