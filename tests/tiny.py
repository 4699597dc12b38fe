"""Tiny random models and tokenizers, built from configs in code: the oracles of every test, never downloaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from kveraser.cache.editable import EditableCache
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import Eraser, EraserSettings

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ t", "h e", "Ġt he", "o n", "i n", "in g")
TOKENS = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES))
VOCABULARY = len(TOKENS)
POSITIONS = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with a default system prompt, as the bundled backbone has it."""

SHARED = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

DEVICE = os.environ.get("KVERASER_TEST_DEVICE", "cpu")
"""Where tiny models lie."""

MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED = {
    **MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
FULL_LAYERS = ["full_attention"] * 3
SMALL_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
}  # fmt: skip
QWEN3_VISION = {**QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}


def partial(share: float) -> dict[str, Any]:
    """Rotary settings that turn this share of every head."""
    return {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": share}


FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": None},
    "phi3": {"sliding_window": None},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gpt_neox": {"rope_parameters": partial(0.5)},
    "gpt2": {},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {"logit_scale": 1.0, "use_qk_norm": True},
    "diffllama": {},
    "dots1": {**GROUPED, "sliding_window": None},
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {"layer_types": FULL_LAYERS, "sliding_window": None},
    "falcon": {},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": GROUPED,
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {
        "num_local_experts": 0, "shared_intermediate_size": 48, "mamba_n_heads": 8, "mamba_d_head": 8,
        "layer_types": ["attention"] * 3, "position_embedding_type": "rope",
    },
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**MOE, "num_experts": 4, "head_dim": 8},
    "hyperclovax": {"head_dim": 8},
    "jais2": {},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": partial(0.5)},
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nanochat": {},
    "nemotron": {"rope_parameters": partial(0.5)},
    "olmo": {},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {"rope_parameters": partial(0.5)},
    "phi": {"rope_parameters": partial(0.5)},
    "phimoe": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MOE, "num_experts": 4, "head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": False},
    "solar_open": {**GROUPED, "head_dim": 8},
    "stablelm": {"qk_layernorm": True, "rope_parameters": partial(0.5)},
    "starcoder2": {"sliding_window": None},
    "xglm": {"ffn_dim": 48},
    "glm4v": {"text_config": {"rope_parameters": SECTIONS}, "vision_config": {**QWEN_VISION, "image_size": 28}},
    "internvl": {
        "text_config": {"model_type": "qwen3", "head_dim": 8},
        "vision_config": {**SMALL_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "llava": {
        "text_config": {"model_type": "llama"}, "vision_config": {**SMALL_VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {"model_type": "ministral3", "head_dim": 8},
        "vision_config": {**SMALL_VISION, "model_type": "pixtral"},
    },
    "qwen2_vl": {
        "text_config": {"rope_parameters": SECTIONS},
        "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": SECTIONS}, "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {"text_config": {"head_dim": 8, "rope_parameters": SECTIONS}, "vision_config": QWEN3_VISION},
    "qwen3_vl_moe": {
        "text_config": {**MOE, "num_experts": 4, "head_dim": 8, "rope_parameters": SECTIONS},
        "vision_config": QWEN3_VISION,
    },
}  # fmt: skip
"""A tiny config of every family of `kveraser.model.families`."""

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt_neox", "gpt2")
"""The families that every method and layout is run on; the others pass through tests/model/test_families.py."""
ROTARY_FAMILIES = tuple(family for family in FAMILIES if family != "gpt2")


def tiny_config(family: str = "llama", **overrides: Any) -> Any:
    """The config of `tiny_model`; for a model with images, `overrides` are of its text."""
    settings = FAMILY_SETTINGS.get(family, {})
    if "text_config" in settings:
        text = {**SHARED, **settings["text_config"], **overrides}
        return AutoConfig.for_model(family, text_config=text, vision_config=settings["vision_config"])
    return AutoConfig.for_model(family, **{**SHARED, **settings, **overrides})


def tiny_model(family: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    """A random model of `family` (a `model_type` of transformers), with its biases and norms away from their start.

    Weights are large, so that tokens change one another's states a lot and a tolerance of 1e-4 on logits means much.
    It lies on `DEVICE`.
    """
    config = tiny_config(family, **overrides)
    multimodal = "text_config" in FAMILY_SETTINGS.get(family, {})
    auto_class: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
    return model.to(DEVICE).eval()


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges and three special tokens; with `chat` it has a ChatML template."""
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_backbone(family: str = "llama", chat: bool = True, seed: int = 0, **overrides: Any) -> Backbone:
    """A backbone of a tiny random model; `overrides` are settings of its config."""
    return Backbone(tiny_model(family, seed, **overrides), tiny_tokenizer(chat), name=f"tiny-{family}")


def attach_random_eraser(
    backbone: Backbone, seed: int = 0, settings: EraserSettings | None = None, rank: int = 4, scale: float = 0.2
) -> Eraser:
    """Give `backbone` an eraser whose B is random, so that switching it on changes every state a lot."""
    eraser = Eraser.untrained(backbone.model, rank=rank, alpha=2 * rank, settings=settings, seed=seed)
    randomize(eraser, seed, scale)
    backbone.eraser = eraser
    return eraser


def randomize(eraser: Eraser, seed: int = 0, scale: float = 0.2) -> None:
    """Fill every B of the adapter with random numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in eraser.parameters().items():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids of ordinary text, no special tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (count,), generator=generator).tolist()


def snapshot(cache: EditableCache) -> dict[str, Any]:
    """All that a cache holds, copied: what undo must bring back."""
    pairs = cache.read(0, cache.length) if cache.length else []
    return {
        "length": cache.length,
        "keys": [keys.clone() for keys, _ in pairs],
        "values": [values.clone() for _, values in pairs],
        "positions": cache.positions.clone(),
        "next_position": cache.next_position,
        "exact_length": cache.exact_length,
    }


def same_bits(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two snapshots agree in every bit."""
    counts = ("length", "next_position", "exact_length")
    return (
        all(first[name] == second[name] for name in counts)
        and torch.equal(first["positions"], second["positions"])
        and all(
            len(first[name]) == len(second[name])
            and all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True))
            for name in ("keys", "values")
        )
    )


def distance(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The largest difference between two lists of tensors, one a layer; infinite where shapes differ."""
    if [one.shape for one in first] != [other.shape for other in second]:
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
