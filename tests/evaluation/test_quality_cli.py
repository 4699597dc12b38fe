"""`python -m evaluation quality` on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.plan import PROFILES, Profile, Sizes
from kveraser.cli import main as cli
from kveraser.measure.run import CASES, RESULT, SETTINGS
from tests.bench_cases import CONTEXT, SPAN
from tests.cli.test_cli import Run, one_line, read, run  # noqa: F401 (a fixture)
from tests.training.test_train_data import HELD_OUT, PASSAGES

METHODS = ("--methods", "mask; shift")
LINES = [
    {"id": "seen", "context": CONTEXT, "erase": SPAN, "question": "When?", "answers": ["nine"], "wrong": ["six"]},
    {"context": CONTEXT, "erase": [{"text": "at nine"}, SPAN], "question": "Who slept?", "answers": ["four"]},
]


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A file of two cases on one context."""
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES), "utf-8")
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join([*PASSAGES, *HELD_OUT]), "utf-8")
    return str(path)


def test_the_command_prints_rows_and_resumes(run: Run, model: str, corpus: str, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "run"
    asked = (
        "evaluation", "quality", "--corpus", corpus, "--model", model, "--tasks", "span_neighbor", "--lengths", "260",
        "--spans", "40,200", "--cases", "1", "--output", str(output),
    )  # fmt: skip
    for unheld in (asked, asked[:-2]):
        assert "--resume needs a run to continue" in one_line(run(*unheld, *METHODS, "--resume"), cli.USAGE)
    assert not output.exists()
    result = read(run(*asked, *METHODS, "--json"))
    assert [row["method"] for row in result["rows"][:4]] == ["none", "recompute", "mask", "shift"]
    settings = result["settings"]
    assert settings["methods"] == ["mask", "shift"] and settings["corpus"] == "corpus.txt"
    assert [(one["suite"], one["spans"], one["cases"]) for one in settings["suites"]] == [("heldout", [40, 200], 1)]
    assert [(one["suite"], one["task"], one["span"], one["reason"]) for one in result["left_out"]] == [
        ("heldout", "all", 200, "the span is over 60% of the context")
    ]
    assert json.loads((output / RESULT).read_text("utf-8")) == result and result["seconds"] > 0
    kept = (output / CASES).read_bytes()
    assert [list(json.loads(line)["methods"]) for line in kept.splitlines()] == [["none", "recompute", "mask", "shift"]]
    assert read(run(*asked, *METHODS, "--resume", "--json"))["rows"] == result["rows"]
    assert (output / CASES).read_bytes() == kept
    code, out, err = run(*asked, *METHODS)
    assert code == 0 and "Quality" in out and str(output) in err
    assert "Left out: heldout/all, length 260, span 200, spans 1: the span is over 60%" in err
    assert "its methods" in one_line(run(*asked, "--methods", "mask"), cli.FAILURE)


def test_cases_of_ones_own_are_measured_with_all_methods_that_serve(
    run: Run,  # noqa: F811
    model: str,
    own: str,
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    asked = "evaluation", "quality", "--model", model, "--cases", own
    result = read(run(*asked, "--output", str(output), "--json"))
    lines = [json.loads(line) for line in (output / CASES).read_text("utf-8").splitlines()]
    assert [(line["id"], line["suite"], line["spans"]) for line in lines] == [("seen", "cases", 1), ("2", "cases", 2)]
    assert lines[0]["context"] == lines[1]["context"] and lines[0]["erased"][0].strip() == SPAN
    assert [result["settings"][name] for name in ("suites", "case_file", "corpus")] == [[], "own.jsonl", None]
    compared = result["settings"]["methods"]
    assert len(compared) >= 9 and list(lines[0]["methods"]) == ["none", "recompute", *compared]
    # There is no eraser in the folder.
    assert set(result["unserved"]) == {"kveraser", "kveraser+repair"}
    assert {row["suite"] for row in result["rows"]} == {"cases", "all"} and result["rows"][0]["em"] is not None
    assert "case_file" in (output / SETTINGS).read_text("utf-8")
    code, _, err = run(*asked, "--methods", "mask; kveraser")
    assert code == cli.FAILURE and "eraser" in err


def test_cases_of_ones_own_go_beside_a_suite(run: Run, model: str, own: str) -> None:  # noqa: F811
    asked = "evaluation", "quality", "--model", model, "--cases", own, "--methods", "mask", "--json"
    result = read(run(*asked, "--suite", "leak", "--lengths", "9"))
    assert {row["suite"] for row in result["rows"]} == {"cases", "all"}
    assert result["settings"]["suites"][0]["cases"] == 200
    assert {one["suite"] for one in result["left_out"]} == {"leak"}


def test_a_profile_is_its_suites_at_their_sizes(
    run: Run,  # noqa: F811
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = Sizes("longqa", 512), Sizes("sweeps", 600, spans=(40,))
    monkeypatch.setitem(PROFILES, "cpu", Profile(sizes, "shift; kveraser", 2))
    asked = "evaluation", "quality", "--profile", "cpu", "--model", model, "--json"
    result = read(run(*asked, "--cases", "1"))
    assert [(one["suite"], one["lengths"], one["cases"]) for one in result["settings"]["suites"]] == [
        ("sweeps", [600], 1)
    ]
    left_out = {(one["suite"], one["task"]): one["reason"] for one in result["left_out"]}
    assert "--dataset" in left_out["longqa", "all"] and ("sweeps", "distance") in left_out
    assert {row["cases"] for row in result["rows"] if row["suite"] == "sweeps" and row["span"] == 40} == {1}
    assert {row["method"] for row in result["rows"]} == {"none", "recompute", "shift"}
    assert list(result["unserved"]) == ["kveraser"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--suite", "niha"), cli.FAILURE, "did you mean niah"),
        (("--suite", "niah,niah"), cli.FAILURE, "give each once"),
        (("--lengths", "512,,1024"), cli.USAGE, "--lengths '512,,1024'"),
        (("--spans", "fifty"), cli.USAGE, "--spans 'fifty'"),
        (("--cases", "0"), cli.FAILURE, "cases is (0,)"),
        (("--cases", "-3"), cli.FAILURE, "cases is (-3,)"),
        (("--cases", "nowhere.jsonl"), cli.FAILURE, "no case file at nowhere.jsonl"),
        (("--tasks", "needle, noodle"), cli.FAILURE, "'noodle'"),
        (("--tasks", ""), cli.FAILURE, "heldout has no task ''"),
        (("--methods", "maks"), cli.USAGE, "did you mean mask"),
        (("--lengths", "0"), cli.FAILURE, "numbers from 1 on"),
        (("--profile", "gpu"), cli.FAILURE, "no profile 'gpu'"),
        (("--profile", "cpu", "--cases", "0"), cli.FAILURE, "cases is (0,)"),
        (("--profile", "cpu", "--suite", "niah"), cli.USAGE, "--profile sets suites"),
        (("--profile", "cpu", "--tasks", "needle"), cli.USAGE, "--profile sets suites"),
        (("--profile", "cpu", "--lengths", "512"), cli.USAGE, "--profile sets suites"),
        (("--profile", "cpu", "--spans", "16"), cli.USAGE, "--profile sets suites"),
        (("--profile", "cpu", "--cases", "own.jsonl"), cli.USAGE, "--profile sets suites"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_loaded(
    run: Run,  # noqa: F811
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert said in one_line(run("evaluation", "quality", "--corpus", "nowhere.txt", *options), code)
