"""The backbone: which models it takes, how it is loaded, its forward passes, its limits, and its fingerprint."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from kveraser.errors import BackboneError, ContextLengthError, UnsupportedModelError
from kveraser.model import backbone as backbone_module
from kveraser.model import bundled
from kveraser.model.backbone import DEFAULT_BACKBONE, Backbone
from tests.tiny import (
    DEVICE,
    FAMILIES,
    POSITIONS,
    attach_random_eraser,
    distance,
    random_tokens,
    same_bits,
    snapshot,
    tiny_backbone,
    tiny_model,
    tiny_tokenizer,
)

TOKENS = random_tokens(40)
TOLERANCE = 1e-4

# Which models it takes

MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Gemma 2": ("gemma2", {"head_dim": 8}, "sliding_attention"),
    "Gemma 3": ("gemma3_text", {"head_dim": 8}, "sliding_attention"),
    "Mistral with a window": ("mistral", {"sliding_window": 64}, "sliding_attention"),
    "Phi-3 with a window": ("phi3", {"sliding_window": POSITIONS - 1}, "sliding_attention"),
    "Qwen2 with windows in some layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding_attention",
    ),
    "Llama 4": (
        "llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48}, "chunked_attention",
    ),
    "GPT-Neo": (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "num_hidden_layers": 2},
        "local_attention",
    ),
    "Mamba": ("mamba", {}, "linear_attention"),
    "RWKV": ("rwkv", {}, "linear_attention"),
    "Jamba": ("jamba", {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}, "linear_attention"),
    "Bamba": (
        "bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        "linear_attention",
    ),
    "DeepSeek-V3": ("deepseek_v3", MLA, "multi_head_latent_attention"),
    "BLOOM": ("bloom", {"n_layer": 3, "n_head": 4}, "implicit_positions"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_cache_that_can_not_be_edited_exactly_is_refused_by_layer_type(name: str) -> None:
    family, overrides, layer_type = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=f"tiny-{family}: layers of type '{layer_type}'") as refusal:
        tiny_backbone(family, **overrides)
    assert refusal.value.layer_type == layer_type


def test_an_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=270, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4))
    with pytest.raises(UnsupportedModelError, match=r"T5ForConditionalGeneration.*cross_attention"):
        Backbone(model, tiny_tokenizer())


@pytest.mark.parametrize("family", ["phi3", "mistral"])
def test_a_window_that_no_position_can_leave_is_full_attention(family: str) -> None:
    windowed, full = (tiny_backbone(family, sliding_window=window) for window in (POSITIONS, None))
    tokens = random_tokens(POSITIONS - 1)
    assert torch.equal(windowed.logits(windowed.prefill(tokens), [7]), full.logits(full.prefill(tokens), [7]))
    assert windowed.fingerprint == full.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_are_taken_frozen_and_in_eval_mode(family: str) -> None:
    model = tiny_model(family).train()
    backbone = Backbone(model, tiny_tokenizer())
    assert backbone.layers == 3 and backbone.max_positions == POSITIONS and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer, as transformers saves them."""
    target = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(target)
    tiny_tokenizer().save_pretrained(target)
    return target


def test_a_folder_loads_as_it_was_saved(folder: Path) -> None:
    loaded, built = Backbone.load(folder), tiny_backbone()
    assert loaded.name == str(folder) and loaded.tokenizer.chat_template == built.tokenizer.chat_template
    weights = [list(backbone.model.state_dict().values()) for backbone in (loaded, built)]
    assert distance(*weights) == 0
    # Weights mapped from a file lie elsewhere in memory, for which the kernels round otherwise.
    answers = [backbone.logits(backbone.prefill(TOKENS[:30]), TOKENS[30:], keep=10) for backbone in (loaded, built)]
    assert distance(*[[answer] for answer in answers]) < TOLERANCE < float(answers[0].std())


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_the_dtype_is_chosen_by_name_or_as_it_is(folder: Path, dtype: Any) -> None:
    assert Backbone.load(folder).model.dtype == torch.float32
    backbone = Backbone.load(folder, dtype=dtype, device="cpu")
    assert backbone.model.dtype == torch.bfloat16 and backbone.device.type == "cpu"
    assert backbone.prefill(TOKENS).layers[0].keys.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert backbone.logits(backbone.prefill(TOKENS), TOKENS).dtype == torch.float32


