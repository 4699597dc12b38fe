"""Stage 1, span-neighbor pre-training: unrelated text is inserted, and the targets are the words next to it.

As in arXiv:2606.17034, a chunk of another document is inserted at a random place, and the eraser learns to answer as if
it had never been there. Here span lengths are log-uniform over a wide range, because training-free methods fail on
long spans, and each context has several questions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from math import exp, log

from kveraser.measure.questions import Query
from kveraser.training.cases import Case, CaseSizes
from kveraser.training.split import Split, sufficient_passages

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
"""Where the span is inserted, as a share of the context's words."""


def span_neighbor_cases(
    passages: Sequence[str],
    count: int,
    seed: int,
    sizes: CaseSizes | None = None,
    split: Split = "train",
    first: int = 0,
) -> Iterator[Case]:
    """Generate cases `first` to `count` from the passages and phrasings of `split`. A case depends on seed and index.

    Raises:
        InputError: fewer than two passages, or too short a corpus for the sizes.
    """
    sizes = sizes or CaseSizes()
    own = sufficient_passages(passages, split, sizes, fewest=2)
    for index in range(first, count):
        yield _case(random.Random(f"{seed}/{index}"), own, sizes, split, f"span-neighbor/{split}/{seed}/{index}")


def _case(rng: random.Random, passages: Sequence[str], sizes: CaseSizes, split: Split, name: str) -> Case:
    size = log_uniform(rng, *sizes.span)
    total = rng.randint(*sizes.context)
    words = draw_words(rng, passages, total + ANSWER_WORDS)
    cut = round(total * rng.uniform(*PREFIX_SHARE))
    prefix, suffix, beyond = words[:cut], words[cut:total], words[total:]
    before, span, after = " ".join(prefix), " ".join(draw_words(rng, passages, size)), " ".join(suffix)
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
    """Draw `count` words of running text: random passages one after another, cut at the end."""
    words: list[str] = []
    while len(words) < count:
        words += rng.choice(passages).split()
    return words[:count]


def log_uniform(rng: random.Random, shortest: int, longest: int) -> int:
    """Draw a length whose logarithm is uniform."""
    return round(exp(rng.uniform(log(shortest), log(longest))))
