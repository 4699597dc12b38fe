"""Conflicting statements in RULER's form (arXiv:2404.06654), asked with RULER's answer prefix, and harder forms.

A context states a value twice, rightly and wrongly, and the wrong statement is erased. With the answer prefix even a
small model answers right from the exact reference, so that exact match tells methods apart.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.text import Filler, Placed, room_for_text, token_count, weave
from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters

NAME = "ruler"
DEPTHS = (0.1, 0.5, 0.9)
"""Where the wrong statement begins, as a share of the context."""
APART = 0.1
"""Share of the context between the two statements, at least."""
CITIES = (
    "Oslo", "Lima", "Cairo", "Porto", "Quito", "Turin", "Delhi", "Dakar", "Malmo", "Perth", "Hanoi", "Sofia", "Leeds",
    "Kyoto", "Basel", "Izmir",
)  # fmt: skip
ALIASES = (
    "Heron", "Falcon", "Badger", "Walrus", "Magpie", "Condor", "Lynx", "Otter", "Raven", "Bison", "Gecko", "Ibis",
    "Marten", "Plover", "Stork", "Viper",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """A statement in two versions, and what leans on it.

    Attributes:
        bad, right: with a value each.
        later: sentences that take the statement up again without its value; `distance` tokens after the wrong one.
            None: at the end of the context.
        question, answer_prefix: the answer that goes on from it is the value.
    """

    bad: str
    right: str
    question: str
    answer_prefix: str
    later: tuple[str, ...] = ()
    distance: int | None = 0


Maker = Callable[[str, str, str, str], Form]
"""Makes a form of a city, an alias, the right value and the wrong one."""


def _needle(city: str, alias: str, right: str, wrong: str) -> Form:
    return Form(
        bad=f"One of the special magic numbers for {city} is: {wrong}.",
        right=f"One of the special magic numbers for {city} is: {right}.",
        question=f"What is the special magic number for {city} mentioned in the provided text?",
        answer_prefix=f"The special magic number for {city} mentioned in the provided text is",
    )


def _restated(city: str, alias: str, right: str, wrong: str) -> Form:
    return Form(
        bad=f"For {city}, the special magic number is {wrong}.",
        right=f"People who come from {city} know that their special magic number is {right}.",
        question=f"What is the special magic number for {city} mentioned in the provided text?",
        answer_prefix=f"The special magic number for {city} mentioned in the provided text is",
        later=(f"Whoever was born in {city} learns that number by heart at school.",),
    )


def _summary(city: str, alias: str, right: str, wrong: str) -> Form:
    needle = _needle(city, alias, right, wrong)
    summary = f"To sum up what was just said: {city} has a special magic number, which was given above."
    return Form(needle.bad, needle.right, needle.question, needle.answer_prefix, (summary,))


def _alias(distance: int) -> Maker:
    def made(city: str, alias: str, right: str, wrong: str) -> Form:
        return Form(
            bad=f"In this text, the code name {alias} stands for the number {wrong}.",
            right=f"In this text, the code name {alias} stands for the number {right}.",
            question=f"Which number does the code name {alias} stand for in the provided text?",
            answer_prefix=f"In the provided text, the code name {alias} stands for the number",
            later=(f"The code name {alias} was used again here, with the meaning that was given above.",),
            distance=distance,
        )

    return made


def _variables(hops: int) -> Maker:
    def made(city: str, alias: str, right: str, wrong: str) -> Form:
        names = [f"{alias.upper()}{number}" for number in range(1, hops + 2)]
        links = tuple(f"The value of {name} is the value of {before}." for before, name in pairwise(names))
        steps = [f"the value of {name} is the value of {before}" for before, name in pairwise(names)]
        chain = ", ".join(reversed(steps))
        return Form(
            bad=f"One of the variables is {names[0]}, and the value of {names[0]} is: {wrong}.",
            right=f"One of the variables is {names[0]}, and the value of {names[0]} is: {right}.",
            question=f"What is the value of {names[-1]} in the provided text?",
            answer_prefix=f"In the provided text, {chain}, and the value of {names[0]} is:",
            later=links,
            distance=None,
        )

    return made


FORMS: dict[str, Maker] = {
    "needle": _needle,
    "restated": _restated,
    "summary": _summary,
    "alias_250": _alias(250),
    "alias_1500": _alias(1500),
    "variables_1": _variables(1),
    "variables_2": _variables(2),
}


def make(settings: SuiteSettings) -> Made:
    """The cases of every task, length and depth."""
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        for task in settings.tasks:
            for depth in DEPTHS:
                cell = Cell(NAME, task, length=length, depth=depth)
                made = [_case(settings, cell, length, depth, index) for index in range(settings.cases)]
                fitting = [case for case in made if case is not None]
                if len(fitting) == len(made):
                    cases += fitting
                else:
                    left_out.append(LeftOut(cell, f"its statements do not fit into {length} tokens at depth {depth}"))
    return Made(tuple(cases), tuple(left_out))


def _case(settings: SuiteSettings, cell: Cell, length: int, depth: float, index: int) -> BenchCase | None:
    rng = random.Random(f"{settings.seed}/{NAME}/{cell.task}/{length}/{depth}/{index}")
    right, wrong = (str(number) for number in rng.sample(range(1_000_000, 10_000_000), 2))
    form = FORMS[cell.task](rng.choice(CITIES), rng.choice(ALIASES), right, wrong)
    tokenizer, room = settings.tokenizer, room_for_text(settings.tokenizer, length)
    texts = [form.bad, form.right, *form.later]
    needed = sum(token_count(tokenizer, f" {text}") for text in texts)
    # The share is one of all tokens, the chat template's included.
    start = depth * length - (length - room)
    lookup = inf if form.distance is None else start + token_count(tokenizer, f" {form.bad}") + form.distance
    if needed > room / 2 or (lookup != inf and lookup > room - needed):
        return None
    pieces = Filler(rng, settings.passages, without=[right, wrong]).pieces(tokenizer, room - needed)
    away = next(share for share in iter(lambda: rng.uniform(0.05, 0.95), None) if abs(share - depth) >= APART)
    placed = [Placed(form.bad, start), Placed(form.right, room * away), *(Placed(text, lookup) for text in form.later)]
    woven = weave(tokenizer, pieces, placed)
    query = Query(form.question, f"{right}.", accepted=(right,), wrong=(wrong,), answer_prefix=form.answer_prefix)
    return BenchCase(
        id=f"{NAME}/{cell.task}/{length}/{depth}/{index}",
        cell=cell,
        context=woven.text,
        erase=(Characters(*woven.ranges[0]),),
        queries=(query,),
    )


RULER = Suite(
    name=NAME,
    summary="conflicting statements in RULER's form, and forms in which later text leans on the wrong one",
    tasks=tuple(FORMS),
    lengths=(1024, 2048, 4096, 7680),
    spans=(),
    make=make,
)
