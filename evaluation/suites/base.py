"""The interface of a suite: a name, and a function that makes the cases of its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.text.spans import Characters
from kveraser.training.cases import Case


@dataclass(frozen=True)
class SuiteSettings:
    """Settings from which a suite makes cases.

    Attributes:
        tokenizer: of the backbone; sizes are counted in its tokens.
        tasks: of `Suite.tasks`, each once.
        lengths: of contexts, in tokens.
        spans: of erased spans, in tokens; a suite whose span is a sentence of its own ignores it.
        cases: number in every cell.
        seed: the same seed gives the same cases.
        passages: text to fill contexts with. Empty: the suite generates text.
        dataset: source of a suite's questions: a file, or the name of a hub dataset.
    """

    tokenizer: Any
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    cases: int
    seed: int
    passages: Sequence[str] = ()
    dataset: str | None = None


@dataclass(frozen=True)
class Made:
    """The cases of a suite, and the cells without cases."""

    cases: tuple[BenchCase, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        tasks: the first part of its cells.
        lengths, spans: default sizes; no spans where the suite takes none.
        make: the cases of all cells.
    """

    name: str
    summary: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    make: Callable[[SuiteSettings], Made]


def from_training_case(case: Case, cell: Cell) -> BenchCase:
    """Convert a generated training case into a benchmark case."""
    return BenchCase(case.id, cell, case.context, (Characters(*case.span),), case.queries)
