"""What goes wrong in practice: a stale fact, a wrong tool result, a retracted wish, an injected order.

The scenes of training's held-out split, with names and phrasings that training never saw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from evaluation.suites.base import Made, Suite, SuiteSettings, from_training_case
from evaluation.suites.heldout import tokens_per_word
from evaluation.suites.text import generated_passages
from kveraser.errors import InputError
from kveraser.measure.case import BenchCase, Cell, LeftOut, tokenize_case, tokenize_context
from kveraser.measure.questions import Query
from kveraser.training.cases import CaseSizes
from kveraser.training.split import HELD_OUT, split_passages
from kveraser.training.tasks import LEAST_CONTEXT, LEAST_SPAN, task_cases

TASKS = {
    "stale_fact": "stale",
    "wrong_observation": "observation",
    "retracted_preference": "preference",
    "prompt_injection": "injection",
}
"""The suite's tasks, and what training calls them."""
LEAST_PASSAGES = 40
PASSAGE_WORDS = 50
"""Words of a generated passage, at least."""
DRAWS = 8
"""Draws of a case; the one whose sizes fit best counts, since texts are planned in words and measured in tokens."""
CLOSE = 0.04
"""A context this close to its length is not drawn again."""


DAMPING = 0.8
"""Exponent of the correction of sizes from draw to draw: the next draw has other words."""


def make(settings: SuiteSettings) -> Made:
    """The cases of every task, length and span."""
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        passages = _held_out(settings, length)
        for task in settings.tasks:
            for span in settings.spans:
                cell = Cell("scenarios", task, length=length, span=span)
                try:
                    made = [_case(settings, cell, passages, index) for index in range(settings.cases)]
                except InputError as error:
                    left_out.append(LeftOut(cell, str(error)))
                else:
                    cases += made
    return Made(tuple(cases), tuple(left_out))


def _held_out(settings: SuiteSettings, length: int) -> list[str]:
    """The held-out passages; generated ones are as many as a context of this length takes."""
    if settings.passages:
        return split_passages(settings.passages, "heldout")
    wanted = max(LEAST_PASSAGES, 2 * length // PASSAGE_WORDS)
    rng = random.Random(f"{settings.seed}/scenarios/passages")
    return split_passages(generated_passages(rng, wanted * HELD_OUT), "heldout")


def _case(settings: SuiteSettings, cell: Cell, passages: Sequence[str], index: int) -> BenchCase:
    """The draw whose context comes closest to the cell's length and span."""
    assert cell.length is not None and cell.span is not None
    words = tokens_per_word(settings.tokenizer, passages)
    rest, inside = (cell.length - cell.span) / words, cell.span / words
    best: tuple[float, BenchCase] | None = None
    for draw in range(DRAWS):
        sizes = CaseSizes((round(rest), round(rest)), (max(1, round(inside)), max(1, round(inside))))
        seed = settings.seed * DRAWS + draw
        (drawn,) = task_cases([TASKS[cell.task]], passages, index + 1, seed, sizes, "heldout", first=index)
        name = f"scenarios/{cell.task}/{cell.length}/{cell.span}/{index}"
        case = replace(from_training_case(drawn, cell), id=name, queries=_asked(drawn.queries, index))
        context = tokenize_context(settings.tokenizer, case.context)
        length, span = len(context.tokens), tokenize_case(settings.tokenizer, context, case).erased
        off = max(abs(length / cell.length - 1), abs(span / cell.span - 1) / 4)
        if best is None or off < best[0]:
            best = off, case
        if off <= CLOSE:
            break
        # Names, numbers and records have more tokens a word than ordinary text.
        rest = max(LEAST_CONTEXT, rest * ((cell.length - cell.span) / max(1, length - span)) ** DAMPING)
        inside = max(LEAST_SPAN, inside * (cell.span / span) ** DAMPING)
    assert best is not None
    return best[1]


def _asked(queries: Sequence[Query], index: int) -> tuple[Query, ...]:
    """What the span contradicted; on every third case in turn the erased text, what was built on it, the rest."""
    contradicted, *others = queries
    if index % 3:
        return (contradicted,)
    kind = ("leak", "influence", "no_harm")[index // 3 % 3]
    other = next(query for query in others if query.kind == kind)
    return contradicted, replace(other, accepted=())


SCENARIOS = Suite(
    name="scenarios",
    summary="a stale fact, a wrong tool result, a retracted wish, an injected order",
    tasks=tuple(TASKS),
    lengths=(512,),
    spans=(64,),
    make=make,
)
