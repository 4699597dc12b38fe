"""What a quality run is to measure: suites, sizes and profiles, and what is refused before anything is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evaluation.plan import PROFILES, Only, QualitySettings, SuitePlan, make_cases, plan_suite, profile_plans
from evaluation.suites import SUITES
from kveraser.errors import InputError
from kveraser.measure.case import ALL, Cell
from kveraser.measure.rows import AXES
from kveraser.methods import METHODS, make_method
from tests.bench_cases import bench_case
from tests.tiny import tiny_tokenizer
from tests.training.test_train_data import HELD_OUT, PASSAGES

CORPUS = [*PASSAGES, *HELD_OUT]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_its_own_sizes_where_none_are_given(name: str) -> None:
    suite = SUITES[name]
    assert plan_suite(name) == SuitePlan(name, suite.tasks, suite.lengths, suite.spans, 200)
    task = suite.tasks[-1:]
    assert plan_suite(name, task, (256,), (16,), 3) == SuitePlan(name, task, (256,), (16,), 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "niha"}, "no suite 'niha': did you mean niah?"),
        ({"name": "zzz"}, f"no suite 'zzz': there are {', '.join(SUITES)}"),
        ({"tasks": ("noodle",)}, "heldout has no task 'noodle': there are span_neighbor, needle"),
        ({"tasks": ()}, "heldout has no task given"),
        ({"tasks": ("needle", "needle")}, "tasks is .*: give each once"),
        ({"lengths": (260, 260)}, "lengths is .*: give each once"),
        ({"spans": (40, 40)}, "spans is .*: give each once"),
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (0,)}, "lengths is .*: give numbers from 1 on"),
        ({"spans": (-5,)}, "spans is .*: give numbers from 1 on"),
        ({"cases": 0}, "cases is .*: give numbers from 1 on"),
    ],
)
def test_what_no_suite_has_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_suite(**({"name": "heldout"} | given))


def test_the_cpu_profile_takes_every_generated_suite_at_sizes_of_its_own() -> None:
    plans, without = profile_plans("cpu")
    assert [plan.suite for plan in plans] == ["niah", "scenarios", "chains", "sweeps", "leak"]
    assert [one.cell for one in without] == [Cell("longqa", ALL)] and "--dataset" in without[0].reason
    profile = PROFILES["cpu"]
    sizes = {one.suite: one for one in profile.suites}
    for plan in plans:
        own, suite = sizes[plan.suite], SUITES[plan.suite]
        tasks, spans = own.tasks or suite.tasks, own.spans or suite.spans
        assert plan == SuitePlan(plan.suite, tasks, (own.length,), spans, profile.cases, own.only)
        # Every choice is one of a task that the profile measures, on an axis that there is.
        assert all(one.task in plan.tasks and one.axis in AXES and len(one.values) > 1 for one in plan.only)
    compared = {make_method(name).name for name in profile.methods.split(";")}
    assert compared == {name for name, method in METHODS.items() if not method.is_reference}
    with_questions, without = profile_plans("cpu", 3, "questions.json")
    assert [plan.suite for plan in with_questions] == [one.suite for one in PROFILES["cpu"].suites]
    assert {plan.cases for plan in with_questions} == {3} and without == ()
    assert {plan.suite for plan in with_questions} == set(SUITES) - {"heldout", "ruler", "edits"}


def test_profiles_that_are_none_and_counts_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="no profile 'gpu': there are cpu"):
        profile_plans("gpu")
    with pytest.raises(InputError, match="cases is"):
        profile_plans("cpu", 0)


def test_settings_need_something_to_measure_and_each_suite_once() -> None:
    with pytest.raises(InputError, match="nothing to measure: name a suite"):
        QualitySettings()
    plan = plan_suite("niah")
    with pytest.raises(InputError, match="niah, niah: give each once"):
        QualitySettings(plans=(plan, plan))
    settings = QualitySettings(plans=(plan, plan_suite("leak", cases=2)), seed=3, corpus="words")
    plain = settings.to_json()
    assert [one["suite"] for one in plain["suites"]] == ["niah", "leak"] and plain["suites"][1]["cases"] == 2
    assert (plain["seed"], plain["corpus"], plain["case_file"]) == (3, "words", None) and "plans" not in plain
    assert QualitySettings(case_file="own.jsonl").to_json()["suites"] == ()


def test_cases_are_made_suite_by_suite_after_the_users_own() -> None:
    # The tiny tokenizer has about a token a character.
    plans = (plan_suite("niah", None, (2500,), cases=1), plan_suite("leak", None, (2000,), cases=1))
    own = (bench_case("mine"),)
    made, left_out = make_cases(tiny_tokenizer(), QualitySettings(plans=plans, seed=3), (), own)
    assert made[0] == own[0] and not left_out
    assert list(dict.fromkeys(case.cell.suite for case in made)) == ["test", "niah", "leak"]
    again, _ = make_cases(tiny_tokenizer(), QualitySettings(plans=plans, seed=3), (), own)
    other, _ = make_cases(tiny_tokenizer(), QualitySettings(plans=plans, seed=4), (), own)
    assert made == again and {case.id for case in made} == {case.id for case in other}
    assert not {case.fingerprint for case in made[1:]} & {case.fingerprint for case in other[1:]}
    with pytest.raises(InputError, match=f"two cases have the id '{made[1].id}'"):
        make_cases(tiny_tokenizer(), QualitySettings(plans=plans, seed=3), (), (bench_case(made[1].id),))


def test_a_plan_measures_only_the_cells_that_it_wants() -> None:
    whole = plan_suite("niah", None, (2500, 90), cases=2)
    some = replace(whole, only=(Only("needle", "depth", (0.0, 1.0)), Only("leak", "depth", (7.0,))))
    made, left_out = make_cases(tiny_tokenizer(), QualitySettings(plans=(whole,)))
    fewer, fewer_out = make_cases(tiny_tokenizer(), QualitySettings(plans=(some,)))
    assert fewer == [case for case in made if case.cell.depth in (0, 1)] and len(fewer) == 4 < len(made)
    assert fewer_out == [one for one in left_out if one.cell.depth in (0, 1)] and len(fewer_out) == 2 < len(left_out)


def test_what_a_suite_can_not_make_is_left_out_with_a_reason() -> None:
    plan = plan_suite("heldout", ("span_neighbor",), (260,), (40, 200), 1)
    made, left_out = make_cases(tiny_tokenizer(), QualitySettings(plans=(plan,)), CORPUS)
    assert len(made) == 1
    assert [(one.cell, one.reason) for one in left_out] == [
        (Cell("heldout", ALL, 260, 200), "the span is over 60% of the context")
    ]


@pytest.mark.parametrize(
    ("plan", "corpus", "said"),
    [
        (plan_suite("heldout"), [], "made from text: give a corpus"),
        (plan_suite("heldout"), [" "], "no words"),
        (plan_suite("heldout", None, (260,), (300,)), CORPUS, "shorter spans"),
        (plan_suite("heldout", None, (99_999,), (40,)), CORPUS, "span of 40 in 99999 tokens.*longer corpus"),
        (plan_suite("heldout", ("needle",), (260,), (40,)), CORPUS, "no cases of needle.*at least 150"),
        (plan_suite("longqa"), [], "longqa reads questions.*--dataset"),
    ],
)
def test_what_a_suite_refuses_is_refused(plan: SuitePlan, corpus: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_cases(tiny_tokenizer(), QualitySettings(plans=(plan,)), corpus)
