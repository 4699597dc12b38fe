"""Names, values and sentence templates of a split, read from its JSON file; the two splits share no entry.

Templates are `string.Template`s (`$subject`, `$value`), so they can contain JSON and quotations.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from kveraser.training.split import Split

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
ENTITIES = ("first", "last", "town", "org", "product", "dish", "motto")
SCENES = ("needle", "stale", "observation", "preference", "injection")


@dataclass(frozen=True)
class Scene:
    """A situation that states a value twice, correctly and wrongly, with later text that relies on the wrong one.

    Attributes:
        kind: kind of the value: town, person, price, code, date, product, dish or motto.
        subject: owner of the value, as questions name it.
        true, bad: sentences that state the value; in a transcript the true ones begin with a role.
        refer: later sentences that rely on the wrong value and add nothing about it.
        derive: later sentences that state a consequence of the value, never the value itself.
        questions, answers: about the true value.
        lead: turns that ask for the content of the span; empty outside transcripts.
    """

    kind: str
    subject: str
    true: tuple[str, ...]
    bad: tuple[str, ...]
    refer: tuple[str, ...]
    derive: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    lead: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactPhrases:
    """Sentences about facts of real passages; `bad`, `questions`, `answers`, `derive` by relation."""

    subjects: dict[str, str]
    bad: dict[str, list[str]]
    questions: dict[str, list[str]]
    answers: dict[str, str]
    refer: list[str]
    derive: dict[str, list[str]]
    derive_more: list[str]


@dataclass(frozen=True)
class Tables:
    """All names and templates of a split.

    Attributes:
        entities: pairs of name and hint, by sort. The hint is a town's river, a product's maker, a dish's ingredient or
            a motto's topic; it may be empty.
        texts: lists of templates by use: `rows`, `pages`, `leak` and so on.
        asides: facts that do not depend on the span, each with a question, an answer and an accepted string.
        scenes: by task.
        facts: for the task with real facts.
    """

    entities: dict[str, tuple[tuple[str, str], ...]]
    texts: dict[str, tuple[str, ...]]
    asides: tuple[dict[str, str], ...]
    scenes: dict[str, tuple[Scene, ...]]
    facts: FactPhrases


@dataclass(frozen=True)
class Value:
    """A value that can be stated correctly or wrongly.

    Attributes:
        text: the value in a sentence.
        strings: an answer that contains one of these gives the value.
        slots: template slots: `value`, and `hint` for what depends on it.
    """

    text: str
    strings: tuple[str, ...]
    slots: dict[str, str]


@cache
def load_tables(split: Split) -> Tables:
    """Load the tables of a split."""
    raw: dict[str, Any] = json.loads((resources.files(__package__) / f"{split}.json").read_text(encoding="utf-8"))
    entities = {
        sort: tuple((name, hint) for name, _, hint in (entry.partition("/") for entry in raw.pop(sort).split(", ")))
        for sort in ENTITIES
    }
    scenes = {task: tuple(_scene(scene) for scene in raw.pop(task)) for task in SCENES}
    return Tables(
        entities=entities,
        asides=tuple(raw.pop("asides")),
        facts=FactPhrases(**raw.pop("facts")),
        scenes=scenes,
        texts={use: tuple(templates) for use, templates in raw.items()},
    )


def _scene(fields: dict[str, Any]) -> Scene:
    lists: dict[str, Any] = {name: tuple(field) for name, field in fields.items() if isinstance(field, list)}
    return Scene(**{**fields, **lists})


def substitute(template: str, slots: Mapping[str, str]) -> str:
    """Fill the slots of a template, for use within a sentence."""
    return Template(template).substitute(slots)


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Fill the slots of a template and capitalize its sentences."""
    return re.sub(
        r"(^(?:User: |Assistant: |Tool: |System: )?|[.!?] )([a-z])",
        lambda match: match[1] + match[2].upper(),
        substitute(template, slots),
    )


def initials(name: str) -> str:
    """Return the initials of a name: `AA` of `Anna Adler`."""
    return "".join(part[0] for part in name.split())


class Cast:
    """Draws the entities of one case from the tables, without repetition."""

    def __init__(self, rng: random.Random, tables: Tables) -> None:
        self.rng = rng
        self._left = {sort: iter(rng.sample(entries, len(entries))) for sort, entries in tables.entities.items()}
        self._dates: Iterator[int] = iter(rng.sample(range(12 * 27), 12))
        self._numbers: Iterator[int] = iter(rng.sample(range(203, 980), 40))

    def value(self, kind: str) -> Value:
        """Draw a value of a kind."""
        if kind == "person":
            first, last = next(self._left["first"])[0], next(self._left["last"])[0]
            return _value(f"{first} {last}", (f"{first} {last}", last), initials(f"{first} {last}"))
        if kind == "date":
            month, day = divmod(next(self._dates), 27)
            name = MONTHS[month]
            return _value(f"{day + 2} {name}", (f"{day + 2} {name}", f"{name} {day + 2}"), f"{day + 1} {name}")
        if kind in ("price", "code"):
            number, fee = next(self._numbers), self.rng.randrange(11, 30)
            unit = " euros" if kind == "price" else ""
            value = _value(f"{number}{unit}", (str(number),), f"{number + fee}{unit}")
            return Value(value.text, value.strings, {**value.slots, "fee": str(fee)})
        name, hint = next(self._left[kind])
        return _value(name, (name,), hint)

    def slots(self) -> dict[str, str]:
        """Draw names for a sentence: `org`, `town`, `person`, `product`, `ref`, `count`, `clock` and `day`."""
        return {
            "org": next(self._left["org"])[0],
            "town": next(self._left["town"])[0],
            "product": next(self._left["product"])[0],
            "person": self.value("person").text,
            "ref": f"{self.rng.choice('ABCDEFGHKLMNPRST')}{self.rng.choice('CDFGHJKL')}-{next(self._numbers)}",
            "count": str(next(self._numbers)),
            "clock": f"{self.rng.randrange(7, 21)}:{self.rng.choice(('05', '15', '20', '30', '40', '45'))}",
            "day": self.value("date").text,
        }


def _value(text: str, strings: tuple[str, ...], hint: str) -> Value:
    return Value(text, strings, {"value": text, "hint": hint})
