"""Runs of the quality benchmark: they resume to the same numbers, and say what they can't measure before they begin."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.plan import QualitySettings, make_cases, plan_suite
from kveraser.errors import InputError
from kveraser.measure import run as module
from kveraser.measure.case import BenchCase, Cell, LeftOut, TokenizedCase, TokenizedContext
from kveraser.measure.quality import NOTICE_TOKENS
from kveraser.measure.questions import Query
from kveraser.measure.results import CaseResult
from kveraser.measure.run import CASES, RESULT, SETTINGS, QualityRun, to_json, write_result
from kveraser.measure.run import run as run_cases
from kveraser.methods import Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Text
from tests.bench_cases import CELL, CONTEXT, bench_case, untimed
from tests.tiny import POSITIONS, attach_random_eraser, tiny_backbone
from tests.training import test_tasks
from tests.training.test_train_data import HELD_OUT, PASSAGES

METHODS = (make_method("mask"), make_method("blank"))
OWN = QualitySettings(seed=3, case_file="own.jsonl")
WHEN = [Query("When?", "at nine", accepted=("nine",))]
OTHER = f"{CONTEXT} The boat was towed in."
MADE = [
    bench_case("a", WHEN),
    bench_case("b", WHEN, [Text("at six")]),
    bench_case("c", WHEN, context=OTHER),
    bench_case("d", WHEN, [Text("of four"), Text("at six")]),
    bench_case("e", WHEN, context=OTHER, erase=[Text("at nine")]),
    bench_case("f", WHEN, context=f"{OTHER} Nobody paid."),
]
"""Six cases in three contexts, in which they are measured."""
GROUPS = [["a", "b", "d"], ["c", "e"], ["f"]]
ORDER = [name for group in GROUPS for name in group]
CORPUS = [*PASSAGES, *HELD_OUT]


def start(
    backbone: Backbone,
    folder: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
    cases: Sequence[BenchCase] = MADE,
    methods: Sequence[Method] = METHODS,
    **other: Any,
) -> QualityRun:
    return run_cases(backbone, methods, replace(OWN, **other), cases, (), folder, progress)


def heldout(cases: int = 2, **other: Any) -> list[BenchCase]:
    plan = plan_suite("heldout", ("span_neighbor",), **({"lengths": (260, 340), "spans": (40,)} | other), cases=cases)
    return make_cases(tiny_backbone().tokenizer, QualitySettings(plans=(plan,), seed=3), CORPUS)[0]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """One layer: what is kept and measured again does not depend on their number."""
    return tiny_backbone(num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(backbone: Backbone) -> list[CaseResult]:
    """An uninterrupted run."""
    return untimed(start(backbone).results)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The cases that are measured, context by context."""
    groups: list[list[str]] = []
    measure = module.measure_context

    def counted(
        backbone: Backbone, context: TokenizedContext, cases: Sequence[TokenizedCase], *others: object
    ) -> object:
        groups.append([one.case.id for one in cases])
        return measure(backbone, context, cases, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "measure_context", counted)
    return groups


def kept(folder: Path) -> list[str]:
    """The ids of the lines of a run."""
    return [json.loads(line)["id"] for line in (folder / CASES).read_text("utf-8").split("\n")[:-1]]


def test_cases_are_measured_context_by_context(
    backbone: Backbone, whole: list[CaseResult], measured: list[list[str]], tmp_path: Path
) -> None:
    assert [result.id for result in whole] == ORDER
    again = start(backbone, tmp_path)
    assert measured == GROUPS and kept(tmp_path) == ORDER and untimed(again.results) == whole and not again.left_out
    assert all(list(result.methods) == ["none", "recompute", *map(str, METHODS)] for result in whole)
    assert len({result.methods["mask"].answers[0].kl for result in whole}) == len(whole)
    assert len({result.context for result in whole}) == len(GROUPS)
    # What a run took is known in the end, over all its stretches.
    assert start(backbone, tmp_path).seconds >= again.seconds > 0


