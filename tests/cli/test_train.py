"""`kveraser data build` and `kveraser train` on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import kveraser
from kveraser.cli import main as cli
from kveraser.errors import InputError
from kveraser.training.cases import Case, read_cases
from kveraser.training.recipe import Recipe
from tests.cli.test_cli import Run, one_line, read, run  # noqa: F401 (a fixture)
from tests.training.test_train_data import PASSAGES


def corpus(folder: Path) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return str(path)


SIZES = "--context", "40", "50", "--span", "4", "8"
BUILD = "--cases", "8", *SIZES


def test_data_is_built_and_an_eraser_is_trained_from_it(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    cases = tmp_path / "cases.jsonl"
    built = read(run("data", "build", str(cases), "--corpus", corpus(tmp_path), *BUILD, "--tokens", model, "--json"))
    row = built["rows"][0]
    assert row["cases"] == len(list(read_cases(cases))) == 8 and row["passages"] == len(PASSAGES)
    assert (row["resumed_at"], row["duplicates"]) == (0, 0)
    assert [(task["task"], task["influence"]) for task in built["tasks"]] == [("span_neighbor", 32)]
    sizes = {size["what"]: size for size in built["sizes"]}
    span = sizes["span, words"]
    assert 4 <= span["shortest"] <= span["median"] <= span["nine_in_ten"] <= span["longest"] <= 8
    assert sizes["span, tokens"]["longest"] > span["longest"]
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "backbone": model, "data": "cases.jsonl", "output": "run", "layout": "closed", "repair": 4,
        "adapter": {"rank": 2}, "optimizer": {"cases_per_step": 2}, "evaluation": {"cases": 2, "every_steps": 2},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    planned = read(run("train", str(recipe), "--plan", "--json"))
    assert not (tmp_path / "run").exists()
    result = read(run("train", str(recipe), "--json"))
    assert [row["step"] for row in result["rows"]] == [2, 3] and planned["steps"] == 3
    weights = load_file(Path(result["eraser"]) / "adapter_model.safetensors")
    assert planned["trainable"] == sum(tensor.numel() for tensor in weights.values())
    code, out, _ = run("train", str(recipe), "--plan")
    assert code == 0 and "Memory" in out and "H100" in out
    code, out, err = run("train", str(recipe), "--resume")
    assert code == 0 and "Held-out evaluation" in out and "Eraser:" in err
    context = tmp_path / "context.txt"
    context.write_text("ash1 ash2 ash3 fir1 fir2 ash4 ash5 ash6")
    asked = "--context", str(context), "--span", "fir1 fir2", "--ask", "What?", "--model", model, "--json"
    receipt = read(run("erase", *asked, "--eraser", result["eraser"], "--method", "kveraser+repair", "--force"))[
        "receipts"
    ][0]
    assert receipt["method"] == "kveraser+repair" and receipt["parameters"] == {
        "window": 4,
        "per_span": 0.0,
        "layout": "closed",
    }


def test_the_library_trains_as_the_command_does(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    cases = tmp_path / "cases.jsonl"
    read(run("data", "build", str(cases), "--corpus", corpus(tmp_path), *BUILD, "--json"))
    fields: dict[str, Any] = {
        "backbone": model, "data": "cases.jsonl", "output": "file", "adapter": {"rank": 2},
        "optimizer": {"cases_per_step": 2}, "evaluation": {"cases": 2, "every_steps": 2},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    given = fields | {"data": str(cases), "output": str(tmp_path / "fields")}
    made = Recipe(**given | {"output": str(tmp_path / "recipe")})
    erasers = [kveraser.train(recipe) for recipe in (tmp_path / "recipe.yaml", given, made)]
    assert [eraser.parent for eraser in erasers] == [tmp_path / "file", tmp_path / "fields", tmp_path / "recipe"]
    first, *others = ((eraser / "adapter_model.safetensors").read_bytes() for eraser in erasers)
    assert all(other == first for other in others)
    with pytest.raises(InputError, match="did you mean 'layout'"):
        kveraser.train(given | {"layuot": "keep"})


def test_an_interrupted_build_says_how_to_go_on(
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = "data", "build", str(tmp_path / "cases.jsonl"), "--corpus", corpus(tmp_path), *BUILD
    original, made = Case.to_json, []

    def interrupted(case: Case) -> str:
        made.append(case)
        if len(made) == 4:
            raise KeyboardInterrupt
        return original(case)

    monkeypatch.setattr(Case, "to_json", interrupted)
    assert "goes on from there" in one_line(run(*build), cli.FAILURE)
    assert "other seed" in one_line(run(*build, "--seed", "7"), cli.FAILURE)
    assert read(run(*build, "--json"))["rows"][0]["resumed_at"] == 3


def test_data_is_listed_as_a_table_without_json(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = run("data", "build", str(tmp_path / "cases.jsonl"), "--corpus", corpus(tmp_path), *BUILD)
    assert code == 0 and "Cases" in out


def test_mistakes_end_in_one_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    build = "data", "build", str(tmp_path / "cases.jsonl"), "--corpus", corpus(tmp_path)
    assert "span is 9 3" in one_line(run(*build, "--span", "9", "3"), cli.USAGE)
    assert "'nedle'" in one_line(run(*build, "--stage", "2", "--tasks", "nedle"), cli.USAGE)
    assert "--tasks" in one_line(run(*build, "--tasks", "needle"), cli.USAGE)
    assert "no tokenizer" in one_line(run(*build, "--tokens", str(tmp_path)), cli.FAILURE)
    assert "--config" in one_line(run("train", str(tmp_path / "no.yaml"), "--config", str(tmp_path)), cli.USAGE)
    assert "longer corpus" in one_line(run(*build, "--span", "3", "9000"), cli.FAILURE)
    assert "can't read the recipe" in one_line(run("train", str(tmp_path / "no.yaml")), cli.FAILURE)


def test_training_is_timed_against_a_naive_loop(run: Run, model: str) -> None:  # noqa: F811
    result = read(run("evaluation", "train", "--model", model, "--cases", "1", "--repeats", "1", *SIZES, "--json"))
    assert [row["loop"] for row in result["rows"]] == ["engine", "naive"] and result["ratio"] > 0
    assert result["command"] == "python -m evaluation train" and result["notes"]
