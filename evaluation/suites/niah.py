"""Conflicting needle: a long text states a fact rightly in one place and wrongly in another, and the wrong one goes.

One context holds a pair of needles for every depth, so cases of one cell have different contexts.
"""

from __future__ import annotations

import random

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.facts import Conflict, conflicts, values
from evaluation.suites.text import Filler, Placed, Woven, room_for_text, token_count, weave
from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.text.spans import Characters

TASK = "needle"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Start of the wrong needle as a share of the context: 0 is after the first sentence, 1 before the last."""
LEAST_FILLER = 0.25
"""Share of a context that is no needle, at least."""


def make(settings: SuiteSettings) -> Made:
    """The cases of every length and depth."""
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        cells = [Cell("niah", TASK, length=length, depth=depth) for depth in DEPTHS]
        needed = max(_needle_tokens(settings, length, index) for index in range(settings.cases))
        least = round(needed / (1 - LEAST_FILLER)) + length - room_for_text(settings.tokenizer, length)
        if least > length:
            reason = f"{len(DEPTHS)} pairs of needles in ordinary text take {least} tokens"
            left_out += [LeftOut(cell, reason) for cell in cells]
            continue
        for index in range(settings.cases):
            cases += _context(settings, cells, length, index)
    return Made(tuple(cases), tuple(left_out))


def _drawn(settings: SuiteSettings, length: int, index: int) -> list[Conflict]:
    """A pair of needles for every depth, and one more fact that no depth touches."""
    return conflicts(random.Random(f"{settings.seed}/niah/{length}/{index}"), len(DEPTHS) + 1)


def _needle_tokens(settings: SuiteSettings, length: int, index: int) -> int:
    *pairs, aside = _drawn(settings, length, index)
    texts = [*(pair.right for pair in pairs), *(pair.bad for pair in pairs), aside.right]
    return sum(token_count(settings.tokenizer, f" {text}") for text in texts)


def _context(settings: SuiteSettings, cells: list[Cell], length: int, index: int) -> list[BenchCase]:
    *pairs, aside = _drawn(settings, length, index)
    woven = _woven(settings, pairs, aside, length, index)
    cases = []
    for place, (cell, pair) in enumerate(zip(cells, pairs, strict=True)):
        queries = [pair.query()]
        # On every fourth case, at every depth.
        if (place + index) % 4 == 0:
            queries.append(aside.query("no_harm"))
        cases.append(
            BenchCase(
                id=f"niah/{length}/{cell.depth}/{index}",
                cell=cell,
                context=woven.text,
                erase=(Characters(*woven.ranges[place]),),
                queries=tuple(queries),
            )
        )
    return cases


def _woven(settings: SuiteSettings, pairs: list[Conflict], aside: Conflict, length: int, index: int) -> Woven:
    """The text; its first ranges are those of the wrong needles."""
    tokenizer, room = settings.tokenizer, room_for_text(settings.tokenizer, length)
    rng = random.Random(f"{settings.seed}/niah/{length}/{index}/text")
    filler = Filler(rng, settings.passages, without=values([*pairs, aside]))
    pieces = filler.pieces(tokenizer, room - _needle_tokens(settings, length, index))
    # The share is one of all tokens, the chat template's included.
    wrong = [Placed(pair.bad, depth * length - (length - room)) for depth, pair in zip(DEPTHS, pairs, strict=True)]
    right = [Placed(pair.right, room * _away_from(rng, depth)) for depth, pair in zip(DEPTHS, pairs, strict=True)]
    return weave(tokenizer, pieces, [*wrong, *right, Placed(aside.right, room * rng.random())])


def _away_from(rng: random.Random, depth: float) -> float:
    """Where the right needle stands, as a share of the context: a tenth of it away from the wrong one, at least."""
    while True:
        share = rng.uniform(0.05, 0.95)
        if abs(share - depth) >= 0.1:
            return share


NIAH = Suite(
    name="niah",
    summary="a wrong needle in a long text, by where it stands",
    tasks=(TASK,),
    lengths=(512, 1024, 2048, 4096),
    spans=(),
    make=make,
)