def test_a_case_of_every_cell_is_held_against_a_prefill_where_it_begins_and_where_it_ends(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[list[str]] = []
    measure = module.measure_context

    def watched(*given: Any) -> object:
        checked.append([one.case.id for one in given[4]])
        return measure(*given)

    monkeypatch.setattr(module, "measure_context", watched)
    cells = [CELL, replace(CELL, depth=0.5), CELL, replace(CELL, depth=0.5), replace(CELL, depth=1.0), CELL]
    start(backbone, cases=[replace(case, cell=cell) for case, cell in zip(MADE, cells, strict=True)], methods=[])
    # a, b, d; then c, e; then f: the cells are 0, 0.5, 0.5; 0, 1; 0. Of the first, c is in between.
    assert [sorted(names) for names in checked] == [["a", "d"], ["e"], ["f"]]


def test_suites_take_turns(backbone: Backbone, measured: list[list[str]]) -> None:
    suites = [
        [bench_case(f"{suite}{place}", WHEN, context=f"{suite} {place}. {CONTEXT}", cell=Cell(suite, "boats"))
         for place in range(count)]
        for suite, count in (("long", 6), ("short", 3))
    ]  # fmt: skip
    start(backbone, cases=[*suites[0], *suites[1]], methods=[])
    turns = [name for (name,) in measured]
    assert turns == ["long0", "short0", "long1", "long2", "short1", "long3", "long4", "short2", "long5"]


def test_progress_ends_at_all_of_it(backbone: Backbone, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    for _ in range(2):
        told.append(("run", -1.0))
        start(backbone, tmp_path, lambda *step: told.append(step), cases=MADE[:5])
    shares = [share for step, share in told if step == str(CELL)]
    assert len(shares) == 2 and 0.2 < shares[0] < shares[1] == 1
    # Nothing is left to tell of on the second run.
    assert told[-2:] == [("run", -1.0), ("making cases", 0.0)]


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("moment", ["progress", "measuring", "writing"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    backbone: Backbone,
    whole: list[CaseResult],
    tmp_path: Path,
    measured: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    after: int,
) -> None:
    calls: list[int] = []

    def interrupted(function: Any) -> Any:
        def called(*given: Any) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return function(*given)

        return called

    progress = None
    with monkeypatch.context() as patched:
        if moment == "progress":
            progress = interrupted(lambda *_: None)
        elif moment == "measuring":
            patched.setattr(module, "measure_context", interrupted(module.measure_context))
        else:
            patched.setattr(module, "_append", interrupted(module._append))
        if after < len(GROUPS) or moment == "progress":
            with pytest.raises(KeyboardInterrupt):
                start(backbone, tmp_path, progress)
        else:
            start(backbone, tmp_path, progress)
    done = len(measured) - (1 if moment == "writing" and after < len(GROUPS) else 0)
    assert done == {"progress": min(after, 3), "measuring": after, "writing": after}[moment]
    measured.clear()
    again = start(backbone, tmp_path)
    assert untimed(again.results) == whole and measured == GROUPS[done:] and kept(tmp_path) == ORDER
    assert untimed(start(backbone, tmp_path).results) == whole and measured == GROUPS[done:]


@pytest.mark.parametrize("killed", ["in a line", "in a character", "between lines", "before the first line"])
def test_a_case_that_was_not_written_whole_is_measured_again(
    backbone: Backbone, whole: list[CaseResult], tmp_path: Path, measured: list[list[str]], killed: str
) -> None:
    first = [case for case in MADE if case.id in GROUPS[0]]
    start(backbone, tmp_path, cases=first)
    lines = (tmp_path / CASES).read_bytes().splitlines(keepends=True)
    assert len(lines) == len(first) == 3
    left = {
        "in a line": b"".join(lines)[:-40],
        "in a character": b"".join(lines[:-1]) + b'{"id": "\xe2\x80',
        "between lines": b"".join(lines[:-1]),
        "before the first line": b"",
    }[killed]
    (tmp_path / CASES).write_bytes(left)
    measured.clear()
    assert untimed(start(backbone, tmp_path, cases=first).results) == whole[:3]
    # The cases of a context are measured together, and those that were kept stay as they were.
    assert measured == GROUPS[:1] and kept(tmp_path) == GROUPS[0]
    written = (tmp_path / CASES).read_bytes().splitlines(keepends=True)
    assert written[:2] == lines[:2] or left == b""


def test_an_answer_with_a_line_separator_is_kept(backbone: Backbone, tmp_path: Path, measured: list[list[str]]) -> None:
    start(backbone, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / CASES).read_text("utf-8").split("\n")[:-1]]
    lines[0]["methods"]["mask"]["answers"][0]["answer"] = "a\u2028b\x85"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / CASES).write_text(text, "utf-8")
    again = start(backbone, tmp_path)
    assert len(measured) == len(GROUPS) and again.results[0].methods["mask"].answers[0].answer == "a\u2028b\x85"


def test_more_cases_go_on_and_fewer_are_the_first(
    backbone: Backbone, tmp_path: Path, measured: list[list[str]]
) -> None:
    whole, fewer = heldout(), heldout(1)
    expected = {result.id: result for result in untimed(start(backbone, cases=whole).results)}
    assert len(expected) == 4 and len(fewer) == 2
    measured.clear()
    for cases, total in ((fewer, 2), (whole, 4), (fewer, 4), (whole, 4)):
        results = untimed(start(backbone, tmp_path, cases=cases).results)
        assert {result.id: result for result in results} == {case.id: expected[case.id] for case in cases}
        # Cells take turns, so that a stopped run has some of each.
        assert [result.cell.length for result in results] == [260, 340] * (len(cases) // 2)
        assert len(measured) == total


def test_a_cell_does_not_hang_on_the_others(backbone: Backbone) -> None:
    alone = untimed(start(backbone, cases=heldout(lengths=(340,))).results)
    together = untimed(start(backbone, cases=heldout()).results)
    assert alone == [one for one in together if one.cell.length == 340] and len(alone) == 2
    sizes = {length: [one.context_tokens for one in together if one.cell.length == length] for length in (260, 340)}
    assert 230 < min(sizes[260]) <= max(sizes[260]) < min(sizes[340]) < 450


def test_the_same_seed_gives_the_same_run(backbone: Backbone) -> None:
    results = []
    for seed in (3, 3, 4):
        plan = plan_suite("heldout", ("span_neighbor",), (260,), (40,), 2)
        settings = QualitySettings(plans=(plan,), seed=seed)
        cases, left_out = make_cases(backbone.tokenizer, settings, CORPUS)
        measured = run_cases(backbone, METHODS, settings, cases, left_out)
        results.append(
            (untimed(measured.results), to_json(measured, backbone, settings, METHODS, "kveraser evaluate")["rows"])
        )
    timeless = [[{**row, "seconds": 0} for row in made] for _, made in results]
    assert results[0][0] == results[1][0] != results[2][0] and timeless[0] == timeless[1] != timeless[2]


def test_a_folder_of_another_run_is_refused_and_stays_as_it_is(backbone: Backbone, tmp_path: Path) -> None:
    cases = MADE[:2]
    start(backbone, tmp_path, cases=cases)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {CASES, SETTINGS}
    erasing, other = tiny_backbone(num_hidden_layers=1), tiny_backbone(seed=1)
    attach_random_eraser(erasing)
    others: dict[str, Callable[[], QualityRun]] = {
        "seed": lambda: start(backbone, tmp_path, cases=cases, seed=4),
        "corpus": lambda: start(backbone, tmp_path, cases=cases, corpus="other"),
        "dataset": lambda: start(backbone, tmp_path, cases=cases, dataset="other"),
        "case_file": lambda: start(backbone, tmp_path, cases=cases, case_file="other"),
        "methods": lambda: start(backbone, tmp_path, cases=cases, methods=METHODS[:1]),
        "backbone_fingerprint": lambda: start(other, tmp_path, cases=cases),
        "eraser": lambda: start(erasing, tmp_path, cases=cases),
        "case b": lambda: start(backbone, tmp_path, cases=[cases[0], replace(cases[1], queries=cases[1].queries * 2)]),
    }
    for key, begin in others.items():
        with pytest.raises(InputError, match=f"holds another run: its {key} "):
            begin()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    start(backbone, tmp_path, cases=cases)


def test_a_retrained_eraser_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    first, second = tiny_backbone(), tiny_backbone()
    attach_random_eraser(first, seed=0)
    attach_random_eraser(second, seed=1)
    start(first, tmp_path, cases=MADE[:1])
    with pytest.raises(InputError, match="its eraser_fingerprint"):
        start(second, tmp_path, cases=MADE[:1])


def test_files_that_are_no_run_are_not_touched(backbone: Backbone, tmp_path: Path) -> None:
    training, broken, line, empty, file = (tmp_path / name for name in ("training", "broken", "line", "empty", "file"))
    training.mkdir()
    (training / CASES).write_text('{"id": "a training case"}\n')
    broken.mkdir()
    (broken / SETTINGS).write_text('{"seed": ')
    for folder, text in ((line, '{"id": "a"}\n'), (empty, "[]\n")):
        start(backbone, folder, cases=MADE[:1])
        (folder / CASES).write_text(text + (folder / CASES).read_text("utf-8"))
    file.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, said in (
        (training, "no quality run"), (broken, "can't be read"), (line, "line 1"), (empty, "line 1"), (file, "file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            start(backbone, folder, cases=MADE[:1])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_cells_that_are_too_long_are_named_whole(backbone: Backbone, measured: list[list[str]]) -> None:
    long, given = Cell("test", "long", 900), LeftOut(Cell("niah", "needle", 9), "too short")
    text = f"{CONTEXT} {'The sea was grey. ' * 40}"
    cases = [*MADE[:2], bench_case("short", WHEN, cell=long), bench_case("long", WHEN, context=text, cell=long)]
    run = run_cases(backbone, METHODS, OWN, cases, [given])
    # Without its longest cases it would be another cell.
    assert [result.id for result in run.results] == ["a", "b"] and measured == [["a", "b"]]
    assert [one.cell for one in run.left_out] == [given.cell, long]
    assert f"tiny-llama has {POSITIONS}" in run.left_out[1].reason
    assert any(str(size) in run.left_out[1].reason for size in range(POSITIONS + 1, POSITIONS + NOTICE_TOKENS))
    with pytest.raises(InputError, match=r"nothing to measure \(test/long.*shorter lengths"):
        run_cases(backbone, METHODS, OWN, cases[2:])
    with pytest.raises(InputError, match=r"nothing to measure \(no cases\)"):
        run_cases(backbone, METHODS, OWN, [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"cases": [bench_case(erase=[Text("Nothing.")])]}, "case a: 'Nothing.' is not in the context"),
        ({"cases": [bench_case("x", context=" ")]}, "case x: the text is empty"),
        ({"methods": [*METHODS, make_method("mask")]}, "mask: give each once"),
        ({"cases": []}, "nothing to measure"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_anything_is(
    backbone: Backbone, tmp_path: Path, measured: list[list[str]], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        start(backbone, tmp_path / "run", **given)
    assert not measured and not (tmp_path / "run").exists()


def test_tasks_are_judged_and_every_figure_is_there(tmp_path: Path) -> None:
    backbone = tiny_backbone(max_position_embeddings=4 * POSITIONS)
    plan = plan_suite("heldout", ("needle", "stale"), (1200,), (150,), 1)
    settings = QualitySettings(plans=(plan,), seed=0, corpus="people")
    cases, left_out = make_cases(backbone.tokenizer, settings, test_tasks.PASSAGES)
    measured = run_cases(backbone, METHODS[:1], settings, cases, left_out)
    result = to_json(measured, backbone, settings, METHODS[:1], "kveraser evaluate")
    assert [row["task"] for row in result["rows"][:6]] == ["needle"] * 3 + ["stale"] * 3
    assert (result["settings"]["methods"], result["settings"]["corpus"]) == (["mask"], "people")
    assert result["seconds"] == measured.seconds > 0
    assert {"machine", "versions", "commit", "backbone", "eraser"} <= set(result)
    for row in result["rows"]:
        # No question of these tasks names a secret, and no cell has a distance or a depth of its own.
        unset = {name for name, value in row.items() if value is None}
        # Nothing was recovered where the span flipped no answer, and nothing broken where all were flipped.
        shares = {f"{share}{end}" for share in ("recovered", "broken") for end in ("", "_low", "_high")}
        assert unset <= {"leak_rate", "distance", "depth"} | shares and "nan" not in map(str, row.values())
        assert row["fidelity_low"] <= row["fidelity"] <= row["fidelity_high"]
        if row["method"] == "none":
            assert row["fidelity"] == 0 and row["kl"] == row["kl_unerased"] > 0.01
        if row["method"] == "recompute":
            assert abs(row["kl"]) < 1e-5 and row["leak"] == 0 and row["fidelity"] == pytest.approx(1, abs=1e-4)
            assert row["em"] == row["em_exact"]
    write_result(tmp_path, result)
    assert json.loads((tmp_path / RESULT).read_text("utf-8")) == json.loads(json.dumps(result))
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]
    with pytest.raises(InputError, match="can't keep the run"):
        write_result(tmp_path / RESULT, result)
