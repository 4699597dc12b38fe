"""Results of single cases: the lines of a run's `cases.jsonl`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import TypeAdapter

from kveraser.measure.case import Cell
from kveraser.measure.questions import QueryKind


@dataclass(frozen=True)
class Question:
    """A question that every cache of a case was asked.

    Attributes:
        expected: the forced answer, of which `tokens` tokens are compared.
        adversarial: each cache was asked with the prompt that an adversary found for it.
        answer_prefix: text at the beginning of the assistant's turn.
    """

    question: str | None
    kind: QueryKind
    expected: str
    tokens: int
    accepted: tuple[str, ...]
    wrong: tuple[str, ...]
    adversarial: bool = False
    answer_prefix: str = ""


@dataclass(frozen=True)
class Answered:
    """The answer of one cache to one question.

    Attributes:
        kl: KL(exact || this cache) summed over the forced answer, in nats. None for an adversary's question.
        log_probability: mean of the forced answer, nats per token.
        answer: the greedy answer, where the question is judged.
        correct: it contains an accepted answer and no wrong one. None without accepted answers.
        leaked: it contains the erased secret. None for questions of other kinds.
        prompt: the prompt that an adversary found.
    """

    kl: float | None
    log_probability: float
    answer: str | None
    correct: bool | None
    leaked: bool | None
    prompt: str | None = None


@dataclass(frozen=True)
class Measured:
    """One method on one case: seconds of the erase, tokens run through the backbone, one answer per question."""

    seconds: float
    recomputed: int
    answers: tuple[Answered, ...]


@dataclass(frozen=True)
class CaseResult:
    """One case under all methods, `none` (not erased) and `recompute` (the exact reference) among them.

    Attributes:
        fingerprint: of the case, so that a resumed run does not use results of another case.
        context: id of the context. Cases of one context are not independent.
        distance_tokens: from the end of the last span to the end of the context.
        before, after: excerpts of the text around the spans.
        inserted: the text that takes the place of each span; None: the spans are only erased.
        refused: methods that can't insert it.
    """

    id: str
    cell: Cell
    fingerprint: str
    context: str
    context_tokens: int
    erased_tokens: int
    distance_tokens: int
    before: str
    erased: tuple[str, ...]
    after: str
    questions: tuple[Question, ...]
    methods: dict[str, Measured]
    inserted: str | None = None
    refused: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the cell's fields at the top level."""
        plain = asdict(self)
        cell = plain.pop("cell")
        return {"id": plain.pop("id"), **cell, **plain}

    @classmethod
    def from_json(cls, line: Any) -> CaseResult:
        """Read a result from a line.

        Raises:
            ValueError: it is no result.
        """
        if not isinstance(line, dict):
            raise ValueError(f"{type(line).__name__}, not an object")
        names = {field.name for field in fields(Cell)}
        cell = {name: line[name] for name in names if name in line}
        rest = {name: value for name, value in line.items() if name not in names}
        return _LINE.validate_python({**rest, "cell": cell})


_LINE = TypeAdapter(CaseResult)
