"""The model families that the tests prove: on a tiny model of each config, every edit is compared with its reference.

The table of `kveraser models` and of docs/models.md. A config's layers decide what loads (`model/support.py`), not this
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL_ATTENTION = ("full_attention",)


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers and what works on it.

    Args:
        model_type: as in `config.json`.
        products: models of this type, as they are called on the hub.
        positions: how its keys carry positions.
        moves_keys: whether methods that move keys work; those that keep positions do on every family.
        limits: which contexts or models of the type are refused.
        layer_types: of the models that are taken.
    """

    model_type: str
    products: str
    positions: str = "rotary"
    moves_keys: bool = True
    limits: str = ""
    layer_types: tuple[str, ...] = FULL_ATTENTION

    @property
    def works(self) -> str:
        """The methods that work."""
        return "all methods" if self.moves_keys else "methods that keep positions"

    @property
    def tested(self) -> str:
        """What the tests ran."""
        return "tiny random model; real weights" if self.model_type == "llama" else "tiny random model"

    def row(self) -> dict[str, Any]:
        """Its row of `kveraser models`."""
        return {
            "model_type": self.model_type,
            "products": self.products,
            "layer_types": ", ".join(self.layer_types),
            "positions": self.positions,
            "works": self.works,
            "limits": self.limits or None,
            "tested": self.tested,
        }


PARTLY, INTERLEAVED, LEARNED = "rotary, part of each head", "rotary, interleaved", "learned"
NO_WINDOW = "a window shorter than the positions is refused"
TEXT_ONLY = "text only"
ORIGINAL = "longrope scaling: up to original_max_position_embeddings"

