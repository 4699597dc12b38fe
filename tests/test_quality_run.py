"""Runs of the held-out suite: they resume to the same numbers, and say what they can't measure before they begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kveraser import cli
from kveraser.backbone import Backbone
from kveraser.bench import run as module
from kveraser.bench.quality import CaseResult
from kveraser.bench.run import CASES, SETTINGS, QualityRun, QualitySettings, to_json
from kveraser.bench.run import run as run_suite
from kveraser.errors import InputError
from kveraser.methods import make_method
from kveraser.training.span_neighbor import FOLLOWS
from tests import test_tasks
from tests.test_cli import Run, one_line, read, run  # noqa: F401 (a fixture)
from tests.test_train_data import HELD_OUT, PASSAGES
from tests.tiny import POSITIONS, attach_random_eraser, tiny_backbone

SETTINGS_OF_ALL = QualitySettings(("span_neighbor",), (260, 340), (40,), cases=2, seed=3, corpus="words")
CORPUS = [*PASSAGES, *HELD_OUT]
METHODS = (make_method("mask"), make_method("blank"))


def start(
    backbone: Backbone,
    folder: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    **other: object,
) -> QualityRun:
    return run_suite(backbone, CORPUS, METHODS, replace(SETTINGS_OF_ALL, **other), folder, progress)  # type: ignore[arg-type]


def numbers(measured: QualityRun) -> list[CaseResult]:
    """All but the time that it took."""
    return [replace(result, seconds=0.0) for result in measured.results]


@pytest.fixture(scope="module")
def whole(backbone: Backbone) -> list[CaseResult]:
    """An uninterrupted run."""
    return numbers(start(backbone))


@pytest.fixture
def measured_cases(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cases that are measured, in order."""
    cases: list[str] = []
    measure = module.measure_case

    def counted(backbone: Backbone, case: object, *others: object) -> list[CaseResult]:
        cases.append(case.id)  # type: ignore[attr-defined]
        return measure(backbone, case, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure_case", counted)
    return cases


def test_cells_take_turns(whole: list[CaseResult]) -> None:
    assert [(one.length, one.method) for one in whole] == [
        (length, method) for length in (260, 340) * 2 for method in ("none", "recompute", "mask", "blank(filler='\\n')")
    ]
    assert len({one.case for one in whole}) == 4
    sizes = {length: [one.context_tokens for one in whole if one.length == length] for length in (260, 340)}
    assert 230 < min(sizes[260]) <= max(sizes[260]) < min(sizes[340]) < 450
    assert len({question.kl for one in whole for question in one.questions if one.method == "mask"}) == 16


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    backbone: Backbone, whole: list[CaseResult], tmp_path: Path, measured_cases: list[str]
) -> None:
    def interrupt(step: str, share: float) -> None:
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(backbone, tmp_path, interrupt)
    assert len(measured_cases) == 2
    assert numbers(start(backbone, tmp_path)) == whole and len(measured_cases) == len(set(measured_cases)) == 4
    assert numbers(start(backbone, tmp_path)) == whole and len(measured_cases) == 4


@pytest.mark.parametrize("killed", ["in a line", "in a character", "between lines", "before the first line"])
def test_a_case_that_was_not_written_whole_is_measured_again(
    backbone: Backbone, whole: list[CaseResult], tmp_path: Path, measured_cases: list[str], killed: str
) -> None:
    start(backbone, tmp_path, lengths=(260,))
    lines = (tmp_path / CASES).read_bytes().splitlines(keepends=True)
    left = {
        "in a line": b"".join(lines)[:-40],
        "in a character": b"".join(lines[:-4]) + b'{"case": "\xe2\x80',
        "between lines": b"".join(lines[:-1]),
        "before the first line": b"",
    }[killed]
    (tmp_path / CASES).write_bytes(left)
    measured_cases.clear()
    assert numbers(start(backbone, tmp_path, lengths=(260,))) == [one for one in whole if one.length == 260]
    assert len(measured_cases) == (2 if left == b"" else 1)
    assert len((tmp_path / CASES).read_bytes().splitlines()) == len(lines)


def test_an_answer_with_a_line_separator_is_kept(backbone: Backbone, tmp_path: Path, measured_cases: list[str]) -> None:
    start(backbone, tmp_path, cases=1)
    kept = (tmp_path / CASES).read_text("utf-8").replace('"answer": null', '"answer": "a\u2028b\x85"')
    (tmp_path / CASES).write_text(kept, "utf-8")
    again = start(backbone, tmp_path, cases=1)
    assert len(measured_cases) == 2 and {one.answer for one in again.results[0].questions} == {"a\u2028b\x85"}


