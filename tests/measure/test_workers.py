"""Several processes measure what one does; and what sharing a prefill saves."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from evaluation.plan import QualitySettings
from kveraser.errors import InputError
from kveraser.measure import run as module
from kveraser.measure import workers
from kveraser.measure.case import Attack, BenchCase
from kveraser.measure.questions import Query
from kveraser.measure.run import run
from kveraser.measure.workers import Work, measure_all
from kveraser.methods import Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Message, Text
from tests.bench_cases import CONTEXT, SPAN, bench_case, cut, untimed
from tests.sessions import MESSAGES
from tests.tiny import tiny_backbone

SETTINGS = QualitySettings(case_file="own.jsonl")
WHEN = [Query("When?", "at nine", accepted=("nine",)), Query(None, " It left at nine.", "no_harm")]
OTHER = f"{CONTEXT} The boat was towed in."
CASES = [
    bench_case("a", WHEN),
    bench_case("b", WHEN, [Text("at six"), Text("of four")]),
    bench_case("c", WHEN, context=OTHER, attack=Attack(("",), ("The colour?",), ("", "Now."), SPAN, "blue", 0)),
    bench_case("d", WHEN, [Message(3)], tuple(MESSAGES)),
    bench_case("e", WHEN, [Text("at nine")], OTHER),
]


def chosen(backbone: Backbone, *names: str) -> list[Method]:
    return [make_method(name).resolve(backbone) for name in names]


def test_several_processes_give_what_one_gives_in_the_same_order(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = chosen(backbone, "mask", "erratum", "repair(4)")
    monkeypatch.setattr(module, "CASES_TOGETHER", 1)
    alone = run(backbone, methods, SETTINGS, CASES)
    assert [result.id for result in alone.results] == ["a", "b", "c", "e", "d"]
    # As many threads in each as here.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(workers, "measure_contexts", None)
    told: list[float] = []
    load = partial(tiny_backbone)
    several = run(
        backbone, methods, SETTINGS, CASES, (), tmp_path, lambda _, share: told.append(share), workers=2, load=load
    )
    assert untimed(several.results) == untimed(alone.results)
    assert len(told) == 4 and told == sorted(told) and told[-1] == 1
    # All is kept: nothing is left to measure, here or elsewhere.
    assert run(backbone, methods, SETTINGS, CASES, (), tmp_path).results == several.results


@pytest.mark.parametrize("count", [0, 2])
def test_processes_need_a_number_and_a_way_to_load_the_backbone(backbone: Backbone, count: int) -> None:
    context, cases = cut(backbone, CASES[0])
    with pytest.raises(InputError, match=f"workers is {count}"):
        list(measure_all(backbone, [], [Work(((context, tuple(cases)),))], count))


def load_and_die() -> Backbone:
    """A worker that is killed while it loads, as one that takes too much memory is."""
    os._exit(9)


def test_a_process_that_dies_is_said_so(backbone: Backbone) -> None:
    context, cases = cut(backbone, CASES[0])
    with pytest.raises(InputError, match=r"one of 2 processes ended before its time.*fewer workers"):
        list(measure_all(backbone, [], [Work(((context, tuple(cases)),))], 2, load_and_die))


def test_a_process_ends_with_the_run_that_started_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    parent = SimpleNamespace(join=lambda: ended.append("joined"))
    monkeypatch.setattr(workers.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(workers.os, "_exit", lambda code: ended.append(f"exit {code}"))
    workers._end_with_parent()
    assert ended == ["joined", "exit 1"]


def sample() -> list[BenchCase]:
    """Three cases in two contexts, with nothing to decode."""
    return [replace(case, queries=WHEN[1:]) for case in (CASES[0], CASES[1], CASES[4])]
