"""The eraser adapter: PEFT's own files, round trips, refusals that touch nothing, and who ever sees it switched on."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from kveraser.backbone import Backbone
from kveraser.eraser import LAYOUTS, PAPER_MODULES, SLOT_EMBEDDINGS, SPAN_BIAS, Eraser, EraserSettings
from kveraser.errors import EraserError
from kveraser.methods import make_method
from kveraser.spans import Span
from tests.tiny import attach_random_eraser, distance, random_tokens, tiny_backbone, tiny_model

TOKENS = random_tokens(40)
SPAN = Span(12, 20)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS, EXTRAS = "kveraser.json", "kveraser.safetensors"
COMPACT, SUFFIX = EraserSettings("compact", slots=3), EraserSettings("suffix", 5, 0.25, echoes=0.5)


def peft_model(family: str = "qwen3", config: Any = None, **overrides: Any) -> Any:
    """A model with an adapter as PEFT itself makes it, with the paper's shape and a random B."""
    shape = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(PAPER_MODULES), task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        generator = torch.manual_seed(1)
        model = get_peft_model(tiny_model(family, **overrides), config or shape)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter for the tiny Qwen3, written by PEFT."""
    peft_model().save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def steering(backbone: Backbone) -> list[torch.Tensor]:
    cache = backbone.prefill(TOKENS)
    with cache.edit():
        make_method("kveraser")(backbone, cache, TOKENS, SPAN)
    return [state for pair in cache.read(SPAN.start, SPAN.end) for state in pair]


def plain(backbone: Backbone) -> torch.Tensor:
    return backbone.logits(backbone.new_cache(), TOKENS, keep=len(TOKENS))


# PEFT's own files


def test_an_adapter_written_by_peft_steers_as_peft_itself_computes(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} >= {CONFIG, WEIGHTS} and not (folder / SETTINGS).exists()
    backbone = tiny_backbone("qwen3")
    eraser = backbone.load_eraser(folder)
    assert eraser.settings == EraserSettings("keep", 0) and len(eraser.parameters()) == 3 * 7 * 2

    model, cache = peft_model().eval(), DynamicCache()
    with torch.no_grad():
        with model.disable_adapter():
            model(input_ids=torch.tensor([TOKENS[: SPAN.start]]), past_key_values=cache)
        model(input_ids=torch.tensor([TOKENS[SPAN.start : SPAN.end]]), past_key_values=cache)
    expected = [state[:, :, SPAN.start :] for layer in cache.layers for state in (layer.keys, layer.values)]
    old = [state for pair in backbone.prefill(TOKENS).read(SPAN.start, SPAN.end) for state in pair]
    assert distance(steering(backbone), expected) < 1e-5 < 1e-2 < distance(steering(backbone), old)


@pytest.mark.parametrize("options", [
    {"target_modules": r".*self_attn\.[qv]_proj"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    {"target_modules": ["k_proj", "down_proj"], "rank_pattern": {"down_proj": 3}, "use_rslora": True},
], ids=["by pattern", "in some layers", "with several ranks"])  # fmt: skip
def test_any_plain_lora_of_peft_loads(tmp_path: Path, options: dict[str, Any]) -> None:
    model = peft_model("llama", LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    model.save_pretrained(str(tmp_path))
    backbone = tiny_backbone()
    eraser = backbone.load_eraser(tmp_path)
    own = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert len(own) == len(eraser.parameters()) > 0
    with backbone.erasing(), torch.no_grad():
        assert distance([plain(backbone)], [model(torch.tensor([TOKENS])).logits[0]]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "gpt2"])
def test_an_eraser_survives_saving_and_loading(tmp_path: Path, family: str) -> None:
    settings = EraserSettings("keep", 5)
    backbone, again = tiny_backbone(family), tiny_backbone(family)
    attach_random_eraser(backbone, settings=settings).save_pretrained(tmp_path / "new" / "folder")
    loaded = again.load_eraser(tmp_path / "new" / "folder")
    assert loaded.settings == settings and loaded.name == str(tmp_path / "new" / "folder")
    assert all(torch.equal(loaded.parameters()[name], value) for name, value in backbone.eraser.parameters().items())  # type: ignore[union-attr]
    assert distance(steering(again), steering(backbone)) == 0
    old = [state for pair in again.prefill(TOKENS).read(SPAN.start, SPAN.end) for state in pair]
    assert distance(steering(again), old) > 1e-2


@pytest.mark.parametrize("settings", [COMPACT, SUFFIX], ids=["compact", "suffix"])
def test_what_a_layout_learns_beside_the_lora_survives_saving_and_loading(
    tmp_path: Path, settings: EraserSettings
) -> None:
    backbone, again = tiny_backbone(), tiny_backbone()
    eraser = attach_random_eraser(backbone, settings=settings)
    with torch.no_grad():
        for extra in eraser.extras.values():
            extra += 0.3 * torch.randn(extra.shape, generator=torch.Generator().manual_seed(4))
    expected = steering(backbone)
    eraser.save_pretrained(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [CONFIG, WEIGHTS, SETTINGS, EXTRAS]
    loaded = again.load_eraser(tmp_path / "whole")
    assert loaded.settings == settings and loaded.parameters().keys() == eraser.parameters().keys()
    assert all(torch.equal(loaded.parameters()[name], value) for name, value in eraser.parameters().items())
    assert len(loaded.parameters()) == 3 * 7 * 2 + 1 and distance(steering(again), expected) == 0
    eraser.save_pretrained(tmp_path / "half", torch.bfloat16)
    for name in (WEIGHTS, EXTRAS):
        assert {value.dtype for value in load_file(tmp_path / "half" / name).values()} == {torch.bfloat16}
    rounded = again.load_eraser(tmp_path / "half")
    assert {value.dtype for value in rounded.extras.values()} == {torch.float32}
    errors = [
        float((value - eraser.parameters()[name]).abs().max() / value.abs().max())
        for name, value in rounded.parameters().items()
    ]
    assert 0 < max(errors) < 1e-2
    assert distance(steering(again), expected) > 0
    # An eraser of a layout without extras leaves none of an earlier one behind.
    attach_random_eraser(tiny_backbone()).save_pretrained(tmp_path / "half")
    assert again.load_eraser(tmp_path / "half").extras == {}


def test_extras_start_as_tokens_the_model_can_read_and_as_a_faint_span() -> None:
    # Gemma scales its embeddings: the slots must be scaled alike. More slots than the vocabulary has tokens are fine.
    backbone = tiny_backbone("gemma")
    slots = backbone.model.config.vocab_size + 5
    drawn = Eraser.untrained(backbone.model, settings=EraserSettings("compact", slots=slots)).extras[SLOT_EMBEDDINGS]
    known = backbone.model.get_input_embeddings()(torch.arange(backbone.model.config.vocab_size)).detach()
    assert drawn.shape == (slots, 32) and drawn.dtype == torch.float32 and not drawn.requires_grad
    assert all(bool((known == row).all(dim=1).any()) for row in drawn)
    other = Eraser.untrained(backbone.model, settings=COMPACT, seed=1).extras[SLOT_EMBEDDINGS]
    assert not torch.equal(other, drawn[:3])
    bias = Eraser.untrained(backbone.model, settings=SUFFIX).extras[SPAN_BIAS]
    assert bias.tolist() == [-5.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EraserSettings("compact"), "slots is 0: layout compact has 1 or more"),
        (EraserSettings("keep", slots=2), "slots is 2: layout compact has 1 or more, the others none"),
        (EraserSettings("suffix"), "repair is 0, but layout suffix needs suffix tokens"),
        (EraserSettings("closed", 0, 0.5), "repair_per_span is 0.5 with a repair of 0"),
        (EraserSettings("suffix", 1, float("nan")), "repair_per_span is nan"),
        (EraserSettings("suffix", 1, echoes=float("inf")), "echoes is inf"),
        (EraserSettings("closed", 1, echoes=0.5), "echoes is 0.5 with layout closed"),
    ],
)
def test_settings_that_no_eraser_can_have_are_refused_and_touch_nothing(settings: EraserSettings, message: str) -> None:
    model = tiny_model()
    modules = list(model.named_modules())
    with pytest.raises(EraserError, match=f"untrained eraser: {message}"):
        Eraser.untrained(model, settings=settings)
    assert modules == list(model.named_modules())


def test_peft_reads_what_the_eraser_writes(tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = tiny_backbone()
    attach_random_eraser(backbone).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
    with backbone.erasing(), torch.no_grad():
        adapted = plain(backbone)
        assert distance([adapted], [model(torch.tensor([TOKENS])).logits[0]]) < 1e-4
    assert distance([adapted], [plain(backbone)]) > 1e-2
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, SETTINGS]


# Refusals


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


THREE_SLOTS, SUFFIX_OF_FIVE = '{"layout": "compact", "slots": 3}', '{"layout": "suffix", "repair": 5}'
LAST_V = "model.layers.2.self_attn.v_proj"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another hidden size": (
        other(hidden_size=48), r"lora_A of model.layers.0.self_attn.q_proj is \[16, 48\], and should be \[16, 32\]",
    ),
    "another head size": (other(head_dim=8), r"lora_B of model.layers.0.self_attn.q_proj is \[32, 16\], .* \[64, 16\]"),
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
    "a rank that is not the configured one": (configured(r=8), r"is \[16, 32\], and should be \[8, 32\]"),
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
    "broken settings": (text(SETTINGS, "{"), "configuration can't be read"),
    "settings that are a list": (text(SETTINGS, "[1]"), "configuration can't be read"),
    "an unknown setting": (text(SETTINGS, '{"speed": 3}'), "configuration can't be read .*speed"),
    "an unknown layout": (text(SETTINGS, '{"layout": "open"}'), "layout is 'open', but it is one of keep, closed"),
    "a window that is no count": (text(SETTINGS, '{"repair": -1}'), "repair is -1, but it is a count"),
    "a window that is no number": (text(SETTINGS, '{"repair": true}'), "repair is True, but it is a count"),
    "a share that is no number": (text(SETTINGS, '{"repair": 1, "repair_per_span": true}'), "repair_per_span is True"),
    "a negative share": (text(SETTINGS, '{"repair": 1, "repair_per_span": -1}'), "repair_per_span is -1"),
    "a negative share of echoes": (text(SETTINGS, '{"repair": 1, "layout": "suffix", "echoes": -1}'), "echoes is -1"),
    "an infinite share": (text(SETTINGS, '{"repair": 1, "repair_per_span": Infinity}'), "repair_per_span is inf"),
    "slots of another layout": (text(SETTINGS, '{"slots": 3}'), "slots is 3: layout compact has 1 or more"),
    "compact without slots": (text(SETTINGS, '{"layout": "compact"}'), "slots is 0: layout compact"),
    "suffix without a window": (text(SETTINGS, '{"layout": "suffix"}'), "repair is 0, but layout suffix needs"),
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
        extras(SUFFIX_OF_FIVE, {SLOT_EMBEDDINGS: torch.ones(3, 32)}), "layout suffix needs finite .*span_bias",
    ),
    "an infinite span bias": (
        extras(SUFFIX_OF_FIVE, {SPAN_BIAS: torch.tensor([float("-inf")])}), "layout suffix needs finite",
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


# Replacing


@pytest.mark.parametrize("modules", [PAPER_MODULES, ("q_proj",)], ids=["seven modules", "one module"])
def test_an_eraser_gives_way_to_one_of_another_rank_without_a_trace(tmp_path: Path, modules: tuple[str, ...]) -> None:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=list(modules), task_type="CAUSAL_LM")
    peft_model(config=config).save_pretrained(str(tmp_path))
    replaced, fresh = tiny_backbone("qwen3"), tiny_backbone("qwen3")
    attach_random_eraser(replaced, rank=3, settings=EraserSettings("closed", 2))
    earlier = steering(replaced)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after, expected = replaced.load_eraser(tmp_path), fresh.load_eraser(tmp_path)
    assert after is replaced.eraser and after.settings == EraserSettings()
    assert {name: value.shape for name, value in after.parameters().items()} == {
        name: value.shape for name, value in expected.parameters().items()
    }
    assert distance(steering(replaced), steering(fresh)) == 0 < distance(steering(replaced), earlier)
    assert distance([plain(replaced)], [plain(tiny_backbone("qwen3"))]) == 0


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_an_untrained_eraser_has_the_papers_shape_and_changes_nothing(family: str) -> None:
    backbone, before = tiny_backbone(family), plain(tiny_backbone(family))
    for rank in (16, 5):
        state = torch.random.get_rng_state()
        backbone.eraser = Eraser.untrained(backbone.model, rank=rank)
        assert torch.equal(torch.random.get_rng_state(), state)
        parameters = backbone.eraser.parameters()
        modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in parameters}
        fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert modules == (fused if family == "phi3" else set(PAPER_MODULES))
        assert len(parameters) == 3 * 2 * len(modules)
        assert all(rank in value.shape for value in parameters.values())
        with backbone.erasing():
            assert torch.equal(plain(backbone), before)
    assert LAYOUTS[0] == backbone.eraser.settings.layout  # type: ignore[union-attr]


# Who sees it


def test_the_adapter_is_on_inside_erasing_and_off_outside_also_after_an_exception() -> None:
    backbone = tiny_backbone()
    before = plain(backbone)
    attach_random_eraser(backbone)
    assert torch.equal(plain(backbone), before)
    with backbone.erasing():
        assert distance([plain(backbone)], [before]) > 1e-2
    assert torch.equal(plain(backbone), before)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), backbone.erasing():
            assert distance([plain(backbone)], [before]) > 1e-2
            raise error
        assert torch.equal(plain(backbone), before)


def test_another_thread_never_sees_the_adapter() -> None:
    backbone = tiny_backbone()
    before = plain(backbone)
    attach_random_eraser(backbone)
    waiting, seen = threading.Event(), []

    class Lock:
        """The backbone's lock, which also tells when somebody has to wait for it."""

        def __init__(self, lock: Any) -> None:
            self.lock = lock

        def __enter__(self) -> None:
            if not self.lock.acquire(blocking=False):
                waiting.set()
                self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()

    backbone.lock = Lock(backbone.lock)  # type: ignore[assignment]
    thread = threading.Thread(target=lambda: seen.append(plain(backbone)))
    with backbone.erasing():
        thread.start()
        assert waiting.wait(timeout=60), "the other thread went ahead while the adapter was on"
        assert distance([plain(backbone)], [before]) > 1e-2 and not seen
    thread.join(timeout=60)
    assert len(seen) == 1 and torch.equal(seen[0], before)
