"""Several processes measure what one does; and what sharing a prefill saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from kveraser.backbone import Backbone
from kveraser.bench import run as module
from kveraser.bench import sharing, workers
from kveraser.bench.case import Attack, BenchCase
from kveraser.bench.plan import QualitySettings
from kveraser.bench.run import run
from kveraser.bench.together import Memory
from kveraser.bench.workers import Work, measure_all
from kveraser.cache import EditableCache
from kveraser.errors import InputError
from kveraser.methods import Method, make_method
from kveraser.spans import Message, Text
from kveraser.training.cases import Query
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
    return [make_method(name).settled(backbone) for name in names]


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


def test_sharing_counts_the_prefills_of_contexts(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    prefill = Backbone.prefill

    def counted(self: Backbone, tokens: Sequence[int], *others: object) -> EditableCache:
        lengths.append(len(tokens))
        return prefill(self, tokens, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Backbone, "prefill", counted)
    (shared, alone), ratio = sharing.run(backbone, chosen(backbone, "mask", "shift"), sample())
    assert (shared.cases, alone.cases, shared.methods, alone.methods) == (3, 3, 2, 2)
    contexts = {len(cut(backbone, case)[0].tokens) for case in sample()}
    whole = [length for length in lengths if length in contexts]
    assert len(contexts) == 2 and (shared.prefills, alone.prefills) == (2, 6)
    # And none but these: what is timed is no check of the reference.
    assert len(whole) == len(lengths) == shared.prefills + alone.prefills
    assert ratio == pytest.approx(alone.seconds / shared.seconds)


def test_sharing_times_each_way_context_by_context(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, measured = [100.0], list[tuple[list[str], list[str]]]()

    def measure(
        _: Backbone, contexts: Sequence[tuple[object, Sequence[object]]], methods: Sequence[Method], memory: Memory
    ) -> None:
        ((_, cases),) = contexts
        measured.append(([case.case.id for case in cases], [str(method) for method in methods]))  # type: ignore[attr-defined]
        clock[0] += 10 + len(cases) * len(methods)

    monkeypatch.setattr(sharing, "measure_contexts", measure)
    monkeypatch.setattr(sharing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    steps: list[tuple[str, float]] = []
    rows, ratio = sharing.run(backbone, chosen(backbone, "mask", "shift"), sample(), lambda *step: steps.append(step))
    both, one = ["mask", "shift"], [["mask"], ["shift"]]
    assert measured == [
        (["a", "b"], both), *((["a"], each) for each in one), *((["b"], each) for each in one),
        (["e"], both), *((["e"], each) for each in one),
    ]  # fmt: skip
    assert [row.seconds for row in rows] == [10 + 4 + 10 + 2, 6 * 11] and ratio == pytest.approx(66 / 26)
    assert steps == [("context 1 of 2", 0.0), ("context 2 of 2", 0.5)]
    plain = sharing.to_json(rows, ratio, backbone, {"seed": 0})
    assert [row["way"] for row in plain["rows"]] == ["shared", "alone"] and plain["ratio"] == ratio
    assert plain["settings"] == {"seed": 0} and plain["backbone"] == backbone.name
