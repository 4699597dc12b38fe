"""`kveraser data build` and `kveraser train` on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from kveraser import cli
from kveraser.train.cases import read_cases
from tests.test_cli import Run, one_line, read, run  # noqa: F401 (a fixture)
from tests.test_train_data import PASSAGES


def corpus(folder: Path) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    return str(path)


BUILD = "--cases", "8", "--context", "40", "50", "--span", "4", "8"


def test_data_is_built_and_an_eraser_is_trained_from_it(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    cases = tmp_path / "cases.jsonl"
    row = read(run("data", "build", str(cases), "--corpus", corpus(tmp_path), *BUILD, "--json"))["rows"][0]
    assert row["cases"] == len(list(read_cases(cases))) == 8 and row["passages"] == len(PASSAGES)
    assert 4 <= row["span_words_shortest"] <= row["span_words_median"] <= row["span_words_longest"] <= 8
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "backbone": model, "data": "cases.jsonl", "output": "run", "layout": "closed", "repair": 4,
        "adapter": {"rank": 2}, "optimizer": {"cases_per_step": 2}, "evaluation": {"cases": 2, "every_steps": 2},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    result = read(run("train", str(recipe), "--json"))
    assert [row["step"] for row in result["rows"]] == [2, 3]
    code, out, err = run("train", str(recipe), "--resume")
    assert code == 0 and "Held-out evaluation" in out and "Eraser:" in err
    context = tmp_path / "context.txt"
    context.write_text("ash1 ash2 ash3 fir1 fir2 ash4 ash5 ash6")
    asked = "--context", str(context), "--span", "fir1 fir2", "--ask", "What?", "--model", model, "--json"
    receipt = read(run("erase", *asked, "--eraser", result["eraser"], "--max-new-tokens", "4"))["receipts"][0]
    assert receipt["method"] == "kveraser+repair" and receipt["parameters"] == {"window": 4, "layout": "closed"}


def test_data_is_listed_as_a_table_without_json(run: Run, tmp_path: Path) -> None:  # noqa: F811
    code, out, _ = run("data", "build", str(tmp_path / "cases.jsonl"), "--corpus", corpus(tmp_path), *BUILD)
    assert code == 0 and "Cases" in out


def test_mistakes_end_in_one_line(run: Run, tmp_path: Path) -> None:  # noqa: F811
    build = "data", "build", str(tmp_path / "cases.jsonl"), "--corpus", corpus(tmp_path)
    assert "--span" in one_line(run(*build, "--span", "9", "3"), cli.USAGE)
    assert "longer corpus" in one_line(run(*build, "--span", "3", "9000"), cli.FAILURE)
    assert "can't read the recipe" in one_line(run("train", str(tmp_path / "no.yaml")), cli.FAILURE)