def test_more_cases_go_on_and_fewer_are_the_first(
    backbone: Backbone, whole: list[CaseResult], tmp_path: Path, measured_cases: list[str]
) -> None:
    assert numbers(start(backbone, tmp_path, cases=1)) == whole[:8]
    assert numbers(start(backbone, tmp_path)) == whole and len(measured_cases) == 4
    assert numbers(start(backbone, tmp_path, cases=1)) == whole[:8] and len(measured_cases) == 4
    assert numbers(start(backbone, tmp_path)) == whole and len(measured_cases) == 4


def test_a_cell_does_not_hang_on_the_others(backbone: Backbone, whole: list[CaseResult]) -> None:
    alone = numbers(start(backbone, lengths=(340,)))
    assert alone == [one for one in whole if one.length == 340]
    assert alone != numbers(start(backbone, lengths=(340,), seed=4))


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(backbone: Backbone, tmp_path: Path) -> None:
    start(backbone, tmp_path, lengths=(260,), cases=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {CASES, SETTINGS}
    settings = replace(SETTINGS_OF_ALL, lengths=(260,), cases=1)
    erasing, other = tiny_backbone(), tiny_backbone(seed=1)
    attach_random_eraser(erasing)
    others = {
        "seed": (backbone, CORPUS, METHODS, replace(settings, seed=4)),
        "lengths": (backbone, CORPUS, METHODS, replace(settings, lengths=(340,))),
        "corpus": (backbone, CORPUS, METHODS, replace(settings, corpus="other")),
        "corpus_fingerprint": (backbone, [*CORPUS[:-1], f"{CORPUS[-1]} more"], METHODS, settings),
        "methods": (backbone, CORPUS, METHODS[:1], settings),
        "backbone_fingerprint": (other, CORPUS, METHODS, settings),
        "eraser": (erasing, CORPUS, METHODS, settings),
    }
    for key, arguments in others.items():
        with pytest.raises(InputError, match=f"holds another run: its {key}"):
            run_suite(*arguments, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_cases_that_are_made_otherwise_are_another_run(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(backbone, tmp_path, lengths=(260,), cases=1)
    monkeypatch.setitem(FOLLOWS, "heldout", ("What is said after {words}?",))
    with pytest.raises(InputError, match="its cases_fingerprint"):
        start(backbone, tmp_path, lengths=(260,), cases=1)


def test_a_retrained_eraser_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    first, second = tiny_backbone(), tiny_backbone()
    attach_random_eraser(first, seed=0)
    attach_random_eraser(second, seed=1)
    start(first, tmp_path, lengths=(260,), cases=1)
    with pytest.raises(InputError, match="its eraser_fingerprint"):
        start(second, tmp_path, lengths=(260,), cases=1)


def test_files_that_are_no_run_are_not_touched(backbone: Backbone, tmp_path: Path) -> None:
    training, broken, line, file = (tmp_path / name for name in ("training", "broken", "line", "file"))
    training.mkdir()
    (training / CASES).write_text('{"id": "a training case"}\n')
    broken.mkdir()
    (broken / SETTINGS).write_text('{"seed": ')
    start(backbone, line, lengths=(260,), cases=1)
    (line / CASES).write_text('{"case": "a"}\n' + (line / CASES).read_text("utf-8"))
    file.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, said in ((training, "no quality run"), (broken, "can't be read"), (line, "line 1"), (file, "file")):
        with pytest.raises(InputError, match=said):
            start(backbone, folder, lengths=(260,), cases=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_cells_that_can_not_be_measured_are_named(backbone: Backbone, whole: list[CaseResult]) -> None:
    measured = start(backbone, lengths=(260, 340, POSITIONS), spans=(40, 250), cases=1)
    assert [one for one in numbers(measured) if one.span == 40] == whole[:8]
    assert {(one.task, one.length, one.span) for one in measured.left_out} == {
        ("all", 260, 250), ("all", 340, 250), ("span_neighbor", POSITIONS, 40), ("span_neighbor", POSITIONS, 250),
    }  # fmt: skip
    reasons = {one.length: one.reason for one in measured.left_out}
    assert "60% of the context" in reasons[260] and f"has {POSITIONS}" in reasons[POSITIONS]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"tasks": ("noodle",)}, "'noodle': there are span_neighbor, needle"),
        ({"tasks": ()}, "no held-out task given"),
        ({"tasks": ("needle", "needle")}, "give each once"),
        ({"lengths": (260, 260)}, "give each once"),
        ({"lengths": ()}, "lengths is"),
        ({"lengths": (0,)}, "lengths is"),
        ({"spans": (-5,)}, "spans is"),
        ({"cases": 0}, "cases is"),
        ({"spans": (300,)}, "shorter spans"),
        ({"lengths": (POSITIONS,)}, "nothing to measure.*shorter lengths"),
        ({"lengths": (99_999,)}, "span of 40 in 99999 tokens.*longer corpus"),
        ({"tasks": ("span_neighbor", "needle")}, "no cases of needle.*at least 150"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is(
    backbone: Backbone, tmp_path: Path, measured_cases: list[str], other: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        start(backbone, tmp_path / "run", **other)
    assert not measured_cases and not (tmp_path / "run").exists()


def test_an_empty_corpus_and_a_method_given_twice_are_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no words"):
        run_suite(backbone, [], METHODS, SETTINGS_OF_ALL)
    with pytest.raises(InputError, match="each once"):
        run_suite(backbone, CORPUS, [*METHODS, make_method("mask")], SETTINGS_OF_ALL)


def test_tasks_are_judged_and_every_figure_is_there() -> None:
    backbone = tiny_backbone(max_position_embeddings=4 * POSITIONS)
    settings = QualitySettings(("needle", "stale"), (1200,), (150,), cases=1, seed=0, corpus="people")
    measured = run_suite(backbone, test_tasks.PASSAGES, METHODS[:1], settings)
    result = to_json(measured, backbone, settings, METHODS[:1])
    assert [row["task"] for row in result["rows"][:6]] == ["needle"] * 3 + ["stale"] * 3
    for row in result["rows"]:
        assert {None, "nan"}.isdisjoint(map(str, row.values())) and None not in row.values()
        assert row["fidelity_low"] <= row["fidelity"] <= row["fidelity_high"]
        if row["method"] == "none":
            assert row["fidelity"] == 0 and row["kl"] == row["kl_unerased"] > 0.01
        if row["method"] == "recompute":
            assert row["kl"] == row["leak"] == row["no_harm"] == 0 and row["fidelity"] == 1


def test_the_command_prints_rows_and_resumes(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    corpus, output = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text("\n\n".join(CORPUS))
    asked = (
        "bench", "quality", "--corpus", str(corpus), "--model", model, "--tasks", "span_neighbor", "--lengths", "260",
        "--spans", "40,200", "--cases", "1", "--output", str(output),
    )  # fmt: skip
    result = read(run(*asked, "--methods", "mask; shift", "--json"))
    assert [row["method"] for row in result["rows"][:4]] == ["none", "recompute", "mask", "shift"]
    assert result["settings"]["methods"] == ["mask", "shift"] and result["settings"]["corpus"] == "corpus.txt"
    assert result["left_out"] == [
        {"task": "all", "length": 260, "span": 200, "reason": "the span is over 60% of the context"}
    ]
    kept = (output / CASES).read_bytes()
    assert {json.loads(line)["method"] for line in kept.splitlines()} == {"none", "recompute", "mask", "shift"}
    assert read(run(*asked, "--methods", "mask; shift", "--json"))["rows"] == result["rows"]
    assert (output / CASES).read_bytes() == kept
    code, out, err = run(*asked, "--methods", "mask; shift")
    assert code == 0 and "Quality" in out and "Left out: all, span 200 of 260 tokens" in err
    assert "its methods" in one_line(run(*asked, "--methods", "mask"), cli.FAILURE)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--suite", "other"), cli.USAGE, "there is heldout"),
        (("--lengths", "512,,1024"), cli.USAGE, "--lengths '512,,1024'"),
        (("--spans", "fifty"), cli.USAGE, "--spans 'fifty'"),
        (("--cases", "0"), cli.USAGE, "--cases"),
        (("--tasks", "needle, noodle"), cli.FAILURE, "'noodle'"),
        (("--tasks", ""), cli.FAILURE, "no held-out task ''"),
        (("--methods", "maks"), cli.USAGE, "did you mean mask"),
        (("--lengths", "0"), cli.FAILURE, "numbers from 1 on"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_loaded(
    run: Run,  # noqa: F811
    options: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert said in one_line(run("bench", "quality", "--corpus", "nowhere.txt", *options), code)