@pytest.mark.parametrize(
    ("cuda", "device", "expected"),
    [
        (True, None, ("cuda", torch.bfloat16)),
        (True, "cpu", ("cpu", torch.float32)),
        (False, None, ("cpu", torch.float32)),
    ],
)
def test_a_gpu_is_used_where_there_is_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cuda: bool, device: str | None, expected: tuple[str, torch.dtype]
) -> None:
    chosen: list[Any] = []

    class Model:
        def to(self, device: str) -> Any:
            chosen.append(device)
            return tiny_model()

    def from_pretrained(source: str, dtype: torch.dtype) -> Model:
        chosen.append(dtype)
        return Model()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    Backbone.load(folder, device=device)
    assert chosen == [expected[1], expected[0]]


def test_the_default_is_the_bundled_backbone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "bundled_backbone_folder", lambda: folder)
    backbone = Backbone.load(eraser=None)
    assert backbone.name == DEFAULT_BACKBONE and backbone.fingerprint == tiny_backbone().fingerprint


def test_an_eraser_loads_with_its_backbone(folder: Path, tmp_path: Path) -> None:
    attach_random_eraser(tiny_backbone()).save_pretrained(tmp_path)
    backbone = Backbone.load(folder, eraser=tmp_path)
    assert backbone.eraser is backbone.require_eraser() and backbone.eraser.name == str(tmp_path)


def not_a_model(folder: Path) -> Path:
    (folder / "config.json").write_text("{")
    return folder


def not_causal(folder: Path) -> Path:
    T5Config(vocab_size=270).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda folder: "nobody/no-such-model", "can't load the backbone nobody/no-such-model .*check the connection"),
        (lambda folder: folder / "missing", "can't load the backbone .*missing"),
        (lambda folder: folder, "can't load the backbone"),
        (not_a_model, "can't load the backbone"),
        (not_causal, "cross_attention"),
    ],
    ids=["unknown id", "no folder", "empty folder", "no model", "not a causal language model"],
)
def test_what_is_no_causal_language_model_is_refused(
    source: Callable[[Path], str | Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match=message):
        Backbone.load(source(tmp_path))


@pytest.mark.parametrize("dtype", ["float99", "Tensor"])
def test_an_unknown_dtype_is_refused_before_anything_is_loaded(dtype: str) -> None:
    with pytest.raises(BackboneError, match=f"no dtype '{dtype}': use float32, bfloat16 or float16"):
        Backbone.load("no/such-model", dtype=dtype)


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, kveraser; kveraser.__version__; dir(kveraser);"
        "heavy = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; kveraser.EditableCache; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import kveraser

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kveraser.nonsense
    assert all(getattr(kveraser, name) is not None for name in kveraser.__all__)


# Passes


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, done = tiny_backbone(family), []
    whole = backbone.prefill(TOKENS)
    monkeypatch.setattr(backbone_module, "PREFILL_CHUNK", 16)
    chunked = backbone.prefill(TOKENS, lambda tokens, count: done.append((tokens, count)))
    assert done == [(16, 40), (32, 40), (40, 40)]
    pairs = [[state for pair in cache.read(0, 40) for state in pair] for cache in (whole, chunked)]
    assert distance(*pairs) < TOLERANCE < 0.1 < min(float(state.std()) for state in pairs[0])
    assert chunked.exact_length == chunked.next_position == 40


def test_logits_of_the_last_tokens_equal_the_models_own(backbone_of_family: Backbone) -> None:
    cache = backbone_of_family.prefill(TOKENS[:20])
    logits = backbone_of_family.logits(cache, TOKENS[20:], keep=5)
    with torch.no_grad():
        own = backbone_of_family.model(torch.tensor([TOKENS], device=DEVICE), use_cache=False).logits[0, -5:]
    assert logits.shape == own.shape and distance([logits], [own]) < TOLERANCE < float(own.std())
    assert cache.length == 40 and cache.exact_length == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["before", "after", "progress"])
