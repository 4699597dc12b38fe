"""Building case files: resuming interrupted builds, refusing partial files of other settings, statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.measure.questions import Query
from kveraser.training.build import BuildSettings, Stage, build_cases, statistics_of
from kveraser.training.cases import Case, read_cases
from kveraser.training.split import split_passages
from tests.training.case_files import write_cases

NOUNS = ("harbour", "ledger", "orchard", "lantern", "viaduct", "granary", "ferry", "quarry")
PASSAGES = [
    " ".join(f"The {noun} of year {year} was open on {day} days, and the keeper wrote it down." for day in range(9))
    for noun in NOUNS
    for year in range(1900, 1912)
]
SMALL = BuildSettings(stage="both", tasks=("needle", "stale"), cases=9, context=(150, 170), span=(8, 40), seed=3)


class Killed(BaseException):
    """What no handler expects."""


def killed_after(cases: int) -> Callable[[str, float], None]:
    def progress(step: str, fraction: float) -> None:
        if step.startswith(f"{cases} of"):
            raise Killed

    return progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    path = tmp_path_factory.mktemp("whole") / "cases.jsonl"
    assert build_cases(path, PASSAGES, SMALL) == 0
    return list(read_cases(path))


@pytest.mark.parametrize("stage", ["1", "2", "both"])
def test_stages_are_mixed_as_they_are_called(tmp_path: Path, stage: Stage) -> None:
    build_cases(tmp_path / "cases.jsonl", PASSAGES, replace(SMALL, stage=stage, cases=5))
    tasks = [case.task for case in read_cases(tmp_path / "cases.jsonl")]
    neighbors, others = ["span_neighbor"] * 5, ["needle", "stale"] * 3
    mixed = [task for pair in zip(neighbors, others, strict=False) for task in pair]
    assert tasks == {"1": neighbors, "2": others[:5], "both": mixed[:5]}[stage]


@pytest.mark.parametrize("stage", ["1", "2", "both"])
@pytest.mark.parametrize("done", [1, 4])
def test_an_interrupted_build_continues_after_its_last_case(tmp_path: Path, stage: Stage, done: int) -> None:
    settings = replace(SMALL, stage=stage)
    target, other = tmp_path / "cases.jsonl", tmp_path / "other.jsonl"
    with pytest.raises(Killed):
        build_cases(target, PASSAGES, settings, progress=killed_after(done))
    assert not target.exists()
    partial = tmp_path / ".cases.jsonl.part"
    # A kill may cut the last line anywhere.
    partial.write_bytes(partial.read_bytes() + b'{"id": "half a li')
    made: list[str] = []
    assert build_cases(target, PASSAGES, settings, progress=lambda step, _: made.append(step)) == done
    assert len(made) == 9 - done
    build_cases(other, PASSAGES, settings)
    assert target.read_bytes() == other.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"cases.jsonl", "other.jsonl"}


def test_a_partial_file_of_other_settings_or_text_is_refused_or_discarded(tmp_path: Path) -> None:
    target = tmp_path / "cases.jsonl"
    with pytest.raises(Killed):
        build_cases(target, PASSAGES, SMALL, progress=killed_after(3))
    with pytest.raises(InputError, match=r"other seed \(3, not 4\).*--no-resume"):
        build_cases(target, PASSAGES, replace(SMALL, seed=4))
    with pytest.raises(InputError, match="other passages"):
        build_cases(target, PASSAGES[:-1], SMALL)
    assert build_cases(target, PASSAGES, replace(SMALL, seed=4), resume=False) == 0
    fresh = tmp_path / "fresh.jsonl"
    build_cases(fresh, PASSAGES, replace(SMALL, seed=4))
    assert target.read_bytes() == fresh.read_bytes()


def test_a_partial_file_whose_settings_are_lost_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "cases.jsonl"
    with pytest.raises(Killed):
        build_cases(target, PASSAGES, SMALL, progress=killed_after(3))
    (tmp_path / ".cases.jsonl.part.json").unlink()
    with pytest.raises(InputError, match="--no-resume"):
        build_cases(target, PASSAGES, SMALL)


def test_an_earlier_file_is_kept_until_the_new_one_is_complete(tmp_path: Path, whole: list[Case]) -> None:
    target = tmp_path / "cases.jsonl"
    write_cases(target, whole[:2])
    with pytest.raises(Killed):
        build_cases(target, PASSAGES, SMALL, progress=killed_after(3))
    assert list(read_cases(target)) == whole[:2]
    build_cases(target, PASSAGES, SMALL)
    assert list(read_cases(target)) == whole


def test_arrow_files_and_folders_of_them_hold_the_same_cases(tmp_path: Path, whole: list[Case]) -> None:
    target = tmp_path / "folder" / "cases.arrow"
    with pytest.raises(Killed):
        build_cases(target, PASSAGES, SMALL, progress=killed_after(3))
    assert build_cases(target, PASSAGES, SMALL) == 3
    assert list(read_cases(target)) == list(read_cases(target.parent)) == whole
    assert any(query.question is None for case in whole for query in case.queries)
    assert [path.name for path in target.parent.iterdir()] == ["cases.arrow"]


def test_an_invalid_arrow_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cases.arrow").write_text("{}\n")
    with pytest.raises(InputError, match="can't read cases"):
        list(read_cases(tmp_path / "cases.arrow"))
    with pytest.raises(InputError, match="can't read cases"):
        list(read_cases(tmp_path / "missing.arrow"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no \.arrow file"):
        list(read_cases(tmp_path / "empty"))


def test_statistics_count_tasks_kinds_and_sizes(chat_tokenizer: Any) -> None:
    context = "one two three four five six seven eight nine ten"
    leak, harm = Query("a?", "one two", "leak"), Query("b?", "three", "no_harm")
    cases = [Case(str(size), "short", context, (0, size), (leak, harm)) for size in (3, 7, 7)]
    cases += [Case("x", "long", f"{context} {context}", (0, 13), (leak, leak))]
    counted = statistics_of(cases, chat_tokenizer)
    assert (counted.cases, counted.duplicates) == (4, 1)
    assert [(row.task, row.cases, row.influence, row.leak, row.no_harm) for row in counted.tasks] == [
        ("short", 3, 0, 3, 3),
        ("long", 1, 0, 2, 0),
    ]
    sizes = {row.what: (row.shortest, row.median, row.nine_in_ten, row.longest) for row in counted.sizes}
    assert sizes["context, words"] == (10, 10, 20, 20)
    assert sizes["span, words"] == (1, 2, 3, 3)
    assert sizes["answers, words"] == (3, 3, 4, 4)
    # The tokenizer knows hardly a word: a token is a character, and the frame of a turn comes on top.
    assert sizes["context, tokens"][0] > len(context) / 2 > sizes["context, words"][0]
    assert sizes["answers, tokens"][3] >= 2 * 3
    assert len(statistics_of(cases).sizes) == 3
    with pytest.raises(InputError, match="no case"):
        statistics_of([])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"span": (9, 3)}, "span is 9 3"),
        ({"context": (0, 3)}, "context is 0 3"),
        ({"stage": "3"}, "stage is '3'.*both"),
        ({"split": "test"}, "split is 'test'.*heldout"),
        ({"tasks": ("nedle",)}, "'nedle'.*needle"),
        ({"tasks": ()}, "no task"),
        ({"cases": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_cases(tmp_path / "cases.jsonl", PASSAGES, replace(SMALL, **changes))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: list[Case]) -> None:
    original, written = Case.to_json, []

    def full(case: Case) -> str:
        written.append(case)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        return original(case)

    monkeypatch.setattr(Case, "to_json", full)
    with pytest.raises(InputError, match=r"No space left.*continues from the last case"):
        build_cases(tmp_path / "cases.jsonl", PASSAGES, SMALL)
    assert build_cases(tmp_path / "cases.jsonl", PASSAGES, SMALL) == 3
    assert list(read_cases(tmp_path / "cases.jsonl")) == whole


@pytest.mark.parametrize("stage", ["1", "2"])
def test_a_split_is_built_from_its_own_passages(tmp_path: Path, stage: Stage) -> None:
    held_out = split_passages(PASSAGES, "heldout")
    assert 8 <= len(held_out) < len(PASSAGES) / 2
    settings = replace(SMALL, stage=stage, split="heldout", cases=3)
    build_cases(tmp_path / "all.jsonl", PASSAGES, settings)
    build_cases(tmp_path / "own.jsonl", held_out, settings)
    build_cases(tmp_path / "train.jsonl", PASSAGES, replace(settings, split="train"))
    everything, own, train = (list(read_cases(tmp_path / f"{name}.jsonl")) for name in ("all", "own", "train"))
    assert everything == own != train
