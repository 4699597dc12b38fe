"""Stage 1, span-neighbour pre-training: unrelated text is inserted, and the targets are the words around the seam.

After the paper's section on pre-training (arXiv:2606.17034): a chunk of another document is put at a random place,
and the eraser learns to answer as if it had never been there. Here span lengths are log-uniform over a wide range,
since long spans are where training-free methods fail, and one context serves several questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log

from kveraser.errors import InputError
from kveraser.measure.questions import Query
from kveraser.training.cases import Case
from kveraser.training.split import Split, split_passages

FOLLOWS: dict[Split, tuple[str, ...]] = {
    "train": (
        'What comes right after "{words}"?',
        'Continue the text after "{words}".',
        'Which words follow "{words}" in the text?',
    ),
    "heldout": (
        'Quote what the text says next, once it has said "{words}".',
        'How does the passage go on from "{words}"?',
        'Read on from "{words}".',
    ),
}
PRECEDES: dict[Split, tuple[str, ...]] = {
    "train": (
        'What comes right before "{words}"?',
        'Which words stand directly before "{words}" in the text?',
        'Which words lead up to "{words}"?',
    ),
    "heldout": (
        'Quote what the text says just ahead of "{words}".',
        'From what words does the passage arrive at "{words}"?',
        'After which words does "{words}" stand?',
    ),
}
QUOTED_WORDS = 10
ANSWER_WORDS = 24
PREFIX_SHARE = (0.2, 0.7)
"""Where in the context the seam lies, as a share of its words."""


@dataclass(frozen=True)
class SpanNeighborSettings:
    """Sizes in words; a word is about 1.3 tokens.

    Attributes:
        context: shortest and longest context without the span.
        span: shortest and longest span; lengths are drawn log-uniformly.
    """

    context: tuple[int, int] = (120, 360)
    span: tuple[int, int] = (8, 760)


def span_neighbor_cases(
    passages: Sequence[str],
    count: int,
    seed: int,
    settings: SpanNeighborSettings | None = None,
    split: Split = "train",
    first: int = 0,
) -> Iterator[Case]:
    """Generate cases `first` to `count` from the passages and phrasings of `split`; the same seed gives the same cases.

    Raises:
        InputError: fewer than two passages, or too short a corpus for the sizes asked for.
    """
    settings = settings or SpanNeighborSettings()
    own = split_passages(passages, split)
    if len(own) < 2:
        raise InputError(
            f"the corpus has {len(own)} passages in the {split} split (of {len(passages)}): the span comes from "
            "another one, so give at least 2"
        )
    available = sum(len(passage.split()) for passage in own)
    wanted = settings.context[1] + settings.span[1]
    if available < wanted:
        raise InputError(
            f"the {split} split of the corpus has {available} words, a case takes up to {wanted}: give a longer corpus"
        )
    for index in range(first, count):
        # A generator of its own for each case: case 7 is the same whether or not case 6 was built.
        yield _case(random.Random(f"{seed}/{index}"), own, settings, split, f"span-neighbor/{split}/{seed}/{index}")


def _case(rng: random.Random, passages: Sequence[str], settings: SpanNeighborSettings, split: Split, name: str) -> Case:
    shortest, longest = settings.span
    size = round(exp(rng.uniform(log(shortest), log(longest))))
    total = rng.randint(*settings.context)
    words = draw_words(rng, passages, total + ANSWER_WORDS)
    cut = round(total * rng.uniform(*PREFIX_SHARE))
    prefix, suffix, beyond = words[:cut], words[cut:total], words[total:]
    inserted = draw_words(rng, passages, size)
    before, span, after = " ".join(prefix), " ".join(inserted), " ".join(suffix)
    middle = rng.randrange(QUOTED_WORDS, max(QUOTED_WORDS + 1, len(suffix) - ANSWER_WORDS))
    queries = [
        _follows(rng, split, prefix, suffix),
        _precedes(rng, split, prefix, suffix),
        _follows(rng, split, suffix[:middle], suffix[middle:]),
        Query(None, " ".join(beyond)),
    ]
    return Case(
        id=name,
        task="span_neighbor",
        context=f"{before} {span} {after}",
        span=(len(before), len(before) + 1 + len(span)),
        queries=tuple(queries),
    )


def _follows(rng: random.Random, split: Split, before: Sequence[str], after: Sequence[str]) -> Query:
    question = rng.choice(FOLLOWS[split]).format(words=" ".join(before[-QUOTED_WORDS:]))
    return Query(question, " ".join(after[:ANSWER_WORDS]))


def _precedes(rng: random.Random, split: Split, before: Sequence[str], after: Sequence[str]) -> Query:
    question = rng.choice(PRECEDES[split]).format(words=" ".join(after[:QUOTED_WORDS]))
    return Query(question, " ".join(before[-ANSWER_WORDS:]))


def draw_words(rng: random.Random, passages: Sequence[str], count: int) -> list[str]:
    """`count` words of running text: passages at random until there are enough, cut at the end."""
    words: list[str] = []
    while len(words) < count:
        words += rng.choice(passages).split()
    return words[:count]
