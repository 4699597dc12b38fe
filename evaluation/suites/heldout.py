"""The held-out suite: the tasks of training, on passages, entities and phrasings that training never saw."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product
from typing import Any

from evaluation.suites.base import Made, Suite, SuiteSettings, from_training_case
from kveraser.errors import InputError
from kveraser.measure.case import ALL, BenchCase, Cell, LeftOut
from kveraser.text.tokenized import encode
from kveraser.training.cases import Case, CaseSizes
from kveraser.training.span_neighbor import span_neighbor_cases
from kveraser.training.tasks import TASKS, task_cases

SPAN_NEIGHBOR = "span_neighbor"
HELDOUT_TASKS = (SPAN_NEIGHBOR, *TASKS)

SHARE_OF_CONTEXT = 0.6
"""A span of more than this share of its context leaves too little text to ask about."""
SAMPLED_PASSAGES = 200


def make(settings: SuiteSettings) -> Made:
    """Every task at every length and span.

    Raises:
        InputError: no corpus, sizes too small for a task, too short a corpus, or no pair of length and span that fits.
    """
    if not settings.passages:
        raise InputError("the held-out suite is made from text: give a corpus")
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length, span in product(settings.lengths, settings.spans):
        if span > SHARE_OF_CONTEXT * length:
            reason = f"the span is over {SHARE_OF_CONTEXT:.0%} of the context"
            left_out.append(LeftOut(Cell("heldout", ALL, length, span), reason))
            continue
        # A cell of its own seed: its cases do not hang on which other cells a run has.
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed}/{length}/{span}".encode()).digest()[:4])
        for task in settings.tasks:
            made = heldout_cases(settings.tokenizer, settings.passages, task, length, span, settings.cases, seed)
            cases += [from_training_case(case, Cell("heldout", task, length, span)) for case in made]
    if not cases:
        raise InputError(f"no span of {settings.spans} fits into a context of {settings.lengths}: give shorter spans")
    return Made(tuple(cases), tuple(left_out))


def heldout_cases(
    tokenizer: Any, passages: Sequence[str], task: str, length: int, span: int, count: int, seed: int
) -> list[Case]:
    """`count` cases of a cell; the same seed gives the same ones.

    Args:
        length, span: tokens of context and span that the cases aim at; texts are made of whole words and sentences, so
            single cases differ by some percent.

    Raises:
        InputError: unknown task, sizes too small for it, or too short a corpus.
    """
    if task not in HELDOUT_TASKS:
        raise InputError(f"no held-out task {task!r}: there are {', '.join(HELDOUT_TASKS)}")
    words = tokens_per_word(tokenizer, passages)
    rest, inside = round((length - span) / words), max(1, round(span / words))
    try:
        sizes = CaseSizes((rest, rest), (inside, inside))
        if task == SPAN_NEIGHBOR:
            return list(span_neighbor_cases(passages, count, seed, sizes, "heldout"))
        return list(task_cases([task], passages, count, seed, sizes, "heldout"))
    except InputError as error:
        raise InputError(f"no cases of {task} with a span of {span} in {length} tokens: {error}") from error


def tokens_per_word(tokenizer: Any, passages: Sequence[str]) -> float:
    """Mean tokens of a word of the corpus.

    Raises:
        InputError: the corpus has no words.
    """
    sample = " ".join(passages[:SAMPLED_PASSAGES])
    if not sample.split():
        raise InputError(f"the corpus of {len(passages)} passages has no words: give text")
    return len(encode(tokenizer, sample)[0]) / len(sample.split())


HELDOUT = Suite(
    "heldout",
    "the tasks of training, on passages, names and phrasings that training never saw",
    HELDOUT_TASKS,
    lengths=(512, 1024, 2048),
    spans=(50, 200, 600),
    make=make,
)
