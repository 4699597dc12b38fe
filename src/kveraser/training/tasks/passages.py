"""Corpus text in the lengths that a case needs."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property

from kveraser.training.tasks.fact_patterns import SENTENCE_END, Fact, find_facts

LONGEST_PIECE = 90
"""Most words of one passage, so that a context holds several passages."""

TOPIC = re.compile(r"^((?:The )?[A-Z][^,.;:()\"]{2,50}?) ?(?:\(|,| is | was | are | were )")


class Passages:
    """The passages of a split, and the facts found in them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [" ".join(text.split()) for text in texts]

    @cached_property
    def facts(self) -> dict[str, list[Fact]]:
        """Facts by relation, of relations with at least two values."""
        return find_facts(self.texts)


class Reader:
    """Draws passages for one case, without repetition until all are used."""

    def __init__(self, rng: random.Random, passages: Passages) -> None:
        self.rng = rng
        self._texts = passages.texts
        self._seen: set[int] = set()

    def skip(self, text: str) -> None:
        """Exclude this passage."""
        self._seen.add(self._texts.index(text))

    def draw(self) -> list[str]:
        """Draw a passage and return its words, at most `LONGEST_PIECE`."""
        if len(self._seen) >= len(self._texts):
            self._seen.clear()
        index = self.rng.randrange(len(self._texts))
        while index in self._seen:
            index = (index + 1) % len(self._texts)
        self._seen.add(index)
        return clip(self._texts[index].split(), LONGEST_PIECE)

    def words(self, count: int) -> list[str]:
        """Draw exactly `count` words of running text."""
        words: list[str] = []
        while len(words) < count:
            words += self.draw()
        return clip(words, count)


def clip(words: list[str], count: int) -> list[str]:
    """Cut to `count` words; an ellipsis marks the cut."""
    if len(words) <= count or not count:
        return words[:count]
    last = words[count - 1]
    return [*words[: count - 1], last if last.endswith((".", "!", "?")) else last.rstrip(",;:") + "..."]


def first_sentence(text: str) -> str:
    """Return the text up to the first end of a sentence."""
    ending = SENTENCE_END.search(text)
    return text[: ending.start() + 1] if ending else text


def topic(text: str) -> str | None:
    """Return the subject that the passage opens with, or None."""
    found = TOPIC.match(text)
    return found[1].strip() if found else None
