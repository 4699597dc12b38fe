"""Rows of the quality benchmark: sums, margins and intervals, against numpy by hand on made-up results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kveraser.errors import MeasurementError
from kveraser.measure.audit import BOOTSTRAP_SAMPLES
from kveraser.measure.case import ALL, Cell
from kveraser.measure.quality import EXACT, UNERASED
from kveraser.measure.questions import QueryKind
from kveraser.measure.results import Answered, CaseResult, Measured, Question
from kveraser.measure.rows import AXES, MARGINS, Row, check_references, rows_of

CELL = Cell("niah", "needle", length=512, span=50, depth=0.25)
Asked = tuple[Question, Answered, Answered, Answered]
"""A question, and what the method, the unerased cache and the exact reference answered."""


def asked(
    kind: QueryKind,
    tokens: int,
    kl: float | None,
    unerased: float | None,
    correct: tuple[bool | None, bool | None, bool | None] = (None, None, None),
    leaked: tuple[bool | None, bool | None, bool | None] = (None, None, None),
    log_probability: tuple[float, float] = (-1.0, -1.0),
) -> Asked:
    """Three values are those of the method, the unerased cache and the reference; two of the first and the last."""
    question = Question("When?", kind, "at nine", tokens, (), ())
    kls, logs = (kl, unerased, 0.0), (log_probability[0], -7.0, log_probability[1])
    of_method, before, exact = (
        Answered(kls[place], logs[place], None, correct[place], leaked[place]) for place in range(3)
    )
    return question, of_method, before, exact


def result(
    name: str, *questions: Asked, cell: Cell = CELL, method: str = "mask", context: str | None = None,
    seconds: float = 1.0, recomputed: int = 0,
) -> CaseResult:  # fmt: skip
    methods = {
        UNERASED: Measured(0.0, 0, tuple(before for _, _, before, _ in questions)),
        EXACT: Measured(9.0, 99, tuple(exact for *_, exact in questions)),
        method: Measured(seconds, recomputed, tuple(of_method for _, of_method, _, _ in questions)),
    }
    return CaseResult(
        id=name, cell=cell, fingerprint="f", context=context or f"of {name}", context_tokens=(cell.length or 0) + 10,
        erased_tokens=(cell.span or 0) + 2, distance_tokens=5, before="", erased=("x",), after="",
        questions=tuple(question for question, *_ in questions), methods=methods,
    )  # fmt: skip


def row(rows: list[Row], method: str = "mask", **key: Any) -> Row:
    """The one row of these columns, all others running over everything."""
    wanted = {axis: ALL for axis in AXES} | key
    found = [one for one in rows if one.key == wanted and one.method == method]
    assert len(found) == 1
    return found[0]


def cell_row(rows: list[Row], method: str = "mask", cell: Cell = CELL) -> Row:
    return row(rows, method, **{axis: getattr(cell, axis) for axis in AXES})


RESULTS = [
    result(
        "a",
        asked("influence", 4, 2.0, 8.0, correct=(True, False, True)),
        asked("influence", 1, 1.0, 1.0, correct=(False, False, True)),
        asked("leak", 5, 9.0, 9.0, leaked=(True, True, False), log_probability=(-2.0, -5.0)),
        asked("no_harm", 2, 0.2, 0.4, correct=(True, True, False)),
        seconds=3.0,
        recomputed=4,
    ),
    result("b", asked("influence", 10, 1.0, 2.0), asked("no_harm", 6, 0.2, 0.4), seconds=1.0, recomputed=6),
    result(
        "c",
        asked("influence", 5, 4.0, 5.0),
        asked("leak", 50, 0.0, 0.0, leaked=(True, True, True), log_probability=(-3.0, -2.0)),
        # An adversary's question: no KL, and it counts among the leaks.
        asked("leak", 0, None, None, leaked=(True, True, False), log_probability=(-4.0, -8.0)),
        seconds=2.0,
        recomputed=8,
    ),
]


def test_a_cell_is_the_sums_of_its_cases() -> None:
    rows = rows_of(RESULTS)
    cell = cell_row(rows)
    assert (cell.cases, cell.contexts, cell.questions) == (3, 3, 4)
    assert cell.kl == pytest.approx(8 / 20) and cell.kl_unerased == pytest.approx(16 / 20)
    assert cell.fidelity == pytest.approx(1 - 8 / 16)
    assert cell.leak == pytest.approx((3 - 1 + 4) / 3) and cell.leak_rate == pytest.approx(2 / 3)
    assert cell.no_harm == pytest.approx(0.4 / 8)
    assert (cell.em, cell.em_exact, cell.em_unerased) == pytest.approx((2 / 3, 2 / 3, 1 / 3))
    assert (cell.seconds, cell.recomputed, cell.context_tokens, cell.span_tokens) == (2.0, 6.0, 522.0, 52.0)
    before, exact = cell_row(rows, UNERASED), cell_row(rows, EXACT)
    assert before.kl == before.kl_unerased == cell.kl_unerased and before.em == cell.em_unerased
    assert (before.fidelity, exact.fidelity, exact.kl, exact.leak, exact.leak_rate) == (0, 1, 0, 0, 0)
    assert exact.em == cell.em_exact and (exact.seconds, exact.recomputed) == (9, 99)
    assert [one.method for one in rows if one.key == cell.key] == [UNERASED, EXACT, "mask"]


def by_hand(sums: list[tuple[float, float, float]], seed: int) -> tuple[float, ...]:
    """The intervals of KL and fidelity, of contexts' KL, unerased KL and tokens."""
    picks = np.random.default_rng(seed).integers(0, len(sums), size=(BOOTSTRAP_SAMPLES, len(sums)))
    draws = [np.array([sums[place] for place in one]).sum(axis=0) for one in picks]
    kl = np.quantile([top / tokens for top, _, tokens in draws], [0.025, 0.975])
    fidelity = np.quantile([1 - top / bottom for top, bottom, _ in draws], [0.025, 0.975])
    return (*map(float, kl), *map(float, fidelity))


