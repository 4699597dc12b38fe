"""The eraser adapter: PEFT's own files, round trips, replacing one, and who ever sees it switched on."""

from __future__ import annotations

import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache

from kveraser.errors import EraserError
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import PAPER_MODULES, Eraser, EraserSettings
from kveraser.steering.layouts import LAYOUTS, SLOT_EMBEDDINGS
from kveraser.text.spans import Span
from tests.tiny import DEVICE, attach_random_eraser, distance, random_tokens, tiny_backbone, tiny_model

TOKENS = random_tokens(40)
SPAN = Span(12, 20)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS, EXTRAS = "kveraser.json", "kveraser.safetensors"
COMPACT = EraserSettings("compact", slots=3)


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


# Models whose linear layers are not all the paper's


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "mixtral", "qwen2_5_vl", "mistral3", "qwen3_vl_moe"])
def test_an_untrained_eraser_adapts_what_text_runs_through_and_is_a_plain_lora(family: str, tmp_path: Path) -> None:
    backbone, again = tiny_backbone(family), tiny_backbone(family)
    eraser = attach_random_eraser(backbone)
    modules = {name.split(".lora_")[0] for name in eraser.parameters()}
    assert not any(part in name for name in modules for part in ("visual", "vision", "projector", "experts", "gate."))
    assert len(modules) == backbone.layers * (7 if family in ("qwen2_5_vl", "mistral3") else 4)
    before = plain(backbone)
    eraser.save_pretrained(tmp_path)
    again.load_eraser(tmp_path)
    assert distance(steering(again), steering(backbone)) < 1e-4 and torch.equal(plain(backbone), before)
    unsteered = [state for pair in backbone.prefill(TOKENS).read(SPAN.start, SPAN.end) for state in pair]
    assert distance(steering(backbone), unsteered) > 0.01


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
        assert distance([plain(backbone)], [model(torch.tensor([TOKENS], device=DEVICE)).logits[0]]) < 1e-4


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


def test_what_a_layout_learns_beside_the_lora_survives_saving_and_loading(tmp_path: Path) -> None:
    settings = COMPACT
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


def test_settings_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings("closed", 3)).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**settings, "echoes": 0.0}))
    assert tiny_backbone().load_eraser(tmp_path).settings == EraserSettings("closed", 3)


def test_extras_start_as_tokens_the_model_can_read() -> None:
    # Gemma scales its embeddings: the slots must be scaled alike. More slots than the vocabulary has tokens are fine.
    backbone = tiny_backbone("gemma")
    slots = backbone.model.config.vocab_size + 5
    drawn = Eraser.untrained(backbone.model, settings=EraserSettings("compact", slots=slots)).extras[SLOT_EMBEDDINGS]
    known = backbone.model.get_input_embeddings()(torch.arange(backbone.model.config.vocab_size)).detach()
    assert drawn.shape == (slots, 32) and drawn.dtype == torch.float32 and not drawn.requires_grad
    assert all(bool((known == row).all(dim=1).any()) for row in drawn)
    other = Eraser.untrained(backbone.model, settings=COMPACT, seed=1).extras[SLOT_EMBEDDINGS]
    assert not torch.equal(other, drawn[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (EraserSettings("compact"), "slots is 0: layout compact takes 1 or more"),
        (EraserSettings("keep", slots=2), "slots is 2: layout keep takes none"),
        (EraserSettings("suffix", 8), "layout suffix was removed"),  # type: ignore[arg-type]
        (EraserSettings("closed", 0, 0.5), "repair_per_span is 0.5 with a repair of 0"),
        (EraserSettings("closed", 1, float("nan")), "repair_per_span is nan"),
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
        assert distance([adapted], [model(torch.tensor([TOKENS], device=DEVICE)).logits[0]]) < 1e-4
    assert distance([adapted], [plain(backbone)]) > 1e-2
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS, SETTINGS]


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
    assert next(iter(LAYOUTS)) == backbone.eraser.settings.layout  # type: ignore[union-attr]


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_pass_without_gradients_computes_what_peft_computes(family: str) -> None:
    backbone = tiny_backbone(family)
    eraser = attach_random_eraser(backbone)
    tokens = torch.tensor([random_tokens(24)])

    def last() -> torch.Tensor:
        with eraser.active():
            output: torch.Tensor = backbone.model.base_model(input_ids=tokens).last_hidden_state
        return output.detach()

    with torch.no_grad():
        bare = backbone.model.base_model(input_ids=tokens).last_hidden_state
        in_place = last()
    # With gradients on, PEFT's own forward pass runs.
    assert (in_place - last()).norm() < 1e-5 * in_place.norm()
    assert (in_place - bare).norm() > 0.1 * bare.norm()
