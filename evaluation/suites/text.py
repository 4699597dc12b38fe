"""The words of the generated suites: ordinary text to fill contexts with, and how sentences become a context."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import inf
from typing import Any

from kveraser.errors import InputError
from kveraser.measure.case import tokenize_context
from kveraser.text.tokenized import encode
from kveraser.training.tasks.tables import fill

LONGEST_SENTENCE = 60
"""Words; a longer one of the passages is left out, since contexts are cut to size by whole sentences."""
ENDINGS = 8
"""Sentences that are tried for the last place of a context: the one that fits its size best is taken."""
SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"'][.!?])\s+(?=[A-Z\"'(])")


@cache
def load_words(name: str) -> Any:
    """The words and templates of a suite, from its JSON file. Not to be changed."""
    return json.loads((resources.files(__package__) / f"{name}.json").read_text(encoding="utf-8"))


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text that stands within another one."""
    return len(encode(tokenizer, text)[0])


def room_for_text(tokenizer: Any, length: int) -> int:
    """Tokens of its own text in a context of `length`: without what a chat template puts in front."""
    return length - len(tokenize_context(tokenizer, "a").tokens) + 1


class Filler:
    """Sentences to stand around what a case is about: of the given passages, or generated. It never comes to an end.

    Args:
        rng: draws them.
        passages: text to take them from; empty: paragraphs about a made-up village each.
        without: texts that no sentence may hold, in any case: what a context states must stand where it is stated.

    Raises:
        InputError: when text is drawn, and no sentence of the passages can be used.
    """

    def __init__(self, rng: random.Random, passages: Sequence[str] = (), without: Iterable[str] = ()) -> None:
        self.rng = rng
        self.without = [text.lower() for text in without]
        self._sentences = self._of(passages) if passages else self._generated()

    def piece(self) -> str:
        """The next sentence, with the space or paragraph break in front of it."""
        return next(self._sentences)

    def pieces(self, tokenizer: Any, tokens: int) -> list[str]:
        """Sentences of about `tokens` tokens together, at least one."""
        return fitted(tokenizer, tokens, self.piece) or [min((self.piece() for _ in range(ENDINGS)), key=len)]

    def _generated(self) -> Iterator[str]:
        while True:
            yield from self._usable(paragraph(self.rng))

    def _of(self, passages: Sequence[str]) -> Iterator[str]:
        while True:
            found = False
            for passage in self.rng.sample(passages, len(passages)):
                for piece in self._usable(SENTENCE_END.split(" ".join(passage.split()))):
                    found = True
                    yield piece
            if not found:
                raise InputError(
                    f"the {len(passages)} passages have no sentence of 3 to {LONGEST_SENTENCE} words that leaves out "
                    "what a case is about: give a longer corpus, or none"
                )

    def _usable(self, sentences: Sequence[str]) -> list[str]:
        """With a paragraph break in front of the first one, a space in front of the others."""
        usable = [
            sentence
            for sentence in sentences
            if 3 <= len(sentence.split()) <= LONGEST_SENTENCE
            and not any(text in sentence.lower() for text in self.without)
        ]
        return [f" {sentence}" if place else f"\n\n{sentence}" for place, sentence in enumerate(usable)]


def fitted(tokenizer: Any, tokens: int, draw: Callable[[], str]) -> list[str]:
    """Sentences of about `tokens` tokens together, as `draw` gives them; none if that is less than half of one."""
    pieces: list[str] = []
    while tokens > 0:
        piece = draw()
        count = token_count(tokenizer, piece)
        if count > tokens:
            tried = {piece: count}
            for _ in range(ENDINGS):
                other = f" {draw().strip()}"
                tried[other] = token_count(tokenizer, other)
            piece, count = min(tried.items(), key=lambda one: abs(one[1] - tokens))
            return [*pieces, piece] if count < 2 * tokens else pieces
        pieces.append(piece)
        tokens -= count
    return pieces


def paragraph(rng: random.Random) -> list[str]:
    """Sentences about one place in a village that is drawn with it; they hold no digits."""
    words: dict[str, list[str]] = load_words("filler")["words"]
    starts, ends = load_words("filler")["village"]
    topic = rng.choice(load_words("filler")["topics"])
    village = rng.choice(starts) + rng.choice(ends)
    templates = [rng.choice(topic["opening"]), *rng.sample(topic["sentences"], rng.randint(3, 6))]
    return [
        fill(template, {"village": village} | {slot: rng.choice(choices) for slot, choices in words.items()})
        for template in templates
    ]


def generated_passages(rng: random.Random, count: int) -> list[str]:
    """`count` paragraphs, in place of a corpus."""
    return [" ".join(paragraph(rng)) for _ in range(count)]


@dataclass(frozen=True)
class Placed:
    """A statement and where it is to begin.

    Attributes:
        target: tokens from the beginning of the context's own text; infinite: at its end.
        joint: what separates it from the text in front of it.
    """

    text: str
    target: float
    joint: str = " "


@dataclass(frozen=True)
class Woven:
    """A text, and where in it the statements stand, one range in characters for each of them in their given order.

    A range begins with the joint in front of its statement, so that what remains without it reads on.
    """

    text: str
    ranges: tuple[tuple[int, int], ...]


def weave(tokenizer: Any, pieces: Sequence[str], placed: Sequence[Placed]) -> Woven:
    """Put each statement between two of the pieces, as close to its target as these allow.

    The first piece stays first, and the last one last unless a target is infinite.

    Args:
        pieces: at least one, each with what separates it from the text in front of it.
    """
    text, reached, used = pieces[0].lstrip(), token_count(tokenizer, pieces[0]), 1
    counts = [token_count(tokenizer, piece) for piece in pieces]
    ranges: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(placed)), key=lambda index: placed[index].target):
        target = placed[index].target
        movable = len(pieces) if target == inf else len(pieces) - 1
        while used < movable and reached + counts[used] / 2 <= target:
            text, reached, used = text + pieces[used], reached + counts[used], used + 1
        statement = placed[index].joint + placed[index].text
        ranges[index] = (len(text), len(text) + len(statement))
        text, reached = text + statement, reached + token_count(tokenizer, statement)
    return Woven(text + "".join(pieces[used:]), tuple(ranges[index] for index in range(len(placed))))