def intervals(of: Row) -> tuple[float | None, ...]:
    return of.kl_low, of.kl_high, of.fidelity_low, of.fidelity_high


def test_harm_and_recovery_are_counted_over_what_the_reference_answers_right() -> None:
    # What the method, the unerased cache and the reference said.
    outcomes = [
        *[(True, False, True)] * 3,  # flipped by the span, and recovered
        (False, False, True),  # flipped, and not recovered
        *[(True, True, True)] * 4,  # never harmed
        (False, True, True),  # broken by the method
        (True, False, False),  # the reference is wrong: dropped, whatever the others say
        (False, True, False),
    ]
    asked_of = [asked("influence", 2, 0.1, 0.2, correct=outcome) for outcome in outcomes]
    asked_of.append(asked("leak", 2, 0.1, 0.2, correct=(False, False, True)))
    found = row(rows_of([result(f"c{number}", one) for number, one in enumerate(asked_of)]))
    assert (found.judged, found.dropped, found.flipped) == (9, 2, 4)
    assert found.recovered == 3 / 4 and found.broken == 1 / 5
    # Wilson's interval for 3 of 4 and for 1 of 5.
    assert [found.recovered_low, found.recovered_high] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert [found.broken_low, found.broken_high] == pytest.approx([0.0362, 0.6245], abs=1e-4)
    unharmed = row(rows_of([result("c", asked("influence", 2, 0.1, 0.2, correct=(True, True, True)))]))
    assert unharmed.flipped == 0 and unharmed.recovered is None and unharmed.broken == 0


def test_intervals_are_a_bootstrap_over_contexts() -> None:
    cell = cell_row(rows_of(RESULTS, seed=7))
    sums = [(3.0, 9.0, 5.0), (1.0, 2.0, 10.0), (4.0, 5.0, 5.0)]
    assert intervals(cell) == pytest.approx(by_hand(sums, 7))
    assert cell.kl_low is not None and cell.kl is not None and cell.kl_high is not None
    assert cell.kl_low < cell.kl < cell.kl_high
    many = [result(str(place), asked("influence", 1 + place, place**1.5, 3.0 + 2 * place)) for place in range(12)]
    first, second = (cell_row(rows_of(many, seed)) for seed in (7, 8))
    assert intervals(first) == pytest.approx(
        by_hand([(place**1.5, 3 + 2 * place, 1 + place) for place in range(12)], 7)
    )
    assert intervals(first) != intervals(second) and rows_of(many, seed=7) == rows_of(many, seed=7)


def test_cases_of_one_context_are_drawn_together() -> None:
    shared = [replace(RESULTS[0], context="s"), RESULTS[1], replace(RESULTS[2], context="s")]
    cell, apart = cell_row(rows_of(shared, seed=7)), cell_row(rows_of(RESULTS, seed=7))
    assert (cell.cases, cell.contexts, apart.contexts) == (3, 2, 3)
    assert intervals(cell) == pytest.approx(by_hand([(7.0, 14.0, 10.0), (1.0, 2.0, 10.0)], 7))
    assert intervals(cell) != pytest.approx(intervals(apart), rel=0.01)
    # Sums are the same, however they are drawn.
    assert (cell.kl, cell.fidelity, cell.leak, cell.em) == (apart.kl, apart.fidelity, apart.leak, apart.em)


