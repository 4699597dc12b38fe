"""The training loop on a tiny model: it learns, resumes to the bit, and loses nothing when something goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kveraser.backbone import Backbone
from kveraser.eraser import EraserSettings
from kveraser.errors import InputError
from kveraser.train import loop
from kveraser.train.cases import read_cases, tokenize, write_cases
from kveraser.train.distill import edited_log_probabilities, prepare, token_kl
from kveraser.train.loop import Progress, TrainingError, train
from kveraser.train.recipe import Recipe, load_recipe
from kveraser.train.span_neighbor import span_neighbor_cases
from tests.test_train_data import PASSAGES, SMALL
from tests.tiny import tiny_backbone

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    short = [" ".join(passage.split()[:40]) for passage in PASSAGES]
    sizes = SMALL.__class__(context=(40, 50), span=(4, 8))
    write_cases(path, span_neighbor_cases(short, 12, seed=1, settings=sizes))
    return str(path)


@pytest.fixture
def make(model: str, cases: str, tmp_path: Path) -> Make:
    def build(output: str = "run", **changes: Any) -> Recipe:
        fields: dict[str, Any] = {
            "backbone": model,
            "data": cases,
            "output": str(tmp_path / output),
            "optimizer": {"cases_per_step": 2, "learning_rate": 0.02, "warmup_steps": 1},
            "evaluation": {"cases": 4, "every_steps": 2},
            "adapter": {"rank": 4, "alpha": 8},
        }
        return Recipe(**fields | changes)

    return build


def losses(recipe: Recipe) -> list[float]:
    log = (Path(recipe.output) / loop.LOG).read_text("utf-8")
    return [json.loads(line)["loss"] for line in log.splitlines()]


def test_training_brings_the_loss_down(make: Make) -> None:
    recipe = make(epochs=12, optimizer={"cases_per_step": 2, "learning_rate": 0.03})
    train(recipe)
    seen = losses(recipe)
    assert sum(seen[-4:]) < 0.8 * sum(seen[:4])


def test_the_eraser_with_the_lowest_held_out_kl_is_kept(make: Make) -> None:
    seen: list[Progress] = []
    recipe = make(epochs=3, evaluation={"cases": 4, "every_steps": 1})
    best = train(recipe, progress=seen.append)
    kls = [line.kl for line in seen if line.kl is not None]
    assert len(seen) == seen[-1].steps == len(kls) == 12
    assert seen[-1].fidelity is not None and seen[-1].seconds_left == 0
    backbone = tiny_backbone()
    backbone.load_eraser(best)
    held_out = [prepare(backbone, tokenize(backbone, case)) for case in list(read_cases(recipe.data))[-4:]]
    with torch.no_grad():
        sums = [
            token_kl(one.teacher, edited_log_probabilities(backbone, one, EraserSettings())).sum() for one in held_out
        ]
    assert float(sum(sums)) / sum(len(one.teacher) for one in held_out) == pytest.approx(min(kls), rel=1e-4)
    assert min(kls) < max(kls)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_to_the_bit(make: Make) -> None:
    whole, parted = make("whole", epochs=2), make("parted", epochs=2)
    train(whole)
    train(parted, stop=3)
    train(parted, resume=True)
    assert len(losses(whole)) == 8
    assert losses(parted) == losses(whole)
    first, second = (torch.load(Path(recipe.output) / loop.CHECKPOINT) for recipe in (whole, parted))
    assert all(torch.equal(value, second["adapter"][name]) for name, value in first["adapter"].items())


def test_a_run_killed_after_its_checkpoint_repeats_no_line_of_the_log(make: Make) -> None:
    recipe = make()
    train(recipe, stop=2)
    with (Path(recipe.output) / loop.LOG).open("a") as log:
        log.write('{"step": 3, "loss": 0}\n')
    train(recipe, resume=True)
    steps = [json.loads(line)["step"] for line in (Path(recipe.output) / loop.LOG).read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_layout_and_window_of_the_recipe_are_saved_with_the_eraser(make: Make) -> None:
    best = train(make(layout="closed", repair=5), stop=2)
    settings = tiny_backbone().load_eraser(best).settings
    assert (settings.layout, settings.repair) == ("closed", 5)


def test_a_second_stage_starts_from_the_first(make: Make) -> None:
    first = train(make("first"))
    recipe = make("second", initial=str(first), optimizer={"cases_per_step": 2, "learning_rate": 1e-9})
    second = train(recipe, stop=1) if (Path(recipe.output) / loop.BEST).exists() else train(recipe, stop=2)
    one, two = (tiny_backbone().load_eraser(folder).parameters() for folder in (first, second))
    assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in one.items())


def test_nan_stops_the_run_names_the_case_and_keeps_the_last_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make()
    train(recipe, stop=2)
    before = (Path(recipe.output) / loop.CHECKPOINT).read_bytes()

    def broken(*arguments: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(loop, "case_loss", broken)
    with pytest.raises(TrainingError, match=r"case span-neighbor/1/\d+ at step 3 is nan"):
        train(recipe, resume=True)
    assert (Path(recipe.output) / loop.CHECKPOINT).read_bytes() == before


def test_a_full_disk_leaves_the_last_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make()
    train(recipe, stop=2)
    before = (Path(recipe.output) / loop.CHECKPOINT).read_bytes()

    def full(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match="No space left"):
        train(recipe, resume=True)
    assert (Path(recipe.output) / loop.CHECKPOINT).read_bytes() == before
    assert not list(Path(recipe.output).glob(".*.part"))


def test_a_checkpoint_of_another_recipe_is_refused(make: Make) -> None:
    train(make(), stop=1)
    with pytest.raises(TrainingError, match="another recipe"):
        train(make(seed=7), resume=True)


def test_too_few_cases_or_too_long_ones_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="12 cases, but 11 are held out"):
        train(make(evaluation={"cases": 11}))
    with pytest.raises(InputError, match="no case file"):
        train(make(data="nowhere.jsonl"))

    def refuse(self: Backbone, position: int, tokens: int) -> None:
        raise InputError(f"{tokens} are too many")

    monkeypatch.setattr(Backbone, "check_room", refuse)
    with pytest.raises(InputError, match="too many"):
        train(make())


def test_a_recipe_file_is_read_with_paths_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": "cases.jsonl", "output": "/runs/one", "optimizer": {"learning_rate": 0.5}}))
    recipe = load_recipe(path)
    assert recipe.data == str(tmp_path / "cases.jsonl") and recipe.output == "/runs/one"
    assert recipe.optimizer.learning_rate == 0.5 and recipe.adapter.rank == 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: a\noutput: b\nlayuot: keep", "unknown key 'layuot': did you mean 'layout'"),
        ("data: a\noutput: b\noptimizer: {learning_rat: 1}", "optimizer.learning_rat.*did you mean 'learning_rate'"),
        ("data: a\noutput: b\nrepair: many", "repair is 'many'"),
        ("data: a\noutput: b\nobjective: mse", "objective is 'mse'"),
        ("data: a", "output"),
        ("- a\n- b", "list, not a mapping"),
        ("a: [", "not YAML"),
        ("1: 2", "keys are texts"),
    ],
)
def test_a_recipe_with_a_mistake_says_which(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        load_recipe(path)


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't read the recipe"):
        load_recipe(tmp_path / "no.yaml")


def test_the_fingerprint_follows_what_shapes_the_numbers_and_not_where_they_go(make: Make) -> None:
    assert make("a").fingerprint == make("b").fingerprint == make(checkpoint_minutes=9).fingerprint
    assert make(seed=1).fingerprint != make(seed=2).fingerprint
