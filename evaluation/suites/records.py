"""Staff records of any length: all they say is unimportant but for one sentence, which names somebody wrongly."""

from __future__ import annotations

import random
from typing import Any

from evaluation.suites.facts import Conflict
from evaluation.suites.text import fitted, load_words, token_count
from kveraser.training.tasks.tables import Value, fill, load_tables

JOINT = "\n\n"
"""In front of a record, and part of the span."""
TOLERANCE = 1.25
"""Most tokens of a statement, as a share of the span that it is all of."""


def records(rng: random.Random, tokenizer: Any, sizes: tuple[int, ...]) -> dict[int, Conflict]:
    """A fact for each of `sizes`, in tokens: the wrong statement is a record of that size. No two are about one person.

    Sizes that no statement fits into are left out.
    """
    words = load_words("records")
    roles = rng.sample(words["roles"], len(words["roles"]))
    names = [name for name, _ in rng.sample(load_tables("heldout").entities["first"], 2 * len(sizes))]
    drawn: dict[int, Conflict] = {}
    for size in sorted(sizes):
        true, wrong = names.pop(), names.pop()
        statements = {
            role: fill(template, {"role": role, "value": wrong})
            for role in roles
            for template in rng.sample(words["bad"], len(words["bad"]))
        }
        fitting = [role for role in roles if token_count(tokenizer, JOINT + statements[role]) <= TOLERANCE * size]
        if not fitting:
            continue
        role = fitting[0]
        roles.remove(role)
        drawn[size] = Conflict(
            right=fill(rng.choice(words["right"]), {"role": role, "value": true}),
            bad=_record(rng, tokenizer, role, statements[role], size),
            question=fill(rng.choice(words["question"]), {"role": role}),
            answer=fill(words["answer"], {"role": role, "value": true}),
            true=Value(true, (true,), {"value": true}),
            wrong=Value(wrong, (wrong,), {"value": wrong}),
        )
    return drawn


def _record(rng: random.Random, tokenizer: Any, role: str, statement: str, size: int) -> str:
    """The statement among details about the same person, without repeating one as long as there are others."""
    words = load_words("records")
    told: set[str] = set()
    left: list[str] = []

    def detail() -> str:
        if not left:
            left.extend(rng.sample(words["details"], len(words["details"])))
        template = left.pop()
        for _ in range(len(words["details"])):
            drawn = {slot: rng.choice(choices) for slot, choices in words["words"].items()}
            while drawn["other"] == drawn["weekday"]:
                drawn["other"] = rng.choice(words["words"]["other"])
            sentence = fill(template, drawn | {"role": role})
            if sentence not in told:
                break
        told.add(sentence)
        return f" {sentence}"

    details = [piece.strip() for piece in fitted(tokenizer, size - token_count(tokenizer, JOINT + statement), detail)]
    place = rng.randint(0, len(details))
    return " ".join([*details[:place], statement, *details[place:]])
