"""What the tests of the quality benchmark share: cases on the tiny models, and what a cache says by the slow way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from kveraser.cache.editable import EditableCache
from kveraser.measure.case import BenchCase, Cell, TokenizedCase, TokenizedContext, tokenize_case, tokenize_context
from kveraser.measure.quality import ANSWER_TOKENS
from kveraser.measure.questions import Query
from kveraser.measure.results import Answered, CaseResult, Measured
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy
from kveraser.text.spans import Selector, Text

CONTEXT = (
    "The boat left at six. It was painted blue. The boat left at nine. "
    "The crew of four slept, and nobody saw the light go out."
)
SPAN = "It was painted blue."
QUERIES = (
    Query("When?", "at nine"),
    Query("Who slept?", "the crew of four", "no_harm"),
    Query("What colour was the boat?", "It was painted blue.", "leak"),
    Query(None, " The mate woke at dawn."),
)
CELL = Cell("test", "boats")


def bench_case(
    name: str = "a",
    queries: Sequence[Query] = QUERIES,
    erase: Sequence[Selector] = (Text(SPAN),),
    context: str | tuple[Mapping[str, Any], ...] = CONTEXT,
    **other: Any,
) -> BenchCase:
    return BenchCase(name, **({"cell": CELL} | other), context=context, erase=tuple(erase), queries=tuple(queries))


def cut(backbone: Backbone, *cases: BenchCase) -> tuple[TokenizedContext, list[TokenizedCase]]:
    """Cases of one context as tokens."""
    context = tokenize_context(backbone.tokenizer, cases[0].context)
    return context, [tokenize_case(backbone.tokenizer, context, case) for case in cases]


def remaining(context: TokenizedContext, case: TokenizedCase) -> list[int]:
    """The tokens that stay."""
    gone = {token for span in case.spans for token in range(span.start, span.end)}
    return [token for place, token in enumerate(context.tokens) if place not in gone]


def said(backbone: Backbone, cache: EditableCache, prompt: Sequence[int]) -> str:
    """A greedy answer, token by token."""
    text: str = backbone.tokenizer.decode(greedy(backbone, cache, prompt, ANSWER_TOKENS), skip_special_tokens=True)
    return text


def judged(backbone: Backbone, case: BenchCase) -> BenchCase:
    """The case with the exact reference's greedy answers as the accepted ones of its first two questions."""
    context, (tokenized,) = cut(backbone, case)
    exact = backbone.prefill(remaining(context, tokenized))
    right = [said(backbone, exact, one.prompt) for one in tokenized.asked[:2]]
    first, second, *rest = case.queries
    return replace(case, queries=(replace(first, accepted=(right[0],)), replace(second, accepted=(right[1],)), *rest))


def untimed(results: Sequence[CaseResult]) -> list[CaseResult]:
    """All but the time that it took."""

    def still(measured: Measured) -> Measured:
        return replace(measured, seconds=0.0)

    return [replace(one, methods={name: still(of) for name, of in one.methods.items()}) for one in results]


def alike(answers: Sequence[Answered], others: Sequence[Answered]) -> bool:
    """Whether answers agree, their numbers up to rounding."""

    def numbers(given: Sequence[Answered]) -> list[float]:
        return [value for one in given for value in (-1.0 if one.kl is None else one.kl, one.log_probability)]

    def words(given: Sequence[Answered]) -> list[Answered]:
        return [replace(one, kl=None, log_probability=0.0) for one in given]

    return words(answers) == words(others) and numbers(answers) == pytest.approx(numbers(others), rel=1e-3, abs=1e-4)