FAMILIES = (
    Family("llama", "SmolLM2-135M-Instruct, Llama-3.1-8B-Instruct, Llama-3.3-70B-Instruct, TinyLlama-1.1B"),
    Family("qwen2", "Qwen2.5-7B-Instruct, Qwen2.5-Coder-32B, QwQ-32B", limits=NO_WINDOW),
    Family("qwen3", "Qwen3-0.6B to Qwen3-32B, Qwen3-4B-Instruct-2507", limits=NO_WINDOW),
    Family("mistral", "Mistral-7B-Instruct-v0.3, Mistral-Nemo, Mistral-Small-24B", limits=NO_WINDOW),
    Family("phi3", "Phi-3.5-mini-instruct, Phi-4, Phi-4-mini-instruct", limits=f"{NO_WINDOW}; {ORIGINAL}"),
    Family("gemma", "Gemma-2B, Gemma-7B, CodeGemma"),
    Family("gpt_neox", "Pythia, GPT-NeoX-20B", PARTLY),
    Family("gpt2", "GPT-2, DistilGPT-2, Cerebras-GPT", LEARNED, moves_keys=False),
    Family("apertus", "Apertus-8B-Instruct-2509, Apertus-70B-Instruct-2509"),
    Family("arcee", "AFM-4.5B"),
    Family("biogpt", "BioGPT", LEARNED, moves_keys=False),
    Family("bitnet", "bitnet-b1.58-2B-4T"),
    Family("codegen", "CodeGen-350M to 16B", "rotary from a table", moves_keys=False),
    Family("cohere", "Command-R, Command-R+, Aya-Expanse-8B", INTERLEAVED),
    Family("diffllama", "DiffLlama-0.3B-handcut"),
    Family("dots1", "dots.llm1.inst", limits=NO_WINDOW),
    Family("ernie4_5", "ERNIE-4.5-0.3B", INTERLEAVED),
    Family("ernie4_5_moe", "ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B", INTERLEAVED),
    Family("exaone4", "EXAONE-4.0-1.2B", limits=NO_WINDOW),
    Family("falcon", "Falcon-7B, Falcon-40B, Falcon-11B", limits="ALiBi (Falcon-RW) is refused"),
    Family("flex_olmo", "FlexOlmo-7x7B-1T"),
    Family("glm", "GLM-4-9B-Chat", f"{INTERLEAVED}, part of each head"),
    Family("glm4", "GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1", f"{INTERLEAVED}, part of each head"),
    Family("glm4_moe", "GLM-4.5, GLM-4.5-Air, GLM-4.6", PARTLY),
    Family("gpt_bigcode", "StarCoder, SantaCoder", LEARNED, moves_keys=False),
    Family("gptj", "GPT-J-6B", "rotary from a table", moves_keys=False),
    Family("granite", "Granite-3.3-8B-Instruct"),
    Family("granitemoe", "Granite-3.1-3B-A800M"),
    Family(
        "granitemoehybrid", "Granite-4.0-Micro, Granite-4.0-350M", limits="attention layers alone: Mamba is refused"
    ),
    Family("granitemoeshared", "Granite MoE models with a shared expert"),
    Family("helium", "Helium-1-preview-2B", INTERLEAVED),
    Family("hunyuan_v1_dense", "Hunyuan-7B-Instruct, Hunyuan-1.8B", "rotary, before a norm"),
    Family("hunyuan_v1_moe", "Hunyuan-A13B-Instruct", "rotary, before a norm"),
    Family("hy_v3", "Hy3-preview"),
    Family("hyperclovax", "HyperCLOVAX-SEED-Think-14B"),
    Family("jais2", "Jais-2-8B-Chat"),
    Family("jetmoe", "JetMoE-8B"),
    Family("minimax_m2", "MiniMax-M2", PARTLY),
    Family("ministral3", "the text model of Ministral-3-8B", limits=NO_WINDOW),
    Family("mixtral", "Mixtral-8x7B, Mixtral-8x22B", limits=NO_WINDOW),
    Family("nanochat", "nanochat-d20, nanochat-d32", "rotary, clockwise"),
    Family("nemotron", "Minitron-4B-Base, Nemotron-Mini-4B-Instruct", PARTLY),
    Family("olmo", "OLMo-1B, OLMo-7B"),
    Family("olmo2", "OLMo-2-7B, OLMo-2-13B, OLMo-2-32B"),
    Family("olmoe", "OLMoE-1B-7B"),
    Family("opt", "OPT-125M to OPT-66B", LEARNED, moves_keys=False),
    Family("persimmon", "Persimmon-8B", PARTLY),
    Family("phi", "Phi-1.5, Phi-2", PARTLY),
    Family("phimoe", "Phi-3.5-MoE", limits=f"{NO_WINDOW}; {ORIGINAL}"),
    Family("qwen2_moe", "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", limits=NO_WINDOW),
    Family("qwen3_moe", "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B", limits=NO_WINDOW),
    Family("seed_oss", "Seed-OSS-36B-Instruct"),
    Family("smollm3", "SmolLM3-3B", "rotary, and layers without", limits=NO_WINDOW),
    Family("solar_open", "Solar-Open-100B"),
    Family("stablelm", "StableLM-2-1.6B, StableLM-3B-4E1T", PARTLY),
    Family("starcoder2", "StarCoder2 configs without a window; the released ones have one of 4,096", limits=NO_WINDOW),
    Family("xglm", "XGLM-564M to 7.5B", "sinusoidal", moves_keys=False),
    Family("glm4v", "GLM-4.1V-9B-Thinking", INTERLEAVED, limits=TEXT_ONLY),
    Family("internvl", "InternVL3-1B-hf, InternVL3-8B-hf", limits=TEXT_ONLY),
    Family("llava", "LLaVA-1.5-7B-hf", limits=TEXT_ONLY),
    Family("mistral3", "Ministral-3-8B, Mistral-Small-3.2-24B", limits=TEXT_ONLY),
    Family("qwen2_vl", "Qwen2-VL-7B-Instruct", limits=TEXT_ONLY),
    Family("qwen2_5_vl", "Qwen2.5-VL-7B-Instruct", limits=TEXT_ONLY),
    Family("qwen3_vl", "Qwen3-VL-4B-Instruct, Qwen3-VL-8B-Instruct", limits=TEXT_ONLY),
    Family("qwen3_vl_moe", "Qwen3-VL-30B-A3B-Instruct", limits=TEXT_ONLY),
)
