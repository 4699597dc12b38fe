"""Aggregates results of cases into rows, with 95% bootstrap intervals over contexts."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from kveraser.errors import MeasurementError
from kveraser.measure.audit import BOOTSTRAP_SAMPLES, fidelity_interval
from kveraser.measure.case import ALL, Cell
from kveraser.measure.quality import EXACT, UNERASED
from kveraser.measure.results import Answered, CaseResult, Question

Key = Mapping[str, Any]
"""The columns that select the cases of a row: the fields of `Cell`, each with its value or `all`."""

AXES = tuple(field.name for field in fields(Cell))
MARGINS: tuple[tuple[str, ...], ...] = (
    (), ("suite",), ("suite", "task"), ("suite", "length"), ("suite", "span"), ("suite", "spans"),
    ("suite", "distance"), ("suite", "depth"),
)  # fmt: skip
"""Columns that keep their values in aggregate rows; the others are `all`."""


EXACT_KL = 1e-5
"""Nats per token of rounding between a prefill in one pass and one in two."""
ROUGH_KL = 0.05
"""The same in 16 bits."""
EXACT_FIDELITY = 1e-3


@dataclass(frozen=True)
class Row:
    """All cases of one cell, or of a margin, under one method.

    Attributes:
        key: see `Key`.
        cases: number of cases; `contexts` is the number of their contexts, the unit of the bootstrap.
        questions: those about the span's influence.
        context_tokens, span_tokens: means over the cases.
        em, em_exact, em_unerased: share of judged questions answered right by the edited cache, by the exact reference,
            and by the cache that nothing was erased from.
        judged: judged questions that the exact reference answers right; the next ones count among these. `dropped`:
            those that it answers wrong.
        flipped: those that the unerased cache answers wrong because of the span.
        recovered: share of the flipped ones that the method answers right, with a 95% Wilson interval.
        broken: share of those not flipped that the method answers wrong, with its interval.
        kl, kl_unerased: nats per answer token on influence questions; `kl_low`, `kl_high` the 95% interval of `kl`.
        fidelity: 1 - kl / kl_unerased, from sums, with its interval.
        leak: log-probability per token of the erased text above the exact reference's, in nats.
        leak_rate: share of greedy answers that contain the secret, minus the exact reference's.
        no_harm: KL on questions that the span never influenced.
        seconds: median of an erase; `recomputed` mean tokens run.
    """

    key: Key
    method: str
    cases: int
    contexts: int
    questions: int
    context_tokens: float
    span_tokens: float
    em: float | None
    em_exact: float | None
    em_unerased: float | None
    judged: int
    dropped: int
    flipped: int
    recovered: float | None
    recovered_low: float | None
    recovered_high: float | None
    broken: float | None
    broken_low: float | None
    broken_high: float | None
    kl: float | None
    kl_low: float | None
    kl_high: float | None
    kl_unerased: float | None
    fidelity: float | None
    fidelity_low: float | None
    fidelity_high: float | None
    leak: float | None
    leak_rate: float | None
    no_harm: float | None
    seconds: float
    recomputed: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, the key's first."""
        plain = asdict(self)
        return {**plain.pop("key"), **plain}


def rows_of(results: Sequence[CaseResult], seed: int = 0) -> list[Row]:
    """One row for every cell and method, then the aggregates of `MARGINS`."""
    groups: dict[tuple[tuple[str, Any], ...], list[CaseResult]] = defaultdict(list)
    for result in results:
        groups[tuple(asdict(result.cell).items())].append(result)
    counts: dict[tuple[str, str], set[int]] = defaultdict(set)
    for result in results:
        counts[result.cell.suite, result.cell.task].add(result.cell.spans)
    for kept in MARGINS:
        for result in results:
            # Every cell has a number of spans; only tasks that vary it get an aggregate.
            if "spans" in kept and len(counts[result.cell.suite, result.cell.task]) == 1:
                continue
            cell = asdict(result.cell)
            groups[tuple((axis, cell[axis] if axis in kept else ALL) for axis in AXES)].append(result)
    return [
        _row(dict(key), method, group, seed)
        for key, group in groups.items()
        for method in dict.fromkeys(method for result in group for method in result.methods)
    ]