def test_margins_run_over_all_of_their_cells() -> None:
    def one(kl: float, method: str = "mask", **axes: Any) -> CaseResult:
        cell = replace(CELL, **axes)
        return result(f"{cell}{method}", asked("influence", 1, kl, 100.0), cell=cell, method=method)

    parts = [
        one(1), one(2, span=200), one(4, length=1024, depth=0.5), one(8, task="facts", spans=3, distance=64),
        one(16, suite="leak", depth=None), one(99, "shift", task="facts"),
    ]  # fmt: skip
    rows = [of for of in rows_of(parts) if of.method == "mask"]
    means = {tuple(f"{axis} {value}" for axis, value in of.key.items() if value != ALL): of.kl for of in rows}
    margins = {key: kl for key, kl in means.items() if len(key) < len(AXES)}
    assert len(means) == len(rows) and len(means) - len(margins) == 5
    assert margins == {
        (): pytest.approx(31 / 5),
        ("suite niah",): pytest.approx(15 / 4), ("suite leak",): 16,
        ("suite niah", "task needle"): pytest.approx(7 / 3), ("suite niah", "task facts"): 8,
        ("suite leak", "task needle"): 16,
        ("suite niah", "length 512"): pytest.approx(11 / 3), ("suite niah", "length 1024"): 4,
        ("suite leak", "length 512"): 16,
        ("suite niah", "span 50"): pytest.approx(13 / 3), ("suite niah", "span 200"): 2, ("suite leak", "span 50"): 16,
        # Of the tasks that vary it.
        ("suite niah", "spans 3"): 8,
        ("suite niah", "distance None"): pytest.approx(7 / 3), ("suite niah", "distance 64"): 8,
        ("suite leak", "distance None"): 16,
        ("suite niah", "depth 0.25"): pytest.approx(11 / 3), ("suite niah", "depth 0.5"): 4,
        ("suite leak", "depth None"): 16,
    }  # fmt: skip
    whole = rows_of(parts)
    assert row(whole, "shift").kl == 99 and row(whole).cases == 5 and row(whole, UNERASED).cases == 6
    assert len(MARGINS) == 8


def test_a_row_is_written_with_its_key_first() -> None:
    plain = cell_row(rows_of(RESULTS)).to_json()
    assert list(plain)[: len(AXES) + 1] == [*AXES, "method"]
    assert (plain["suite"], plain["depth"], plain["distance"], plain["cases"]) == ("niah", 0.25, None, 3)


def test_what_no_question_asks_is_left_open() -> None:
    harmless = cell_row(rows_of([result("a", asked("no_harm", 2, 1.0, 1.0))]))
    assert (harmless.kl, harmless.kl_low, harmless.kl_high, harmless.kl_unerased) == (None,) * 4
    assert (harmless.fidelity, harmless.fidelity_low, harmless.fidelity_high) == (None,) * 3
    assert (harmless.em, harmless.em_exact, harmless.em_unerased, harmless.leak, harmless.leak_rate) == (None,) * 5
    assert harmless.no_harm == 0.5 and harmless.questions == 0 and harmless.cases == 1
    unfelt = cell_row(rows_of([result("a", asked("influence", 2, 1.0, 1e-9))]))
    assert unfelt.kl == 0.5 and unfelt.fidelity is unfelt.no_harm is None
    unjudged = cell_row(rows_of([result("a", asked("leak", 2, 1.0, 1.0, log_probability=(-1.0, -3.0)))]))
    assert unjudged.leak == 2 and unjudged.leak_rate is None


def test_methods_that_some_cases_lack_are_rows_of_the_others() -> None:
    several = [*RESULTS, result("d", asked("influence", 1, 6.0, 8.0), method="shift")]
    rows = rows_of(several)
    assert (cell_row(rows).cases, cell_row(rows, "shift").cases, cell_row(rows, EXACT).cases) == (3, 1, 4)
    assert rows_of([]) == []


@pytest.mark.parametrize(
    ("method", "change", "right"),
    [
        (EXACT, {}, True),
        (EXACT, {"kl": None, "fidelity": None}, True),
        (EXACT, {"fidelity": 0.9}, False),
        (UNERASED, {"fidelity": 0.1}, False),
        ("mask", {"kl": 5.0, "fidelity": -3.0}, True),
    ],
)
def test_references_that_are_none_are_refused(method: str, change: dict[str, Any], right: bool) -> None:
    rows = [replace(one, **change) if one.method == method else one for one in rows_of(RESULTS)]
    if right:
        check_references([], rows)
        return
    with pytest.raises(MeasurementError, match=method):
        check_references([], rows)
