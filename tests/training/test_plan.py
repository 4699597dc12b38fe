"""Plans: exact parameters and states, measured computation and memory, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from kveraser.errors import ContextLengthError, InputError, UnsupportedModelError
from kveraser.steering.eraser import EraserSettings
from kveraser.training.build import BuildSettings, build_cases
from kveraser.training.cases import TokenizedCase
from kveraser.training.cost import case_flops, case_shape, memory, model_shape
from kveraser.training.distill import case_losses, prepare
from kveraser.training.linear import COPIES
from kveraser.training.plan import load_tokenizer, plan
from kveraser.training.recipe import Recipe
from tests.tiny import FAMILIES, attach_random_eraser, random_tokens, tiny_backbone
from tests.training.test_build import PASSAGES

CASE = TokenizedCase(
    id="case",
    task="test",
    prefix=tuple(random_tokens(20, 1)),
    span=tuple(random_tokens(9, 2)),
    suffix=tuple(random_tokens(25, 3)),
    queries=(
        (tuple(random_tokens(6, 4)), tuple(random_tokens(4, 5))),
        (tuple(random_tokens(3, 6)), tuple(random_tokens(7, 7))),
    ),
    kinds=("influence", "no_harm"),
)
VARIANTS = [
    EraserSettings("keep"),
    EraserSettings("closed", 6),
    EraserSettings("compact", 6, slots=5),
]
QWEN3_8B = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip


def recipe_of(data: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "data": str(data),
        "output": "run",
        "optimizer": {"cases_per_step": 3, "cases_per_batch": 2},
        "evaluation": {"cases": 2},
        "epochs": 2,
    }
    return Recipe(**fields | changes)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    build_cases(path, PASSAGES, BuildSettings(cases=12, context=(40, 50), span=(4, 8)))
    return path


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: settings.layout)
def test_trainable_parameters_are_those_of_the_layout(settings: EraserSettings) -> None:
    backbone = tiny_backbone()
    shape = model_shape(backbone.model.config, Recipe(data="d", output="o", adapter={"rank": 3}), settings)
    own = attach_random_eraser(backbone, settings=settings, rank=3).parameters()
    assert shape.trainable == sum(parameter.numel() for parameter in own.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_states_match_the_model(family: str) -> None:
    backbone = tiny_backbone(family)
    shape = model_shape(backbone.model.config, Recipe(data="d", output="o", adapter={"rank": 3}), VARIANTS[0])
    assert shape.parameters == sum(parameter.numel() for parameter in backbone.model.parameters())
    tokens = random_tokens(17)
    assert shape.kv_bytes(17, 4) == backbone.prefill(tokens).nbytes > 0
    own = attach_random_eraser(backbone, rank=3).parameters()
    assert shape.trainable == sum(parameter.numel() for parameter in own.values())


def test_the_eraser_of_the_paper_has_the_published_size() -> None:
    shape = model_shape(AutoConfig.for_model("qwen3", **QWEN3_8B), Recipe(data="d", output="o"), VARIANTS[0])
    assert shape.trainable == 43_646_976
    assert shape.parameters == 8_190_735_360


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda settings: settings.layout)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_computation_and_memory_match_a_measured_case(family: str, settings: EraserSettings) -> None:
    backbone = tiny_backbone(family, num_hidden_layers=8)
    # Its products are all counted, while fused kernels skip some.
    backbone.model.config._attn_implementation = "eager"
    eraser = attach_random_eraser(backbone, settings=settings, rank=16)
    for parameter in eraser.parameters().values():
        parameter.requires_grad_(True)
    shape = model_shape(backbone.model.config, Recipe(data="d", output="o"), settings)
    flops = case_flops(shape, case_shape(CASE), settings)
    with FlopCounterMode(display=False) as counted:
        prepared = prepare(backbone, [CASE])
    assert counted.get_total_flops() == flops["prefill"] + flops["teacher"]
    backbone.model.config._attn_implementation = "sdpa"
    weights = {parameter.untyped_storage().data_ptr() for parameter in backbone.model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case_losses(backbone, prepared, settings, "kl", 1.0).sum()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    parts = {part.part: part.bytes for part in memory(shape, case_shape(CASE), settings, 4)}
    assert 0.95 * saved < parts["kv"] + parts["activations"] + parts["logits"] < 1.4 * saved
    backbone.model.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counted:
        case_losses(backbone, prepared, settings, "kl", 1.0).sum().backward()
    gradients = flops["steering"] + flops["repair"] + flops["queries"]
    # No gradient is needed below the first layer's projections, nor behind the last layer's keys and values.
    assert 0.9 * gradients < counted.get_total_flops() < gradients


def test_memory_counts_batches_and_bytes_a_value() -> None:
    shape = model_shape(AutoConfig.for_model("qwen3", **QWEN3_8B), Recipe(data="d", output="o"), VARIANTS[0])
    one, two = (memory(shape, case_shape(CASE), VARIANTS[0], 2, batch) for batch in (1, 2))
    for part, doubled in zip(one[:-1], two[:-1], strict=True):
        assert doubled.bytes == part.bytes * (1 if part.part in ("weights", "adapter") else 2)
    assert one[0].bytes == 2 * 8_190_735_360 and one[1].bytes == 16 * 43_646_976
    assert one[-1].part == "total" and one[-1].bytes == sum(part.bytes for part in one[:-1])


def test_a_plan_counts_steps_and_measures_this_machine(model: str, cases: Path) -> None:
    planned = plan(recipe_of(cases, backbone=model))
    assert (planned.cases, planned.steps, planned.queries_per_step) == (10, 6, 12)
    assert plan(recipe_of(cases, backbone=model, evaluation={"data": str(cases), "cases": 2})).steps == 8
    assert planned.exact_tokens and planned.longest * 3 > planned.tokens_per_step > 3 * 50
    here, there = planned.estimates
    assert (here.precision, there.precision) == ("float32", "bfloat16")
    # On a CPU, linear layers compute with packed copies of the weights.
    assert here.memory[0].bytes in (4 * planned.parameters, 4 * COPIES * planned.parameters)
    assert there.memory[0].bytes == 2 * planned.parameters
    total = sum(planned.flops_per_step.values())
    assert here.seconds_per_step == pytest.approx(total / here.flops_per_second)
    assert here.hours == pytest.approx(6 * here.seconds_per_step / 3600)
    assert there.flops_per_second == pytest.approx(0.4 * 989e12)
    limited = plan(recipe_of(cases, backbone=model, max_minutes=1e-9)).estimates
    assert all(one.hours == pytest.approx(1e-9 / 60) for one in limited)


def test_a_configuration_is_enough_for_a_plan(model: str, cases: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"owner/name.*--config FOLDER"):
        plan(recipe_of(cases, backbone="owner/name"))
    (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
    planned = plan(recipe_of(cases, backbone="owner/name"), str(tmp_path))
    exact = plan(recipe_of(cases, backbone="owner/name"), model)
    assert (planned.exact_tokens, exact.exact_tokens) == (False, True)
    assert (planned.parameters, planned.trainable, planned.steps) == (exact.parameters, exact.trainable, exact.steps)
    assert len(planned.estimates) == 1 and planned.estimates[0].device == "H100 at 40%"


def test_plans_refuse_what_training_refuses(model: str, cases: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="build more"):
        plan(recipe_of(cases, backbone=model, evaluation={"cases": 10}))
    with pytest.raises(InputError, match="no case file"):
        plan(recipe_of(tmp_path / "missing.jsonl", backbone=model))
    AutoConfig.for_model("llama", max_position_embeddings=64, **{"vocab_size": 300}).save_pretrained(tmp_path)
    with pytest.raises(ContextLengthError, match="64 positions"):
        plan(recipe_of(cases, backbone="owner/name"), str(tmp_path))
    AutoConfig.for_model("gpt_neo").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="local"):
        plan(recipe_of(cases, backbone="owner/name"), str(tmp_path))
