"""Plans of quality runs: suites with their sizes, and named profiles."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluation.suites import SUITES, SuiteSettings
from kveraser.errors import InputError
from kveraser.measure.case import ALL, BenchCase, Cell, LeftOut
from kveraser.measure.run import RunSettings


@dataclass(frozen=True)
class Only:
    """The values of an axis that are measured in a task."""

    task: str
    axis: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class SuitePlan:
    """One suite of a run: which tasks, context lengths and span lengths in tokens, and how many cases a cell.

    Attributes:
        only: limits some tasks to values of an axis of `Cell`.
    """

    suite: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    cases: int
    only: tuple[Only, ...] = ()

    def __post_init__(self) -> None:
        known = SUITES[self.suite].tasks
        unknown = [task for task in self.tasks if task not in known]
        if unknown or not self.tasks:
            named = repr(unknown[0]) if unknown else "given"
            raise InputError(f"{self.suite} has no task {named}: there are {', '.join(known)}")
        for name, sizes in (("lengths", self.lengths), ("spans", self.spans), ("cases", (self.cases,))):
            if min(sizes, default=1) < 1:
                raise InputError(f"{name} is {sizes}: give numbers from 1 on")
        if not self.lengths:
            raise InputError("lengths is empty: give at least one context length")
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths), ("spans", self.spans)):
            if len(set(values)) < len(values):
                raise InputError(f"{name} is {values}: give each once")

    def wants(self, cell: Cell) -> bool:
        """Whether a cell that the suite makes is measured."""
        return all(getattr(cell, one.axis) in one.values for one in self.only if one.task == cell.task)


@dataclass(frozen=True, kw_only=True)
class QualitySettings(RunSettings):
    """Settings of a run of suites: one plan for each suite, and the sources of its cases."""

    plans: tuple[SuitePlan, ...] = ()

    def __post_init__(self) -> None:
        if not self.plans and self.case_file is None:
            raise InputError(f"nothing to measure: name a suite ({', '.join(SUITES)}) or give a file of cases")
        names = [plan.suite for plan in self.plans]
        if len(set(names)) < len(names):
            raise InputError(f"the suites are {', '.join(names)}: give each once")

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        return {"suites": plain.pop("plans"), **plain}


def make_cases(
    tokenizer: Any,
    settings: QualitySettings,
    passages: Sequence[str] = (),
    own: Sequence[BenchCase] = (),
    dataset: str | None = None,
) -> tuple[list[BenchCase], list[LeftOut]]:
    """All cases of a run, and the cells without cases.

    Args:
        passages: text to fill contexts with. Empty: the suites generate it.
        own: the user's cases.
        dataset: the questions of `longqa`: a file, or the name of a hub dataset.

    Raises:
        InputError: a suite refuses its settings, or two cases have one id.
    """
    cases, left_out = list(own), list[LeftOut]()
    for plan in settings.plans:
        made = SUITES[plan.suite].make(
            SuiteSettings(tokenizer, plan.tasks, plan.lengths, plan.spans, plan.cases, settings.seed, passages, dataset)
        )
        cases += [case for case in made.cases if plan.wants(case.cell)]
        left_out += [one for one in made.left_out if plan.wants(one.cell)]
    seen: set[str] = set()
    for case in cases:
        if case.id in seen:
            raise InputError(f"two cases have the id {case.id!r}: give each its own")
        seen.add(case.id)
    return cases, left_out


def plan_suite(
    name: str,
    tasks: tuple[str, ...] | None = None,
    lengths: tuple[int, ...] | None = None,
    spans: tuple[int, ...] | None = None,
    cases: int = 200,
) -> SuitePlan:
    """A plan with the suite's own sizes where none are given.

    Raises:
        InputError: an unknown suite or task, or invalid sizes.
    """
    if name not in SUITES:
        near = difflib.get_close_matches(name, SUITES, n=1)
        raise InputError(
            f"no suite {name!r}: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(SUITES)}")
        )
    suite = SUITES[name]
    return SuitePlan(
        name,
        suite.tasks if tasks is None else tasks,
        suite.lengths if lengths is None else lengths,
        suite.spans if spans is None else spans,
        cases,
    )


@dataclass(frozen=True)
class Sizes:
    """The sizes of one suite in a profile. Empty: the suite's own."""

    suite: str
    length: int
    spans: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    only: tuple[Only, ...] = ()


@dataclass(frozen=True)
class Profile:
    """A named set of suites for one kind of machine.

    Attributes:
        methods: as `--methods` takes them.
        cases: number in every cell.
    """

    suites: tuple[Sizes, ...]
    methods: str
    cases: int


PROFILES = {
    # For two cores: all suites in short contexts, the two ends of every axis, and one variant of every method.
    "cpu": Profile(
        (
            Sizes("niah", 320, only=(Only("needle", "depth", (0.0, 1.0)),)),
            Sizes("longqa", 384),
            Sizes("scenarios", 256, spans=(64,)),
            Sizes("chains", 448, tasks=("hops_1", "hops_4")),
            Sizes(
                "sweeps", 448, spans=(8, 128),
                only=(Only("distance", "distance", (0, 256)), Only("span_count", "spans", (1, 4))),
            ),
            Sizes("leak", 256, tasks=("key", "adversarial")),
        ),
        "mask;shift;zero_value;blank;erratum;repair;selective;follow;kveraser;kveraser+repair",
        50,
    )
}  # fmt: skip


def profile_plans(
    name: str, cases: int | None = None, dataset: str | None = None
) -> tuple[tuple[SuitePlan, ...], tuple[LeftOut, ...]]:
    """The plans of a profile, and its suites that can't be measured.

    Args:
        cases: number in every cell, instead of the profile's.
        dataset: the questions of `longqa`; None leaves it out.

    Raises:
        InputError: an unknown profile.
    """
    if name not in PROFILES:
        raise InputError(f"no profile {name!r}: there are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    plans = [
        replace(
            plan_suite(
                one.suite,
                one.tasks or None,
                (one.length,),
                one.spans or None,
                profile.cases if cases is None else cases,
            ),
            only=one.only,
        )
        for one in profile.suites
        if one.suite != "longqa" or dataset is not None
    ]
    without: tuple[LeftOut, ...] = ()
    if dataset is None and any(one.suite == "longqa" for one in profile.suites):
        without = (LeftOut(Cell("longqa", ALL), "no questions given: name a file or a hub dataset with --dataset"),)
    return tuple(plans), without
