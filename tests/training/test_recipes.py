"""The recipes of the project can be read, and those for large models run on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kveraser.training.log import LOG
from kveraser.training.loop import CHECKPOINT, train
from kveraser.training.recipe import Recipe, load_recipe
from tests.tiny import tiny_backbone
from tests.training.test_loop import write_short_cases

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_one_command(path: Path) -> None:
    recipe = load_recipe(path)
    # The folder of a recipe says where everything is; its first lines say how to get there.
    assert Path(recipe.data).parent == path.parent / "data" and Path(recipe.output).parent == path.parent / "runs"
    text = path.read_text("utf-8")
    assert f"kveraser train recipes/{path.name}" in text
    for file in filter(None, (recipe.data, recipe.evaluation.data)):
        assert f"kveraser data build recipes/data/{Path(file).name} " in text
    assert recipe.optimizer.cases_per_step % recipe.optimizer.cases_per_batch == 0


@pytest.mark.parametrize("name", ["smollm2-gpu", "qwen3-8b-h100"])
def test_a_second_stage_starts_where_the_first_one_ends(name: str) -> None:
    first, second = (load_recipe(RECIPES[0].parent / f"{name}-stage{stage}.yaml") for stage in (1, 2))
    assert second.initial is not None and Path(second.initial).resolve() == Path(first.output).resolve() / "best"
    fixed = "backbone", "layout", "repair", "adapter", "precision"
    assert [getattr(first, key) for key in fixed] == [getattr(second, key) for key in fixed]


def test_the_recipes_for_qwen3_run_on_a_tiny_one_with_the_paper_s_settings(tmp_path: Path) -> None:
    backbone = tiny_backbone("qwen3")
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    write_short_cases(tmp_path / "cases.jsonl")
    best: Path | None = None
    for stage in (1, 2):
        path = RECIPES[0].parent / f"qwen3-8b-h100-stage{stage}.yaml"
        recipe = load_recipe(path)
        fields = recipe.model_dump()
        fields |= {"backbone": str(tmp_path / "model"), "data": str(tmp_path / "cases.jsonl")}
        fields |= {"output": str(tmp_path / path.stem), "evaluation": {"cases": 4, "every_steps": 1}}
        fields |= {"initial": best and str(best), "optimizer": {**fields["optimizer"], "cases_per_step": 4}}
        best = train(Recipe(**fields), stop=2)
        lines = [json.loads(line) for line in (tmp_path / path.stem / LOG).read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and all(line["kl"] > 0 for line in lines)
        config = json.loads((best / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.0)
        assert len(config["target_modules"]) == 7
        optimizer = recipe.optimizer
        assert (optimizer.learning_rate, optimizer.weight_decay, recipe.epochs, recipe.seed) == (1e-5, 0.01, 1, 42)
        assert recipe.layout == "keep" and recipe.repair == 0
        assert (tmp_path / path.stem / CHECKPOINT).is_file()