@pytest.mark.parametrize("holed", [False, True], ids=["exact", "with a hole"])
def test_an_interrupt_in_the_second_chunk_leaves_the_cache_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: str, holed: bool
) -> None:
    backbone, calls = tiny_backbone(), [0]
    cache, forward = backbone.prefill(TOKENS), backbone.forward
    if holed:
        with cache.edit():
            cache.drop(10, 15)
            cache.set_next_position(60)
    before = snapshot(cache)

    def interrupted(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 and when == "before":
            raise error
        forward(*arguments)
        if calls[0] == 2 and when == "after":
            raise error

    def progress(done: int, count: int) -> None:
        if calls[0] == 2 and when == "progress":
            raise error

    monkeypatch.setattr(backbone_module, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(backbone, "forward", interrupted)
    with pytest.raises(error):
        backbone.extend(cache, random_tokens(30, seed=2), progress)
    assert calls == [2] and same_bits(snapshot(cache), before)
    backbone.extend(cache, random_tokens(30, seed=2))
    assert cache.length == before["length"] + 30 and cache.next_position == before["next_position"] + 30


def test_an_error_while_computing_logits_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    head = backbone.model.lm_head

    def broken(states: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(head, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        backbone.logits(cache, TOKENS)
    assert same_bits(snapshot(cache), before)


@pytest.mark.parametrize("holed", [False, True], ids=["exact", "with a hole"])
def test_too_long_a_context_is_refused_with_nothing_computed(monkeypatch: pytest.MonkeyPatch, holed: bool) -> None:
    backbone = tiny_backbone(max_position_embeddings=64)
    cache = backbone.prefill(TOKENS)
    if holed:
        with cache.edit():
            cache.drop(10, 15)
    before, fitting = snapshot(cache), random_tokens(24)
    assert backbone.logits(cache.fork(), fitting).shape[0] == 1
    monkeypatch.setattr(backbone.model, "forward", None)
    for refused in (lambda: backbone.extend(cache, [*fitting, 5]), lambda: backbone.logits(cache, [*fitting, 5])):
        with pytest.raises(ContextLengthError, match="25 tokens from position 40 end at 65, beyond the 64 positions"):
            refused()
    with pytest.raises(ContextLengthError, match="65 tokens from position 0 end at 65"):
        backbone.prefill(random_tokens(65))
    assert same_bits(snapshot(cache), before)


def test_positions_are_whole_numbers_where_they_can_be(backbone: Backbone) -> None:
    whole = backbone.position_ids(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert whole.dtype == torch.int64 and whole.tolist() == [[3, 4]]
    between = backbone.position_ids(torch.tensor([3.0, 3.5], dtype=torch.float64))
    assert between.dtype == torch.float32 and between.tolist() == [[3.0, 3.5]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mask_is_given_in_the_form_that_the_attention_takes(implementation: str) -> None:
    backbone = tiny_backbone(attn_implementation=implementation)
    wanted = [[True, True, False, False, False], [True, True, True, True, False]]
    mask = backbone.attention_mask(torch.tensor(wanted))
    visible = mask if implementation == "sdpa" else mask == 0
    assert mask.dtype == (torch.bool if implementation == "sdpa" else torch.float32)
    assert visible[0, 0].tolist() == wanted


def test_an_attention_that_takes_no_mask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    monkeypatch.setattr(backbone.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(BackboneError, match="'flash_attention_2', which takes no mask of its own"):
        backbone.attention_mask(torch.ones(1, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ("template", "front"),
    [("$A", []), ("<|im_start|> $A", [1]), ("<|im_start|> $A <|im_end|>", [1]), ("$A <|im_end|>", [])],
)
def test_a_beginning_marker_comes_in_front_and_an_end_marker_never(template: str, front: list[int]) -> None:
    tokenizer, text = tiny_tokenizer(), "the cañon is on"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    backbone = Backbone(tiny_model(), tokenizer)
    plain, offsets = backbone.tokenize(text)
    assert len(plain) == len(offsets) > 5 and 2 not in plain and 1 not in plain
    assert backbone.tokenize(text, special=True) == ([*front, *plain], [*[(0, 0)] * len(front), *offsets])
    assert tokenizer.decode(plain) == text and text[slice(*offsets[0])] == "t"


# The fingerprint


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_is_stable_across_loads_and_erasers(family: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(family)
    before = backbone.fingerprint
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    attach_random_eraser(backbone).save_pretrained(tmp_path / "eraser")
    assert len(before) == 64 and backbone.fingerprint == before
    assert Backbone.load(tmp_path).fingerprint == before
    assert Backbone.load(str(tmp_path), eraser=tmp_path / "eraser").fingerprint == before


def test_the_fingerprint_differs_by_weights_dtype_and_configuration() -> None:
    nudged = tiny_model()
    with torch.no_grad():
        nudged.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    rotated = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    half = tiny_model().bfloat16()
    models = [tiny_model(), tiny_model(seed=1), half, tiny_model().bfloat16().float(), tiny_model(**rotated), nudged]
    prints = [Backbone(model, tiny_tokenizer()).fingerprint for model in models]
    assert len(set(prints)) == len(models)


def test_a_model_that_attends_both_ways_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="logits are others than without") as refused:
        tiny_backbone("bert", is_decoder=False)
    assert refused.value.layer_type == "unknown_attention"
