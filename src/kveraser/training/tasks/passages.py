"""Corpus text in the sizes that a case needs."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cached_property

from kveraser.training.tasks.fact_patterns import SENTENCE_END, Fact, find_facts

LONGEST_PIECE = 90
"""Words that are taken from one passage at most, so that a context holds several."""

TOPIC = re.compile(r"^((?:The )?[A-Z][^,.;:()\"]{2,50}?) ?(?:\(|,| is | was | are | were )")


class Passages:
    """The passages of a split, and the facts found in them."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [" ".join(text.split()) for text in texts]

    @cached_property
    def facts(self) -> dict[str, list[Fact]]:
        """Facts by relation; only relations of which there are at least two values."""
        return find_facts(self.texts)


class Reader:
    """Draws passages for one case, none of them twice while there are others."""

    def __init__(self, rng: random.Random, passages: Passages) -> None:
        self.rng = rng
        self._texts = passages.texts
        self._seen: set[int] = set()

    def skip(self, text: str) -> None:
        """Never draw this passage."""
        self._seen.add(self._texts.index(text))

    def draw(self) -> list[str]:
        """The words of a passage, or the first of them."""
        if len(self._seen) >= len(self._texts):
            self._seen.clear()
        index = self.rng.randrange(len(self._texts))
        while index in self._seen:
            index = (index + 1) % len(self._texts)
        self._seen.add(index)
        return clip(self._texts[index].split(), LONGEST_PIECE)

    def words(self, count: int) -> list[str]:
        """Running text of exactly `count` words."""
        words: list[str] = []
        while len(words) < count:
            words += self.draw()
        return clip(words, count)


def clip(words: list[str], count: int) -> list[str]:
    """The first `count` words; an ellipsis shows that there were more."""
    if len(words) <= count or not count:
        return words[:count]
    last = words[count - 1]
    return [*words[: count - 1], last if last.endswith((".", "!", "?")) else last.rstrip(",;:") + "..."]


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    ending = SENTENCE_END.search(text)
    return text[: ending.start() + 1] if ending else text


def topic(text: str) -> str | None:
    """What a passage is about, as its first words name it; None if they do not."""
    found = TOPIC.match(text)
    return found[1].strip() if found else None
