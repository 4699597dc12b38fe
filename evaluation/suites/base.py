"""What a suite is: a name, and how it makes the cases of its cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.text.spans import Characters
from kveraser.training.cases import Case


@dataclass(frozen=True)
class SuiteSettings:
    """What a suite makes cases of.

    Attributes:
        tokenizer: of the backbone; sizes are counted in its tokens.
        tasks: of `Suite.tasks`, each once.
        lengths: of contexts, in tokens.
        spans: of erased spans, in tokens; a suite whose span is a sentence of its own ignores it.
        cases: of every cell.
        seed: the same one gives the same cases.
        passages: text to fill contexts with; empty: text that the suite generates itself.
        dataset: where a suite that reads questions finds them: a file, or the name of a hub dataset.
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
    """The cases of a suite, and the cells that it can't make cases of."""

    cases: tuple[BenchCase, ...]
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        tasks: the first part of its cells.
        lengths, spans: what is measured unless something else is asked for; no spans where it takes none.
        make: the cases of all cells.
    """

    name: str
    summary: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    make: Callable[[SuiteSettings], Made]


def from_training_case(case: Case, cell: Cell) -> BenchCase:
    """A generated case of training, as one of a benchmark's cell."""
    return BenchCase(case.id, cell, case.context, (Characters(*case.span),), case.queries)
