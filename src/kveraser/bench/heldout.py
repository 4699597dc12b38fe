"""The held-out suite: the tasks of training, on passages, entities and phrasings that training never saw."""

from __future__ import annotations

from collections.abc import Sequence

from kveraser.backbone import Backbone
from kveraser.errors import InputError
from kveraser.training.cases import Case
from kveraser.training.span_neighbor import SpanNeighborSettings, span_neighbor_cases
from kveraser.training.tasks import TASKS, TaskSettings, task_cases

SPAN_NEIGHBOR = "span_neighbor"
HELDOUT_TASKS = (SPAN_NEIGHBOR, *TASKS)

SHARE_OF_CONTEXT = 0.6
"""A span of more than this share of its context leaves too little text to ask about."""
SAMPLED_PASSAGES = 200


def fits(length: int, span: int) -> bool:
    """Whether the suite has a cell for this span in a context of this length, in tokens."""
    return span <= SHARE_OF_CONTEXT * length


def heldout_cases(
    backbone: Backbone, passages: Sequence[str], task: str, length: int, span: int, count: int, seed: int
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
    words = tokens_per_word(backbone, passages)
    rest, inside = round((length - span) / words), max(1, round(span / words))
    try:
        if task == SPAN_NEIGHBOR:
            neighbors = SpanNeighborSettings((rest, rest), (inside, inside))
            return list(span_neighbor_cases(passages, count, seed, neighbors, "heldout"))
        settings = TaskSettings((rest, rest), (inside, inside))
        return list(task_cases([task], passages, count, seed, settings, "heldout"))
    except InputError as error:
        raise InputError(f"no cases of {task} with a span of {span} in {length} tokens: {error}") from error


def tokens_per_word(backbone: Backbone, passages: Sequence[str]) -> float:
    """Mean tokens of a word of the corpus.

    Raises:
        InputError: the corpus has no words.
    """
    sample = " ".join(passages[:SAMPLED_PASSAGES])
    if not sample.split():
        raise InputError(f"the corpus of {len(passages)} passages has no words: give text")
    return len(backbone.tokenize(sample)[0]) / len(sample.split())
