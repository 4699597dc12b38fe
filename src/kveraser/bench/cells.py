"""From single cases to cells: the rows of `kveraser bench quality`, with 95% bootstrap intervals over cases."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kveraser.audit import BOOTSTRAP_SAMPLES, fidelity_interval
from kveraser.bench.quality import Answered, CaseResult

ALL = "all"


@dataclass(frozen=True)
class Cell:
    """All cases of one task, length, span and method; `all` where a row runs over every one of them.

    Attributes:
        cases: contexts, the unit of the bootstrap; `questions` are those about the span's influence.
        context_tokens, span_tokens: means of the cases; `length` and `span` are what they aim at.
        em, em_exact: share of judged questions that the edited cache, and the exact reference, answer right.
        kl, kl_unerased: nats per answer token on influence questions; `kl_low`, `kl_high` the 95% interval of `kl`.
        fidelity: 1 - kl / kl_unerased, from sums, with its interval.
        leak: log-probability per token of the erased text above the exact reference's, in nats.
        no_harm: KL on questions that the span never touched.
        seconds: median of an erase; `recomputed` mean tokens run.
    """

    task: str
    length: int | str
    span: int | str
    method: str
    cases: int
    questions: int
    context_tokens: float
    span_tokens: float
    em: float | None
    em_exact: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    kl_unerased: float | None
    fidelity: float | None
    fidelity_low: float | None
    fidelity_high: float | None
    leak: float | None
    no_harm: float | None
    seconds: float
    recomputed: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cells(results: Sequence[CaseResult], seed: int = 0) -> list[Cell]:
    """One row a task, length, span and method; then the margins: by task, task and span, length, span, and over all."""
    groupings: tuple[Callable[[CaseResult], tuple[str, int | str, int | str]], ...] = (
        lambda one: (one.task, one.length, one.span),
        lambda one: (one.task, ALL, ALL),
        lambda one: (one.task, ALL, one.span),
        lambda one: (ALL, one.length, ALL),
        lambda one: (ALL, ALL, one.span),
        lambda one: (ALL, ALL, ALL),
    )
    rows: list[Cell] = []
    for grouping in groupings:
        groups: dict[tuple[str, int | str, int | str, str], list[CaseResult]] = {}
        for result in results:
            groups.setdefault((*grouping(result), result.method), []).append(result)
        rows += [_cell(*key, group, seed) for key, group in groups.items()]
    return rows


def _cell(task: str, length: int | str, span: int | str, method: str, group: Sequence[CaseResult], seed: int) -> Cell:
    influence = [_of_kind(result, "influence") for result in group]
    edited = [sum(one.kl for one in questions) for questions in influence]
    unerased = [sum(one.kl_unerased for one in questions) for questions in influence]
    tokens = [sum(one.tokens for one in questions) for questions in influence]
    low, high = _interval(edited, tokens, seed)
    fidelity, fidelity_low, fidelity_high = fidelity_interval(edited, unerased, sum(tokens), seed)
    judged = [one for result in group for one in result.questions if one.correct is not None]
    leak = [one for result in group for one in _of_kind(result, "leak")]
    untouched = [one for result in group for one in _of_kind(result, "no_harm")]
    return Cell(
        task=task,
        length=length,
        span=span,
        method=method,
        cases=len(group),
        questions=sum(map(len, influence)),
        context_tokens=statistics.fmean(result.context_tokens for result in group),
        span_tokens=statistics.fmean(result.span_tokens for result in group),
        em=_mean(float(bool(one.correct)) for one in judged),
        em_exact=_mean(float(bool(one.correct_exact)) for one in judged),
        kl=_per_token(edited, tokens),
        kl_low=low,
        kl_high=high,
        kl_unerased=_per_token(unerased, tokens),
        fidelity=fidelity,
        fidelity_low=fidelity_low,
        fidelity_high=fidelity_high,
        leak=_mean(one.log_probability - one.log_probability_exact for one in leak),
        no_harm=_per_token([one.kl for one in untouched], [one.tokens for one in untouched]),
        seconds=statistics.median(result.seconds for result in group),
        recomputed=statistics.fmean(result.recomputed for result in group),
    )


def _of_kind(result: CaseResult, kind: str) -> list[Answered]:
    return [one for one in result.questions if one.kind == kind]


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None


def _per_token(sums: Sequence[float], tokens: Sequence[int]) -> float | None:
    return sum(sums) / sum(tokens) if sum(tokens) else None


def _interval(sums: Sequence[float], tokens: Sequence[int], seed: int) -> tuple[float | None, float | None]:
    """95% bootstrap interval over cases of the KL per token."""
    top, bottom = np.asarray(sums, dtype=float), np.asarray(tokens, dtype=float)
    if not bottom.sum():
        return None, None
    picks = np.random.default_rng(seed).integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    bottoms = bottom[picks].sum(axis=1)
    samples = top[picks].sum(axis=1)[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
