"""Patterns that find facts in passages: births, deaths, directors, writers, sources, places."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.training.tasks.tables import MONTHS

LAST_WORD = 60
"""Most words of a passage up to the end of the fact."""

SHOWN_WORDS = 75
"""Most words shown of a passage; it is cut after the sentence that states the fact."""
SENTENCE_END = re.compile(r"(?<=[a-z0-9)]{2})[.!?]\s")

_DAY = rf"\d{{1,2}} (?:{'|'.join(MONTHS)}) \d{{3,4}}"
_PERSON = r"[A-Z][\w'\u2019-]+(?: (?:[A-Z]\.|[A-Z][\w'\u2019-]+|de|von|van|der)){0,2} [A-Z][\w'\u2019-]+"
_PLACE = r"[A-Z][\w'\u2019-]+(?: [A-Z][\w'\u2019-]+)*(?:, [A-Z][\w'\u2019-]+(?: [A-Z][\w'\u2019-]+)*)?"
_NAME = r"^(?P<name>(?:The )?[A-Z][^,().;:\"]{2,60}?)"
_WORK = (
    _NAME + r"\s?(?:\([^)]*\) )?(?:is|was) an? [^.]*?(?:film|movie|series|play|novel|musical|opera|drama|comedy)[^.]*?"
)

RELATIONS: dict[str, tuple[str, ...]] = {
    "born": (
        rf"{_NAME}\s?\(\s?(?:born:? (?:on )?|b\. )(?P<value>{_DAY})",
        rf"{_NAME}\s?\(\s?(?P<value>{_DAY}) ?[\u2013-]",
    ),
    "died": (rf"{_NAME}\s?\(\s?died (?:on )?(?P<value>{_DAY})", rf"{_NAME}\s?\([^)]*?[\u2013-] ?(?P<value>{_DAY})\)"),
    "birthplace": (rf"{_NAME}\s?(?:\([^)]*\) )?(?:is|was) [^.]*?\. [^.]*?\bwas born (?:\w+ )?in (?P<value>{_PLACE})",),
    "director": (rf"{_WORK} directed by (?P<value>{_PERSON})",),
    "writer": (rf"{_WORK} written by (?P<value>{_PERSON})",),
    "source": (
        rf"{_WORK} based (?:up)?on (?:the|an?) [^.]*?(?:novel|play|book|story|memoir)[^.]*? by (?P<value>{_PERSON})",
    ),
    "place": (rf"{_NAME}\s?(?:\([^)]*\) )?(?:is|was) an? [^.]*?located in (?P<value>{_PLACE})",),
}
"""Patterns by relation; `name` is the subject, which the passage opens with."""


@dataclass(frozen=True)
class Fact:
    """A fact of a passage: relation, subject, value, and the text that states it."""

    relation: str
    name: str
    value: str
    text: str
    passage: str


def find_facts(passages: Sequence[str]) -> dict[str, list[Fact]]:
    """Find facts by relation, in the order of the passages; relations with a single value are left out."""
    found: dict[str, list[Fact]] = defaultdict(list)
    for passage in passages:
        for relation, patterns in RELATIONS.items():
            match = next(filter(None, (re.search(pattern, passage) for pattern in patterns)), None)
            if match is None or len(passage[: match.end()].split()) > LAST_WORD:
                continue
            ending = SENTENCE_END.search(passage, match.end())
            text = " ".join(passage[: ending.start() + 1 if ending else None].split()[:SHOWN_WORDS])
            found[relation].append(Fact(relation, match["name"].strip(), match["value"], text, passage))
    return {relation: facts for relation, facts in found.items() if len({fact.value for fact in facts}) > 1}
