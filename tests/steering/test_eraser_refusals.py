"""What is no eraser for a backbone: refused with a word that helps, and nothing is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from kveraser.errors import EraserError
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import PAPER_MODULES
from kveraser.steering.layouts import SLOT_EMBEDDINGS
from tests.steering.test_eraser import CONFIG, EXTRAS, SETTINGS, SPAN, TOKENS, WEIGHTS, peft_model, plain, steering
from tests.tiny import attach_random_eraser, distance, tiny_backbone, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter for the tiny Qwen3, written by PEFT."""
    peft_model().save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def other(family: str = "qwen3", **overrides: Any) -> Callable[[Path], Any]:
    return lambda folder: peft_model(family, **overrides).save_pretrained(str(folder))


def other_kind(config: Any) -> Callable[[Path], Any]:
    return lambda folder: get_peft_model(tiny_model("qwen3"), config).save_pretrained(str(folder))


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def matrices(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


def configured(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | values))


def named(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def extras(settings: str, content: dict[str, torch.Tensor] | bytes | None) -> Callable[[Path], Any]:
    def rewrite(folder: Path) -> None:
        (folder / SETTINGS).write_text(settings)
        if isinstance(content, bytes):
            (folder / EXTRAS).write_bytes(content)
        elif content is not None:
            save_file(content, folder / EXTRAS)

    return rewrite


THREE_SLOTS = '{"layout": "compact", "slots": 3}'
LAST_V = "model.layers.2.self_attn.v_proj"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another hidden size": (
        other(hidden_size=48), r"lora_A of model.layers.0.self_attn.q_proj is \[16, 48\] instead of \[16, 32\]",
    ),
    "another head size": (other(head_dim=8), r"layers.0.self_attn.q_proj is \[32, 16\] instead of \[64, 16\]"),
    "more layers": (other(num_hidden_layers=4), "the backbone has no model.layers.3.*11 more differences"),
    "fewer layers": (other(num_hidden_layers=2), "the adapter has no lora_A for model.layers.2.self_attn.q_proj"),
    "another family": (
        lambda folder: attach_random_eraser(tiny_backbone("gpt2"), rank=16).save_pretrained(folder),
        r"the backbone has no transformer.h.0",
    ),
    "a missing A": (matrices(lambda t: t.pop(named(t, f"{LAST_V}.lora_A"))), f"no lora_A for {LAST_V}"),
    "a missing B": (matrices(lambda t: t.pop(named(t, f"{LAST_V}.lora_B"))), f"no lora_B for {LAST_V}"),
    "no matrices": (matrices(lambda t: t.clear()), "the adapter has no lora_A for"),
    "a matrix that is none": (
        matrices(lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)})), "norm.weight is not a",
    ),
    "a matrix for no linear layer": (
        matrices(lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(16, 32)})),
        "does not target model.norm",
    ),
    "a rank that is not the configured one": (configured(r=8), r"is \[16, 32\] instead of \[8, 32\]"),
    "modules that are not configured": (configured(target_modules=["q_proj"]), "does not target model.layers.0.mlp"),
    "modules that are not linear": (
        configured(target_modules=[*PAPER_MODULES, "mlp"]), "model.layers.0.mlp is not a linear layer",
    ),
    "not a number": (
        matrices(lambda t: t[named(t, LAST_V)].view(-1)[3:5].fill_(float("nan"))), "1 matrices hold NaN .*v_proj",
    ),
    "infinity": (matrices(lambda t: t[named(t, LAST_V)].view(-1)[3:5].fill_(float("inf"))), "NaN or infinity"),
    "corrupt weights": (text(WEIGHTS, "no tensors"), "adapter_model.safetensors is corrupt"),
    "empty weights": (text(WEIGHTS, ""), "adapter_model.safetensors is corrupt"),
    "corrupt configuration": (text(CONFIG, "{"), "configuration can't be read"),
    "a configuration that is a list": (text(CONFIG, "[]"), "configuration can't be read"),
    "an empty configuration": (text(CONFIG, "{}"), "is a None adapter: an eraser is a LoRA"),
    "an unknown kind": (configured(peft_type="NONSENSE"), "configuration can't be read"),
    "an alpha that is no number": (configured(lora_alpha="many"), "lora_alpha is 'many'"),
    "no configuration": (without(CONFIG), "has no adapter_config.json"),
    "no weights": (without(WEIGHTS), "has no adapter_model.safetensors"),
    "IA3": (
        other_kind(IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        )), "IA3 adapter: an eraser is a LoRA",
    ),
    "prompt tuning": (
        other_kind(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), "PROMPT_TUNING adapter",
    ),
    "DoRA": (other(config=LoraConfig(target_modules=["q_proj"], use_dora=True)), "a LoRA with use_dora"),
    **{
        f"an initialization that changes the base: {name}": (
            configured(init_lora_weights=name), f"init_lora_weights='{name}', which changes the base model's own",
        )
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "mica", "lora_ga")
    },
    "a LoRA that waits for certain tokens": (
        configured(alora_invocation_tokens=[1, 2]), "a LoRA with alora_invocation_tokens",
    ),
    "broken settings": (text(SETTINGS, "{"), "configuration can't be read"),
    "settings that are a list": (text(SETTINGS, "[1]"), "configuration can't be read"),
    "an unknown setting": (text(SETTINGS, '{"speed": 3}'), "configuration can't be read .*speed"),
    "an unknown layout": (text(SETTINGS, '{"layout": "open"}'), "layout is 'open', but it is one of keep, closed"),
    "a window that is no count": (text(SETTINGS, '{"repair": -1}'), "repair is -1, but it must be a whole number"),
    "a window that is no number": (text(SETTINGS, '{"repair": true}'), "repair is True, but it must be a whole number"),
    "a share that is no number": (text(SETTINGS, '{"repair": 1, "repair_per_span": true}'), "repair_per_span is True"),
    "a negative share": (text(SETTINGS, '{"repair": 1, "repair_per_span": -1}'), "repair_per_span is -1"),
    "the removed layout": (
        text(SETTINGS, '{"repair": 32, "layout": "suffix", "echoes": 0.75}'),
        "layout suffix was removed, because it equaled the method follow: use follow, or train with layout keep",
    ),
    "an infinite share": (text(SETTINGS, '{"repair": 1, "repair_per_span": Infinity}'), "repair_per_span is inf"),
    "slots of another layout": (text(SETTINGS, '{"slots": 3}'), "slots is 3: layout keep takes none"),
    "compact without slots": (text(SETTINGS, '{"layout": "compact"}'), "slots is 0: layout compact"),
    "no slot embeddings": (extras(THREE_SLOTS, None), "kveraser.safetensors can't be read .*No such file"),
    "corrupt slot embeddings": (extras(THREE_SLOTS, b"no tensors"), "kveraser.safetensors can't be read"),
    "too few slot embeddings": (
        extras(THREE_SLOTS, {SLOT_EMBEDDINGS: torch.ones(2, 32)}), r"holds .*\(2, 32\).* needs finite .*\(3, 32\)",
    ),
    "slot embeddings of another size": (extras(THREE_SLOTS, {SLOT_EMBEDDINGS: torch.ones(3, 48)}), r"\(3, 48\)"),
    "slot embeddings that are no numbers": (
        extras(THREE_SLOTS, {SLOT_EMBEDDINGS: torch.full((3, 32), float("nan"))}), "layout compact needs finite",
    ),
    "the extras of another layout": (
        extras(THREE_SLOTS, {"span_bias": torch.ones(1)}), "layout compact needs finite .*slot_embeddings",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def armed() -> Backbone:
    """A Qwen3 with an eraser, which every refusal must leave as it is."""
    backbone = tiny_backbone("qwen3")
    attach_random_eraser(backbone)
    return backbone


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_eraser_for_the_backbone_is_refused_and_touches_nothing(
    name: str, folder: Path, armed: Backbone
) -> None:
    spoil, message = REFUSALS[name]
    spoil(folder)
    bare, eraser = tiny_backbone("qwen3"), armed.eraser
    modules = [list(backbone.model.named_modules()) for backbone in (bare, armed)]
    before = [plain(bare), plain(armed), *steering(armed)]
    for backbone in (bare, armed):
        with pytest.raises(EraserError, match=message):
            backbone.load_eraser(folder)
    assert bare.eraser is None and armed.eraser is eraser
    assert modules == [list(backbone.model.named_modules()) for backbone in (bare, armed)]
    assert distance([plain(bare), plain(armed), *steering(armed)], before) == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("owner/name", "no folder owner/name, and the hub does not give it either"),
        ("no-such-folder", "no eraser at no-such-folder: give a folder"),
        (Path("owner/name"), "no eraser at owner/name: give a folder"),
        ("a/b/c", "no eraser at a/b/c"),
    ],
)
def test_a_source_that_is_not_there_is_refused_without_network(
    source: str | Path, message: str, armed: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    eraser = armed.eraser
    with pytest.raises(EraserError, match=message):
        armed.load_eraser(source)
    assert armed.eraser is eraser


def test_a_hub_id_is_downloaded_without_anything_but_the_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    backbone = tiny_backbone("qwen3")
    assert backbone.load_eraser("owner/name").name == "owner/name"
    assert asked == [("owner/name", ["adapter_*", SETTINGS, EXTRAS])]


def started(start: str) -> LoraConfig:
    return LoraConfig(
        r=16, lora_alpha=32, target_modules=list(PAPER_MODULES), task_type="CAUSAL_LM", init_lora_weights=start
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_took_part_of_the_base_is_refused_and_the_base_stays(start: str, tmp_path: Path) -> None:
    peft_model("qwen3", started(start)).save_pretrained(str(tmp_path))
    backbone = tiny_backbone("qwen3")
    before = plain(backbone)
    with pytest.raises(EraserError, match=f"init_lora_weights='{start}', which changes the base model's own weights"):
        backbone.load_eraser(tmp_path)
    assert torch.equal(plain(backbone), before) and backbone.eraser is None


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_an_adapter_that_leaves_the_base_alone_switches_off_to_the_bit(start: str, tmp_path: Path) -> None:
    peft_model("qwen3", started(start)).save_pretrained(str(tmp_path))
    backbone = tiny_backbone("qwen3")
    before, span = (
        plain(backbone),
        [state for pair in backbone.prefill(TOKENS).read(SPAN.start, SPAN.end) for state in pair],
    )
    backbone.load_eraser(tmp_path)
    assert torch.equal(plain(backbone), before)
    assert distance(steering(backbone), span) > 1e-2


def test_a_base_that_changed_under_an_eraser_is_noticed(folder: Path) -> None:
    backbone = tiny_backbone("qwen3")
    backbone.load_eraser(folder)
    layer = backbone.model.get_submodule(LAST_V)
    with torch.no_grad():
        layer.base_layer.weight += 0.01
    with pytest.raises(EraserError, match=r"changed the base model's own weights.*load the backbone again"):
        backbone.load_eraser(folder)
