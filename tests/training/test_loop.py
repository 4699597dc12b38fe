"""The training loop on a tiny model: learning, resuming bit for bit, and recovery from errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from kveraser.errors import InputError
from kveraser.measure.questions import Query
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import Eraser, EraserSettings
from kveraser.steering.layouts import SLOT_EMBEDDINGS
from kveraser.training import loop
from kveraser.training import prepared as prepared_module
from kveraser.training.cases import Case, read_cases, tokenize
from kveraser.training.checkpoint import TrainingError
from kveraser.training.distill import edited_log_probabilities, prepare, token_kl
from kveraser.training.log import CURVES, LOG, Progress
from kveraser.training.loop import train
from kveraser.training.recipe import Recipe, load_recipe
from tests.tiny import tiny_backbone
from tests.training.case_files import write_cases

Make = Callable[..., Recipe]


def write_short_cases(path: Path) -> None:
    """Twelve cases of two shapes, short so that many steps take little time."""
    letters = "bcdfgjklmpqv"

    def words(index: int, start: int, end: int) -> str:
        return " ".join(f"{letters[index]}{number}" for number in range(start, end))

    def case(index: int) -> Case:
        before, span, after = words(index, 10, 20), words(index - 5, 30, 36), words(index, 20, 34 + 4 * (index % 2))
        queries = Query(f"After {words(index, 18, 20)}?", words(index, 20, 24)), Query("What?", span[:11], "no_harm")
        start = len(before) + 1
        return Case(f"case-{index}", "test", f"{before} {span} {after}", (start, start + len(span)), queries)

    write_cases(path, map(case, range(12)))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    write_short_cases(path)
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
    log = (Path(recipe.output) / LOG).read_text("utf-8")
    return [json.loads(line)["loss"] for line in log.splitlines()]


def test_training_lowers_the_loss(make: Make) -> None:
    recipe = make(epochs=8, evaluation={"cases": 4}, optimizer={"cases_per_step": 2, "learning_rate": 0.03})
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
    held_out = [prepare(backbone, [tokenize(backbone.tokenizer, case)]) for case in list(read_cases(recipe.data))[-4:]]
    with torch.no_grad():
        sums = [
            token_kl(one.teacher, edited_log_probabilities(backbone, one, EraserSettings())).sum() for one in held_out
        ]
    assert float(sum(sums)) / sum(len(one.teacher) for one in held_out) == pytest.approx(min(kls), rel=1e-4)
    assert min(kls) < max(kls)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one_bit_for_bit(make: Make) -> None:
    whole, parted = make("whole", epochs=2), make("parted", epochs=2)
    train(whole)
    train(parted, stop=3)
    train(parted, resume=True)
    assert len(losses(whole)) == 8
    assert losses(parted) == losses(whole)
    first, second = (torch.load(Path(recipe.output) / loop.CHECKPOINT) for recipe in (whole, parted))
    assert all(torch.equal(value, second["adapter"][name]) for name, value in first["adapter"].items())


def test_later_epochs_reuse_prepared_batches_bit_for_bit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, stored = make("fresh", epochs=3, prepared_gigabytes=0), make("stored", epochs=3)
    train(fresh)
    calls: list[int] = []
    monkeypatch.setattr(loop, "prepare", lambda *args, **kwargs: calls.append(1) or prepare(*args, **kwargs))
    train(stored, stop=6)
    prepared = len(calls)
    assert len(list((Path(stored.output) / loop.PREPARED).iterdir())) > 0
    train(stored, resume=True)
    held_out = len(calls) - prepared
    assert 0 < held_out < prepared
    assert losses(stored) == losses(fresh)
    assert not (Path(stored.output) / loop.PREPARED).exists()


def test_a_full_disk_for_prepared_batches_changes_no_loss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, stored = make("fresh", epochs=2, prepared_gigabytes=0), make("stored", epochs=2)
    train(fresh)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared_module, "save_file", full)
    train(stored)
    assert losses(stored) == losses(fresh)


def test_a_run_killed_after_its_checkpoint_repeats_no_line_of_the_log(make: Make) -> None:
    recipe = make()
    train(recipe, stop=2)
    with (Path(recipe.output) / LOG).open("a") as log:
        log.write('{"step": 3, "loss": 0}\n')
    train(recipe, resume=True)
    steps = [json.loads(line)["step"] for line in (Path(recipe.output) / LOG).read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_the_layout_and_window_of_the_recipe_are_saved_with_the_eraser(make: Make) -> None:
    best = train(make(layout="closed", repair=5), stop=2)
    settings = tiny_backbone().load_eraser(best).settings
    assert (settings.layout, settings.repair) == ("closed", 5)


def test_an_eraser_worse_than_its_start_is_not_kept(make: Make) -> None:
    recipe = make(optimizer={"learning_rate": 10.0, "warmup_steps": 0, "cases_per_step": 2})
    best = train(recipe, stop=3)
    trained = torch.load(Path(recipe.output) / loop.CHECKPOINT)["adapter"]
    kept = tiny_backbone().load_eraser(best).parameters()
    ups = [name for name in kept if "lora_B" in name]
    assert ups and not any(kept[name].any() for name in ups) and any(trained[name].any() for name in ups)


def test_extra_parameters_of_a_layout_are_trained_saved_and_resumed(make: Make) -> None:
    fields: dict[str, Any] = {"layout": "compact", "slots": 3}
    extra = SLOT_EMBEDDINGS
    whole, parted = make("whole", **fields), make("parted", **fields)
    best = train(whole, stop=2)
    train(parted, stop=1)
    train(parted, stop=2, resume=True)
    assert losses(parted) == losses(whole) and len(losses(whole)) == 2
    first, second = (torch.load(Path(recipe.output) / loop.CHECKPOINT)["adapter"] for recipe in (whole, parted))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = Eraser.untrained(tiny_backbone().model, rank=4, settings=whole.settings, seed=whole.seed).extras[extra]
    assert not torch.equal(first[extra], start)
    loaded = tiny_backbone().load_eraser(best)
    assert loaded.settings == whole.settings
    assert any(torch.equal(loaded.extras[extra], one) for one in (start, first[extra]))
    continued = make("continued", initial=str(best), **fields)
    train(continued, stop=1)
    with pytest.raises(InputError, match=f"is an eraser of layout {whole.layout} .* asks for keep"):
        train(make("foreign", initial=str(best)))


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
        return torch.tensor([float("nan")], requires_grad=True)

    monkeypatch.setattr(loop, "case_losses", broken)
    with pytest.raises(TrainingError, match=r"case case-\d+ at step 3 is nan"):
        train(recipe, resume=True)
    assert (Path(recipe.output) / loop.CHECKPOINT).read_bytes() == before


def test_a_full_disk_keeps_the_last_checkpoint(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("1: 2", "keys must be strings"),
    ],
)
def test_an_invalid_recipe_is_refused_with_the_reason(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        load_recipe(path)


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't read the recipe"):
        load_recipe(tmp_path / "no.yaml")


def test_the_fingerprint_depends_on_settings_that_change_the_numbers(make: Make) -> None:
    assert make("a").fingerprint == make("b").fingerprint == make(checkpoint_minutes=9).fingerprint
    assert make(seed=1).fingerprint != make(seed=2).fingerprint


def test_batches_and_single_cases_have_equal_losses(make: Make) -> None:
    optimizer = {"cases_per_step": 4, "cases_per_batch": 4, "learning_rate": 0.02}
    batched, single = (make(name, optimizer=optimizer, epochs=2) for name in ("batched", "single"))
    sizes: list[int] = []
    prepare_batch = loop.prepare

    def one_by_one(cases: Any, size: int) -> list[list[int]]:
        return [[place] for place in range(len(cases))]

    def counted(backbone: Backbone, cases: Any, **named: Any) -> Any:
        sizes.append(len(cases))
        return prepare_batch(backbone, cases, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", counted)
        train(batched)
        assert max(sizes) > 1
        sizes.clear()
        patch.setattr(loop, "batches", one_by_one)
        train(single)
        assert max(sizes) == 1
    assert losses(batched) == pytest.approx(losses(single), abs=1e-5)
    assert max(losses(batched)) - min(losses(batched)) > 1e-3


def test_held_out_cases_come_from_their_own_file(make: Make, cases: str, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.jsonl"
    write_cases(held_out, list(read_cases(cases))[-4:])
    training = tmp_path / "training.jsonl"
    write_cases(training, list(read_cases(cases))[:-4])
    split = make("split", data=str(training), evaluation={"cases": 4, "every_steps": 2, "data": str(held_out)})
    train(split)
    train(make("whole"))
    logs = [(tmp_path / name / LOG).read_text().splitlines() for name in ("split", "whole")]
    rows = [[(line["loss"], line["kl"]) for line in map(json.loads, log)] for log in logs]
    assert rows[0] == rows[1] and rows[0][-1][1] is not None
    with pytest.raises(InputError, match=r"held-out.jsonl has 4 cases, but evaluation.cases is 5"):
        train(make("five", data=str(training), evaluation={"cases": 5, "data": str(held_out)}))


def test_no_harm_is_the_kl_of_its_queries_alone(make: Make, cases: str, tmp_path: Path) -> None:
    seen: list[Progress] = []
    best = train(make(evaluation={"cases": 4, "every_steps": 4}), progress=seen.append)
    backbone = tiny_backbone()
    # The best is the start if training did not beat it; the last evaluation was of the last step.
    last = torch.load(best.parent / loop.CHECKPOINT)["adapter"]
    for name, parameter in backbone.load_eraser(best).parameters().items():
        parameter.data.copy_(last[name])
    sums, tokens = 0.0, 0
    for case in list(read_cases(cases))[-4:]:
        batch = prepare(backbone, [tokenize(backbone.tokenizer, case)])
        with torch.no_grad():
            kl = token_kl(batch.teacher, edited_log_probabilities(backbone, batch, EraserSettings()))
        before, answer = (len(answer) for _, answer in batch.cases[0].queries)
        sums += float(kl[before : before + answer].sum())
        tokens += answer
    assert seen[-1].no_harm == pytest.approx(sums / tokens, rel=1e-4)
    assert seen[-1].no_harm != pytest.approx(seen[-1].kl, rel=0.01)
    touched = tmp_path / "touched.jsonl"
    write_cases(touched, (replace(case, queries=case.queries[:1]) for case in read_cases(cases)))
    plain: list[Progress] = []
    train(make("plain", data=str(touched)), progress=plain.append, stop=2)
    assert plain[-1].kl is not None and plain[-1].no_harm is None


def test_a_limit_of_time_ends_the_run_with_its_schedule(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 2))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    seen: list[Progress] = []
    recipe = make(epochs=50, max_minutes=2, optimizer={"cases_per_step": 2, "warmup_steps": 0, "final_fraction": 0})
    best = train(recipe, progress=seen.append)
    assert 4 < seen[-1].step < seen[-1].steps == 200
    assert seen[-1].kl is not None and seen[-1].seconds_left == 0 and best.is_dir()
    rates = [line.learning_rate for line in seen]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.05 * rates[0]
    assert torch.load(Path(recipe.output) / loop.CHECKPOINT)["step"] == seen[-1].step
    # A finished run has nothing left to do.
    train(recipe, resume=True, progress=lambda line: pytest.fail(f"step {line.step}"))


def test_a_bfloat16_backbone_trains_a_float32_adapter(make: Make) -> None:
    recipe = make(precision="bfloat16")
    best = train(recipe)
    adapter = torch.load(Path(recipe.output) / loop.CHECKPOINT)["adapter"]
    assert {value.dtype for value in adapter.values()} == {torch.float32}
    assert any(bool((value.bfloat16().float() != value).any()) for name, value in adapter.items() if "lora_B" in name)
    train(make("exact"))
    assert losses(recipe) == pytest.approx(losses(make("exact")), rel=0.2)
    assert losses(recipe) != losses(make("exact"))
    assert best.is_dir()


def test_curves_are_drawn_where_tensorboard_is_installed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert Path(folder).name == CURVES
            self.purge_step = purge_step

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert step >= self.purge_step and isinstance(value, float)
            drawn.append((name, step))

        def close(self) -> None:
            drawn.append(("closed", 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(make(), stop=2)
    train(make(), resume=True, stop=3)
    every = ["loss", "learning_rate", "tokens_per_second"]
    assert drawn == [
        *((name, 1) for name in every),
        *((name, 2) for name in [*every, "kl", "fidelity", "no_harm"]),
        ("closed", 0),
        *((name, 3) for name in every),
        ("closed", 0),
    ]
    drawn.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(make("bare"), stop=1)
    assert drawn == [] and not (Path(make("bare").output) / CURVES).exists()


def test_a_broken_checkpoint_is_an_error_that_names_it(make: Make) -> None:
    recipe = make()
    train(recipe, stop=1)
    (Path(recipe.output) / loop.CHECKPOINT).write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"checkpoint.pt is not a checkpoint \(\w+: .+\): train"):
        train(recipe, resume=True)


def test_paths_of_held_out_cases_and_first_stage_follow_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    fields = {"data": "a.jsonl", "output": "b", "evaluation": {"data": "c.jsonl"}, "initial": "../stage1/best"}
    path.write_text(yaml.safe_dump(fields))
    recipe = load_recipe(path)
    assert recipe.evaluation.data == str(tmp_path / "c.jsonl") and recipe.initial == f"{tmp_path}/../stage1/best"
    path.write_text(yaml.safe_dump({**fields, "initial": "owner/name"}))
    assert load_recipe(path).initial == "owner/name"
