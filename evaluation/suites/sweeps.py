"""One size at a time: how long the span is, how far it lies back, and how many spans go at once.

One context holds the spans of several cells, so cases of one cell have different contexts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.facts import Conflict, conflicts, values
from evaluation.suites.records import JOINT, records
from evaluation.suites.text import Filler, Placed, Woven, room_for_text, token_count, weave
from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.measure.probes import mentions
from kveraser.text.spans import Characters

SPAN_LENGTH, DISTANCE, SPAN_COUNT = "span_length", "distance", "span_count"
DISTANCES = (0, 64, 256, 1024, 4096)
"""Tokens from the end of the span to the end of the context."""
COUNTS = (1, 2, 4, 8)
"""Spans that are erased at once."""
LARGEST_SPAN = 0.6
"""Share of its context: a longer span leaves too little text."""
LARGEST_SPANS = 0.75
"""Share of a context that the spans of several cells may take together."""
FARTHEST = 0.7
"""Share of the context that may follow a span."""
RIGHT_UNTIL = 0.25
"""Where distances are compared, right statements are in this first share of the context, before every span."""
LEAST_FILLER = 0.1
"""Minimum share of a context that states nothing."""

Targets = Callable[[random.Random, int, Sequence[int]], list[float]]
"""Computes where wrong statements start, in tokens, from the tokens of the text and of every statement."""
TRIES = 20
"""Maximum draws until the wrong statements are far enough apart."""


@dataclass(frozen=True)
class Plan:
    """Contexts that several cells share.

    Attributes:
        name: of the contexts, unique in the suite.
        cells: with the numbers of the statements that each of them erases.
        told: of every context, its statements and, as the last, a fact that is only stated rightly.
        targets: where the wrong statements begin.
        right_until: the share of the text in which the right ones stand.
        joint: in front of a wrong statement.
    """

    name: str
    length: int
    cells: tuple[tuple[Cell, tuple[int, ...]], ...]
    told: tuple[tuple[Conflict, ...], ...]
    targets: Targets
    right_until: float = 1.0
    joint: str = " "


def make(settings: SuiteSettings) -> Made:
    """The cases of every task and length."""
    plans: list[Plan] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        for task in settings.tasks:
            if task == SPAN_LENGTH:
                several, unfit = _span_lengths(settings, length)
                plans += several
                left_out += unfit
            elif task == DISTANCE:
                plan, unfit = _distances(settings, length)
                plans.append(plan)
                left_out += unfit
            else:
                plans.append(_span_counts(settings, length))
    cases: list[BenchCase] = []
    for plan in plans:
        texts = [_woven(settings, plan, index) for index in range(settings.cases)]
        fitting = [woven for woven in texts if woven is not None]
        if len(fitting) < len(texts):
            reason = f"the statements leave no space for ordinary text in {plan.length} tokens"
            left_out += [LeftOut(cell, reason) for cell, _ in plan.cells]
            continue
        cases += [case for index, woven in enumerate(fitting) for case in _cases(plan, index, woven)]
    return Made(tuple(cases), tuple(left_out))


def _span_lengths(settings: SuiteSettings, length: int) -> tuple[list[Plan], list[LeftOut]]:
    """Records of several lengths in one context, as many as it takes, in any order."""
    asked = {span: Cell("sweeps", SPAN_LENGTH, length=length, span=span) for span in sorted(settings.spans)}
    sizes = tuple(span for span in asked if span <= LARGEST_SPAN * length)
    drawn = []
    for index in range(settings.cases):
        rng = random.Random(f"{settings.seed}/sweeps/{SPAN_LENGTH}/{length}/{index}")
        told = records(rng, settings.tokenizer, sizes)
        (aside,) = conflicts(rng, 1)
        # It may be about a person of the same name.
        while any(mentions(aside.right, text) for text in values(told.values())):
            (aside,) = conflicts(rng, 1)
        drawn.append((told, aside))
    spans = [span for span in sizes if all(span in one for one, _ in drawn)]
    groups: list[list[int]] = []
    for span in spans:
        if groups and sum(groups[-1]) + span <= LARGEST_SPANS * length:
            groups[-1].append(span)
        else:
            groups.append([span])
    plans = [
        Plan(
            name=f"{SPAN_LENGTH}/{group[0]}",
            length=length,
            cells=tuple((asked[span], (place,)) for place, span in enumerate(group)),
            told=tuple((*(one[span] for span in group), aside) for one, aside in drawn),
            targets=_spread,
            joint=JOINT,
        )
        for group in groups
    ]
    return plans, [
        LeftOut(
            cell,
            f"a statement alone takes more than {span} tokens"
            if span in sizes
            else f"the span is more than {LARGEST_SPAN:.0%} of the context",
        )
        for span, cell in asked.items()
        if span not in spans
    ]


def _distances(settings: SuiteSettings, length: int) -> tuple[Plan, list[LeftOut]]:
    """One context with a wrong statement at every distance, after all right statements."""
    asked = {distance: Cell("sweeps", DISTANCE, length=length, distance=distance) for distance in DISTANCES}
    fitting = [distance for distance in DISTANCES if distance <= FARTHEST * length]

    def targets(rng: random.Random, tokens: int, statements: Sequence[int]) -> list[float]:
        return [tokens - far - own if far else inf for far, own in zip(fitting, statements, strict=True)]

    plan = Plan(
        name=DISTANCE,
        length=length,
        cells=tuple((asked[distance], (place,)) for place, distance in enumerate(fitting)),
        told=_told(settings, DISTANCE, length, len(fitting) + 1),
        targets=targets,
        right_until=RIGHT_UNTIL,
    )
    reason = f"the distance is more than {FARTHEST:.0%} of the context"
    return plan, [LeftOut(cell, reason) for distance, cell in asked.items() if distance not in fitting]


def _span_counts(settings: SuiteSettings, length: int) -> Plan:
    """As many wrong statements as the most of a case, of which a case erases the first ones that were drawn."""
    return Plan(
        name=SPAN_COUNT,
        length=length,
        cells=tuple((Cell("sweeps", SPAN_COUNT, length=length, spans=count), tuple(range(count))) for count in COUNTS),
        told=_told(settings, SPAN_COUNT, length, max(COUNTS) + 1),
        targets=_spread,
    )


def _told(settings: SuiteSettings, name: str, length: int, count: int) -> tuple[tuple[Conflict, ...], ...]:
    """`count` facts for every context."""
    return tuple(
        tuple(conflicts(random.Random(f"{settings.seed}/sweeps/{name}/{length}/{index}"), count))
        for index in range(settings.cases)
    )


def _spread(rng: random.Random, tokens: int, statements: Sequence[int]) -> list[float]:
    """In any order, with equal amounts of text between them, before the first and after the last."""
    gap = (tokens - sum(statements)) / (len(statements) + 1)
    targets = [0.0] * len(statements)
    reached = gap
    for place in rng.sample(range(len(statements)), len(statements)):
        targets[place] = reached
        reached += statements[place] + gap
    return targets


def _woven(settings: SuiteSettings, plan: Plan, index: int) -> Woven | None:
    """The text; its first ranges are those of the wrong statements. None: there is no space to separate them."""
    tokenizer, room = settings.tokenizer, room_for_text(settings.tokenizer, plan.length)
    *told, aside = plan.told[index]
    wrong = [token_count(tokenizer, plan.joint + one.bad) for one in told]
    stated = sum(wrong) + sum(token_count(tokenizer, f" {one.right}") for one in plan.told[index])
    if stated > (1 - LEAST_FILLER) * room:
        return None
    for attempt in range(TRIES):
        rng = random.Random(f"{settings.seed}/sweeps/{plan.name}/{plan.length}/{index}/{attempt}")
        pieces = Filler(rng, settings.passages, without=values(plan.told[index])).pieces(tokenizer, room - stated)
        tokens = stated + sum(token_count(tokenizer, piece) for piece in pieces)
        starts = plan.targets(rng, tokens, wrong)
        placed = [Placed(one.bad, start, plan.joint) for one, start in zip(told, starts, strict=True)]
        placed += [Placed(one.right, rng.random() * plan.right_until * tokens) for one in (*told, aside)]
        woven = weave(tokenizer, pieces, placed)
        ranges = sorted(woven.ranges[: len(told)])
        # Spans that touch would be erased as one.
        if all(before[1] < after[0] for before, after in pairwise(ranges)):
            return woven
    return None


def _cases(plan: Plan, index: int, woven: Woven) -> list[BenchCase]:
    *told, aside = plan.told[index]
    cases = []
    for place, (cell, erased) in enumerate(plan.cells):
        # Of several spans, two are asked about.
        queries = [told[number].query() for number in sorted({erased[0], erased[-1]})]
        # On every fourth case of a cell.
        if (place + index) % 4 == 0:
            queries.append(aside.query("no_harm"))
        size = next(value for value in (cell.span, cell.distance, cell.spans) if value is not None)
        cases.append(
            BenchCase(
                id=f"sweeps/{cell.task}/{cell.length}/{size}/{index}",
                cell=cell,
                context=woven.text,
                erase=tuple(Characters(*woven.ranges[number]) for number in erased),
                queries=tuple(queries),
            )
        )
    return cases


SWEEPS = Suite(
    name="sweeps",
    summary="span length, distance and number of spans, one at a time",
    tasks=(SPAN_LENGTH, DISTANCE, SPAN_COUNT),
    lengths=(1024, 4096),
    spans=(8, 32, 128, 512, 2048),
    make=make,
)
