"""Facts that a context states rightly in one place and wrongly in another, in the project's own words."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from evaluation.suites.text import load_words
from kveraser.measure.questions import Query, QueryKind
from kveraser.training.tasks.tables import Cast, Value, fill, load_tables


@dataclass(frozen=True)
class Conflict:
    """One fact, stated rightly and wrongly.

    Attributes:
        right, bad: the two sentences, in different words.
        question, answer: about the right value.
    """

    right: str
    bad: str
    question: str
    answer: str
    true: Value
    wrong: Value

    def query(self, kind: QueryKind = "influence") -> Query:
        """The question about the fact; only an influence question is judged for exact match."""
        if kind != "influence":
            return Query(self.question, self.answer, kind)
        return Query(self.question, self.answer, accepted=self.true.strings, wrong=self.wrong.strings)


def conflicts(rng: random.Random, count: int) -> list[Conflict]:
    """`count` facts about different places of different towns, no value of which occurs twice."""
    words, cast = load_words("facts"), Cast(rng, load_tables("heldout"))
    chosen = rng.sample(words["facts"], len(words["facts"]))
    drawn = []
    for index in range(count):
        fact = chosen[index % len(chosen)]
        true, wrong = cast.value(fact["kind"]), cast.value(fact["kind"])
        slots = {"town": cast.value("town").text, "site": rng.choice(words["site"])}
        right, bad = rng.sample(fact["statements"], 2)
        drawn.append(
            Conflict(
                right=fill(right, slots | true.slots),
                bad=fill(bad, slots | wrong.slots),
                question=fill(rng.choice(fact["questions"]), slots),
                answer=fill(fact["answer"], slots | true.slots),
                true=true,
                wrong=wrong,
            )
        )
    return drawn


def values(told: Iterable[Conflict]) -> list[str]:
    """Every right and wrong value, in all its forms."""
    return [text for one in told for value in (one.true, one.wrong) for text in value.strings]