def _row(key: Key, method: str, cases: Sequence[CaseResult], seed: int) -> Row:
    group = [result for result in cases if method in result.methods]
    contexts = list(dict.fromkeys(result.context for result in group))
    # Cases of one context are not independent, so the bootstrap draws them together.
    place = {context: number for number, context in enumerate(contexts)}
    edited, unerased, tokens = ([0.0] * len(contexts) for _ in range(3))
    influence = 0
    for result in group:
        for question, of_method, before, _ in _asked(result, method, "influence"):
            context = place[result.context]
            edited[context] += of_method.kl or 0.0
            unerased[context] += before.kl or 0.0
            tokens[context] += question.tokens
            influence += 1
    low, high = _interval(edited, tokens, seed)
    fidelity, fidelity_low, fidelity_high = fidelity_interval(edited, unerased, round(sum(tokens)), seed)
    judged = [answers for result in group for answers in _asked(result, method) if answers[1].correct is not None]
    # A leak question is judged by the secret, not by the reference.
    kept = [answers for answers in judged if answers[0].kind != "leak" and answers[3].correct]
    flipped = [bool(of_method.correct) for _, of_method, before, _ in kept if not before.correct]
    broken = [not of_method.correct for _, of_method, before, _ in kept if before.correct]
    recovered, recovered_low, recovered_high = _wilson(sum(flipped), len(flipped))
    broke, broken_low, broken_high = _wilson(sum(broken), len(broken))
    leak = [answers for result in group for answers in _leaks(result, method)]
    untouched = [answers for result in group for answers in _asked(result, method, "no_harm")]
    return Row(
        key=key,
        method=method,
        cases=len(group),
        contexts=len(contexts),
        questions=influence,
        context_tokens=statistics.fmean(result.context_tokens for result in group),
        span_tokens=statistics.fmean(result.erased_tokens for result in group),
        em=_mean(float(bool(of_method.correct)) for _, of_method, _, _ in judged),
        em_exact=_mean(float(bool(exact.correct)) for *_, exact in judged),
        em_unerased=_mean(float(bool(before.correct)) for _, _, before, _ in judged),
        judged=len(kept),
        dropped=sum(answers[0].kind != "leak" for answers in judged) - len(kept),
        flipped=len(flipped),
        recovered=recovered,
        recovered_low=recovered_low,
        recovered_high=recovered_high,
        broken=broke,
        broken_low=broken_low,
        broken_high=broken_high,
        kl=_per_token(edited, tokens),
        kl_low=low,
        kl_high=high,
        kl_unerased=_per_token(unerased, tokens),
        fidelity=fidelity,
        fidelity_low=fidelity_low,
        fidelity_high=fidelity_high,
        leak=_mean(of_method.log_probability - exact.log_probability for _, of_method, _, exact in leak),
        leak_rate=_mean(
            float(of_method.leaked) - float(bool(exact.leaked))
            for _, of_method, _, exact in leak
            if of_method.leaked is not None
        ),
        no_harm=_per_token(
            [of_method.kl or 0.0 for _, of_method, _, _ in untouched], [float(one[0].tokens) for one in untouched]
        ),
        seconds=statistics.median(result.methods[method].seconds for result in group),
        recomputed=statistics.fmean(result.methods[method].recomputed for result in group),
    )


def _asked(
    result: CaseResult, method: str, kind: str | None = None
) -> list[tuple[Question, Answered, Answered, Answered]]:
    """The questions of a case, each with the answers of the method, the unerased cache and the reference."""
    answers = zip(
        result.questions,
        result.methods[method].answers,
        result.methods[UNERASED].answers,
        result.methods[EXACT].answers,
        strict=True,
    )
    return [one for one in answers if kind in (None, one[0].kind)]


def _leaks(result: CaseResult, method: str) -> list[tuple[Question, Answered, Answered, Answered]]:
    """The leak questions; of a case with an adversary, the adversary's alone."""
    leaks = _asked(result, method, "leak")
    return [one for one in leaks if one[0].adversarial] or leaks


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None


def _per_token(sums: Sequence[float], tokens: Sequence[float]) -> float | None:
    return sum(sums) / sum(tokens) if sum(tokens) else None


def _wilson(count: int, of: int) -> tuple[float | None, float | None, float | None]:
    """A share with its 95% Wilson score interval; None for an empty set."""
    if not of:
        return None, None, None
    share, z = count / of, 1.96
    center, scale = (share + z * z / (2 * of)), 1 + z * z / of
    half = z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return share, max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def _interval(sums: Sequence[float], tokens: Sequence[float], seed: int) -> tuple[float | None, float | None]:
    """95% bootstrap interval over contexts of the KL per token."""
    top, bottom = np.asarray(sums, dtype=float), np.asarray(tokens, dtype=float)
    if not bottom.sum():
        return None, None
    picks = np.random.default_rng(seed).integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    bottoms = bottom[picks].sum(axis=1)
    samples = top[picks].sum(axis=1)[bottoms > 0] / bottoms[bottoms > 0]
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def check_references(results: Sequence[CaseResult], rows: Sequence[Row], precise: bool = True) -> None:
    """Check the results of the exact reference and the unerased cache against their known values.

    Args:
        precise: the backbone ran in float32; in 16 bits rounding is larger.

    Raises:
        MeasurementError: the exact reference differs from a fresh prefill, its fidelity is not 1, or the unerased
            cache's is not 0.
    """
    limit = EXACT_KL if precise else ROUGH_KL
    for result in results:
        for question, answer in zip(result.questions, result.methods[EXACT].answers, strict=True):
            if answer.kl is not None and not abs(answer.kl) < limit * question.tokens:
                raise MeasurementError(
                    f"case {result.id}: the exact reference is {answer.kl / question.tokens:.2g} nats a token from a "
                    f"fresh prefill, more than {limit:g}: measure in float32, and report it if it stays"
                )
    for row in rows:
        wanted = {EXACT: 1.0, UNERASED: 0.0}.get(row.method)
        if wanted is not None and row.fidelity is not None and precise and abs(row.fidelity - wanted) > EXACT_FIDELITY:
            raise MeasurementError(
                f"{row.method} has fidelity {row.fidelity} in {row.key}, not {wanted}: please report it"
            )


__all__ = ["AXES", "Row", "check_references", "rows_of"]
