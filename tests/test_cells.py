"""Rows of the quality benchmark: sums, margins and intervals, against numpy by hand on made-up results."""

from __future__ import annotations

import numpy as np
import pytest

from kveraser.audit import BOOTSTRAP_SAMPLES
from kveraser.bench.cells import ALL, Cell, cells
from kveraser.bench.quality import Answered, CaseResult
from kveraser.training.cases import QueryKind


def answered(kind: QueryKind, tokens: int, kl: float, unerased: float, **given: object) -> Answered:
    fields: dict[str, object] = {
        "log_probability": -1.0, "log_probability_exact": -1.0, "answer": None, "answer_exact": None,
        "correct": None, "correct_exact": None,
    }  # fmt: skip
    return Answered(kind, tokens, kl, unerased, **(fields | given))  # type: ignore[arg-type]


def result(
    case: str, *questions: Answered, task: str = "needle", length: int = 512, span: int = 50, method: str = "mask",
    seconds: float = 1.0, recomputed: int = 0,
) -> CaseResult:  # fmt: skip
    return CaseResult(case, task, length, span, method, length + 10, span + 2, seconds, recomputed, questions)


def row(rows: list[Cell], *key: object) -> Cell:
    """The one row of a task, length, span and method."""
    found = [one for one in rows if (one.task, one.length, one.span, one.method) == key]
    assert len(found) == 1
    return found[0]


RESULTS = [
    result(
        "a",
        answered("influence", 4, 2.0, 8.0, correct=True, correct_exact=True),
        answered("influence", 1, 1.0, 1.0, correct=False, correct_exact=True),
        answered("leak", 5, 9.0, 9.0, log_probability=-2.0, log_probability_exact=-5.0),
        answered("no_harm", 2, 0.2, 0.4, correct=True, correct_exact=False),
        seconds=3.0,
        recomputed=4,
    ),
    result("b", answered("influence", 10, 1.0, 2.0), answered("no_harm", 6, 0.2, 0.4), seconds=1.0, recomputed=6),
    result(
        "c",
        answered("influence", 5, 4.0, 5.0),
        answered("leak", 50, 0.0, 0.0, log_probability=-3.0, log_probability_exact=-2.0),
        seconds=2.0,
        recomputed=8,
    ),
]


def test_a_cell_is_the_sums_of_its_cases() -> None:
    cell = row(cells(RESULTS), "needle", 512, 50, "mask")
    assert (cell.cases, cell.questions) == (3, 4)
    assert cell.kl == pytest.approx(8 / 20) and cell.kl_unerased == pytest.approx(16 / 20)
    assert cell.fidelity == pytest.approx(1 - 8 / 16)
    assert cell.leak == pytest.approx((3 - 1) / 2)
    assert cell.no_harm == pytest.approx(0.4 / 8)
    assert cell.em == pytest.approx(2 / 3) and cell.em_exact == pytest.approx(2 / 3)
    assert (cell.seconds, cell.recomputed, cell.context_tokens, cell.span_tokens) == (2.0, 6.0, 522.0, 52.0)


def test_intervals_are_a_bootstrap_over_cases() -> None:
    cell = row(cells(RESULTS, seed=7), "needle", 512, 50, "mask")
    picks = np.random.default_rng(7).integers(0, 3, size=(BOOTSTRAP_SAMPLES, 3))
    kl, tokens, unerased = np.array([3.0, 1.0, 4.0]), np.array([5.0, 10.0, 5.0]), np.array([9.0, 2.0, 5.0])
    draws = [(kl[one].sum(), tokens[one].sum(), unerased[one].sum()) for one in picks]
    assert (cell.kl_low, cell.kl_high) == pytest.approx(
        tuple(np.quantile([top / count for top, count, _ in draws], [0.025, 0.975]))
    )
    assert (cell.fidelity_low, cell.fidelity_high) == pytest.approx(
        tuple(np.quantile([1 - top / bottom for top, _, bottom in draws], [0.025, 0.975]))
    )
    assert cell.kl_low is not None and cell.kl is not None and cell.kl_high is not None
    assert cell.kl_low < cell.kl < cell.kl_high
    assert cells(RESULTS, seed=7) == cells(RESULTS, seed=7)


def test_margins_run_over_all_of_their_cells() -> None:
    def one(task: str, length: int, span: int, kl: float, method: str = "mask") -> CaseResult:
        asked = answered("influence", 1, kl, 100.0)
        return result(f"{task}{length}{span}", asked, task=task, length=length, span=span, method=method)

    parts = [
        one("needle", 512, 50, 1), one("needle", 512, 200, 2), one("needle", 1024, 50, 4), one("facts", 512, 50, 8),
        one("facts", 512, 50, 99, "shift"),
    ]  # fmt: skip
    rows = cells(parts)
    assert {(cell.task, cell.length, cell.span): cell.kl for cell in rows if cell.method == "mask"} == {
        ("needle", 512, 50): 1, ("needle", 512, 200): 2, ("needle", 1024, 50): 4, ("facts", 512, 50): 8,
        ("needle", ALL, ALL): pytest.approx(7 / 3), ("facts", ALL, ALL): 8,
        ("needle", ALL, 50): 2.5, ("needle", ALL, 200): 2, ("facts", ALL, 50): 8,
        (ALL, 512, ALL): pytest.approx(11 / 3), (ALL, 1024, ALL): 4,
        (ALL, ALL, 50): pytest.approx(13 / 3), (ALL, ALL, 200): 2,
        (ALL, ALL, ALL): 3.75,
    }  # fmt: skip
    assert row(rows, ALL, ALL, ALL, "shift").kl == 99 and row(rows, ALL, ALL, ALL, "mask").cases == 4


def test_what_no_question_asks_is_left_open() -> None:
    harmless = row(cells([result("a", answered("no_harm", 2, 1.0, 1.0))]), "needle", 512, 50, "mask")
    assert (harmless.kl, harmless.kl_low, harmless.kl_high, harmless.kl_unerased) == (None,) * 4
    assert (harmless.fidelity, harmless.fidelity_low, harmless.fidelity_high) == (None,) * 3
    assert (harmless.em, harmless.em_exact, harmless.leak) == (None,) * 3
    assert harmless.no_harm == 0.5 and harmless.questions == 0 and harmless.cases == 1
    unfelt = row(cells([result("a", answered("influence", 2, 1.0, 1e-9))]), "needle", 512, 50, "mask")
    assert unfelt.kl == 0.5 and unfelt.fidelity is unfelt.no_harm is None
