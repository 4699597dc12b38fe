"""Tables at 80 and 120 columns: every column can be read, none is of dashes, no zero has a sign."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation import commands_frontier, commands_quality, commands_report
from kveraser.cli import main as cli
from kveraser.cli.console import RECEIPT_COLUMNS, cell, print_answers, print_rows
from kveraser.methods import METHODS
from tests.sessions import TEXT
from tests.tiny import tiny_model, tiny_tokenizer

RESULTS = Path(__file__).parent.parent.parent / "docs" / "results"
WIDTHS = (80, 120)
NUMBER = re.compile(r"-?\d+(\.\d+)?")


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def check(out: str, width: int, named: list[str] = []) -> None:  # noqa: B006 (never changed)
    """What must hold of all that is printed."""
    assert out.strip() and max(map(len, out.splitlines())) <= width, out
    assert not re.search(r"-0\.0+\b", out) and "\u2026" not in out, out
    for name in named:
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", out), (name, out)


def check_rows(out: str, width: int, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Every column with a value stands there whole, with every number, and no other column does."""
    rows = [row for row in rows if not row.get("missing")]
    used = [column for column in columns if any(row.get(column) is not None for row in rows)]
    check(out, width, used)
    header = "\n".join(line for line in out.splitlines() if not NUMBER.search(line))
    for column in set(columns) - set(used):
        assert not re.search(rf"(?<![\w ]){re.escape(column)}(?!\w)", header), (column, out)
    shown = out.split()
    for row in rows:
        for column in used:
            value = row.get(column)
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert cell(value) in shown, (column, value, out)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-0.00001, "0.0000"), (-0.0, "0.0000"), (0.0, "0.0000"), (-0.0001, "-0.0001"), (-120.4, "-120"), (None, "-")],
)
def test_a_zero_has_no_sign(value: Any, shown: str) -> None:
    assert cell(value) == shown


QUALITY: dict[str, Any] = {
    "suite": "conflicting", "task": "city", "length": 131072, "span": 1024, "cases": 1200, "em": -1e-5, "em_exact": 1.0,
    "flipped": 40, "recovered": 0.5, "broken": 0.25, "kl": 123.456, "fidelity": -1.2345, "leak": 0.1, "leak_rate": 0.2,
    "no_harm": 0.3, "recomputed": 1000.5,
}  # fmt: skip


def measured_rows() -> list[dict[str, Any]]:
    """A row a method, with the longest names that there are."""
    return [{**QUALITY, "method": str(kind())} for kind in METHODS.values()]


@pytest.mark.parametrize(
    "columns",
    [commands_quality.SHOWN, commands_frontier.SHOWN, commands_report.SUMMARY, RECEIPT_COLUMNS,
     ["method", "exact", "seconds", "recomputed", "kl", "fidelity", "no_harm", "leak"]],
)  # fmt: skip
def test_rows_of_every_method_fit(columns: list[str], width: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "exact": True, "seconds": 12.5, "erased": 900} for row in measured_rows()]
    print_rows("Some", rows, columns)
    out = capsys.readouterr().out
    check_rows(out, width, rows, columns)
    for name in METHODS:
        assert name in out


def test_columns_without_a_value_are_left_out(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"method": "mask", "kl": None, "leak": 0.0}, {"method": "shift", "kl": None, "leak": None}]
    print_rows("Some", rows, ["method", "kl", "leak"])
    out = capsys.readouterr().out
    check_rows(out, width, rows, ["method", "kl", "leak"])
    assert "kl" not in out.split() and "-" in out.split()


def test_reasons_stand_below_where_nothing_could_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows("Some", [{"method": "kveraser", "missing": "no eraser"}], ["method", "kl"])
    assert "kveraser: no eraser" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["demo", "heldout", "latency", "profile", "serving", "serving-soak", "training"])
def test_results_that_were_measured_fit(name: str, width: int, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    tables = [value for value in result.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    tables += [
        part["rows"] for part in result.values() if isinstance(part, dict) and isinstance(part.get("rows"), list)
    ]
    assert tables
    for rows in tables:
        scalars = [key for key, value in rows[0].items() if not isinstance(value, list | dict) and key != "missing"]
        columns = sorted(scalars, key=lambda name: name not in ("method", "measure"))
        print_rows("Some", rows[:6], columns)
        check_rows(capsys.readouterr().out, width, rows[:6], columns)


def test_answers_stand_beside_whole_names(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"question": "Who?", "answer": "A long answer that goes on. " * 12}
    after = [{"method": name, "answers": [said]} for name in METHODS]
    print_answers(["Who is it?"], [said], after, [said])
    check(capsys.readouterr().out, width, [*METHODS, "before", "exact", "answer"])


# Commands


Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["kveraser", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_erase_and_ask_fit(run: Run, model: str, tmp_path: Path, width: int) -> None:
    (tmp_path / "context.txt").write_text(TEXT, "utf-8")
    asked = ["--ask", "Who is the captain?", "--model", model, "--max-new-tokens", "4"]
    erase = ["erase", "--context", str(tmp_path / "context.txt"), "--span", "noon", *asked]
    out = run(*erase, "--method", "repair(8)", "--method", "mask", "--method", "recompute")
    check(out, width, ["method", "repair", "mask", "recompute", "exact", "erased", "recomputed", "kl"])
    saved = str(tmp_path / "session.kv")
    run(*erase, "--method", "mask", "--save", saved)
    check(run("ask", "--load", saved, *asked), width, ["question", "answer"])


@pytest.mark.parametrize("command", ["methods", "models"])
def test_lists_fit(run: Run, command: str, width: int) -> None:
    out = run(command)
    check(out, width)
    for name in METHODS if command == "methods" else ("smollm2-135m-instruct", "qwen3", "gpt_neox"):
        assert name in out


def test_the_cases_that_were_built_fit(run: Run, tmp_path: Path, width: int) -> None:
    corpus = tmp_path / "corpus.jsonl"
    story = "The ship number {} left the harbour at noon and came back to it in the evening. "
    corpus.write_text("".join(json.dumps({"text": story.format(number) * 9}) + "\n" for number in range(40)), "utf-8")
    made = [str(tmp_path / "cases.jsonl"), "--corpus", str(corpus), "--cases", "3"]
    out = run("data", "build", *made, "--context", "20", "40", "--span", "4", "8")
    check(
        out, width, ["cases", "duplicates", "passages", "task", "influence", "leak", "no_harm", "shortest", "longest"]
    )
