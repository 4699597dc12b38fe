"""`kveraser bench quality`: what each method forgets, leaks and harms, against exact recomputation, case by case.

A case is prefilled once. Every method edits that one cache in place, answers all questions in one pass, and is undone;
the exact reference is the same cache with the suffix prefilled again. Definitions: docs/measures.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kveraser.audit import kl_divergence
from kveraser.backbone import Backbone
from kveraser.cache import EditableCache
from kveraser.decode import end_tokens
from kveraser.methods import Method
from kveraser.methods.recompute import Recompute
from kveraser.packed import Pair, greedy_together, score_together
from kveraser.spans import Span
from kveraser.training.cases import QueryKind, TokenizedCase, normalized

UNERASED = "none"
"""The row of the cache before any erase."""
ANSWER_TOKENS = 16
"""Most tokens of a greedy answer that is judged for exact match: the accepted answers are short."""
NOTICE_TOKENS = 256
"""Room that every case leaves for words a method appends, whichever methods a run has: a cell stays the same."""


@dataclass(frozen=True)
class Answered:
    """One question, answered after one method.

    Attributes:
        tokens: of the forced answer.
        kl: KL(exact || edited) summed over them, in nats; `kl_unerased` the same of the unerased cache.
        log_probability: mean of the forced answer, nats per token; `log_probability_exact` the reference's.
        answer: the greedy answer, where the question is judged for exact match.
        correct: exact match: it contains an accepted answer and no wrong one. None where it is not judged.
    """

    kind: QueryKind
    tokens: int
    kl: float
    kl_unerased: float
    log_probability: float
    log_probability_exact: float
    answer: str | None
    answer_exact: str | None
    correct: bool | None
    correct_exact: bool | None


@dataclass(frozen=True)
class CaseResult:
    """One case under one method.

    Attributes:
        length, span: of its cell: the tokens of context and span that were asked for.
        context_tokens, span_tokens: of the case itself.
        seconds: of the erase; `recomputed` the tokens that it ran through the backbone.
    """

    case: str
    task: str
    length: int
    span: int
    method: str
    context_tokens: int
    span_tokens: int
    seconds: float
    recomputed: int
    questions: tuple[Answered, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a line of the run's case file."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CaseResult:
        """Read a line again."""
        return cls(**(fields | {"questions": tuple(Answered(**one) for one in fields["questions"])}))


def room(case: TokenizedCase) -> int:
    """Positions that measuring a case takes: its context, a method's notice, the longest question and its answer."""
    asked = max(len(prompt) + max(len(answer), ANSWER_TOKENS) for prompt, answer in case.queries)
    return case.tokens + NOTICE_TOKENS + asked


def measure_case(
    backbone: Backbone, case: TokenizedCase, methods: Sequence[Method], length: int, span: int
) -> list[CaseResult]:
    """Answer the questions of a case after each method, beside the unerased cache and the exact reference.

    Args:
        methods: settled methods; `none` and `recompute` are measured in any case.
        length, span: the cell that the case belongs to, in tokens.

    Raises:
        ContextLengthError: the case does not fit into the backbone.
    """
    tokens = [*case.prefix, *case.span, *case.suffix]
    erased = Span(len(case.prefix), len(case.prefix) + len(case.span))
    judged = [place for place, accepted in enumerate(case.accepted) if accepted]
    backbone.check_room(0, room(case))
    cache = backbone.prefill(tokens)
    unerased = score_together(backbone, cache, case.queries)

    def timed(method: Method) -> tuple[float, int]:
        settle()
        started = time.perf_counter()
        recomputed = method(backbone, cache, tokens, erased).recomputed
        settle()
        return time.perf_counter() - started, recomputed

    def settle() -> None:
        # What was queued before belongs to no method, and what a method queued belongs to it.
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)

    with cache.edit() as journal:
        seconds, recomputed = timed(Recompute())
    exact = score_together(backbone, cache, case.queries)
    spoken = greedy_together(backbone, cache, [case.queries[place][0] for place in judged], ANSWER_TOKENS)
    answers_exact = dict(zip(judged, spoken, strict=True))
    cache.revert(journal)
    results: list[CaseResult] = []
    distances = [kl_divergence(reference, other) for reference, other in zip(exact, unerased, strict=True)]

    def add(name: str, edited: Sequence[torch.Tensor], answers: dict[int, list[int]], cost: tuple[float, int]) -> None:
        questions = []
        for place, (_, answer) in enumerate(case.queries):
            forced, places = torch.tensor(answer), torch.arange(len(answer))
            said, said_exact = (
                backbone.tokenizer.decode(greedy[place], skip_special_tokens=True) if place in greedy else None
                for greedy in (answers, answers_exact)
            )
            questions.append(
                Answered(
                    kind=case.kinds[place],
                    tokens=len(answer),
                    kl=kl_divergence(exact[place], edited[place]),
                    kl_unerased=distances[place],
                    log_probability=float(edited[place][places, forced].mean()),
                    log_probability_exact=float(exact[place][places, forced].mean()),
                    answer=said,
                    answer_exact=said_exact,
                    correct=_correct(case, place, said),
                    correct_exact=_correct(case, place, said_exact),
                )
            )
        results.append(
            CaseResult(
                case.id, case.task, length, span, name, len(tokens), len(erased), cost[0], cost[1], tuple(questions)
            )
        )

    add(UNERASED, unerased, _greedy_like(backbone, cache, case, answers_exact), (0.0, 0))
    add("recompute", exact, answers_exact, (seconds, recomputed))
    for method in methods:
        if method.is_reference:
            continue
        with cache.edit() as journal:
            cost = timed(method)
        edited = score_together(backbone, cache, case.queries)
        add(str(method), edited, _greedy_like(backbone, cache, case, answers_exact), cost)
        cache.revert(journal)
    return results


def _greedy_like(
    backbone: Backbone, cache: EditableCache, case: TokenizedCase, expected: dict[int, list[int]]
) -> dict[int, list[int]]:
    """The greedy answers of a cache, by place: one pass confirms the expected ones, only others are decoded."""
    ends = end_tokens(backbone)
    pairs: dict[int, Pair] = {}
    for place, answer in expected.items():
        # An answer that was cut at the limit has no end to confirm.
        ended = answer if len(answer) == ANSWER_TOKENS else [*answer, *sorted(ends)[:1]]
        pairs[place] = (case.queries[place][0], ended)
    scored = score_together(backbone, cache, list(pairs.values()))
    answers: dict[int, list[int]] = {}
    for place, scores in zip(pairs, scored, strict=True):
        chosen, answer = scores.argmax(dim=-1).tolist(), expected[place]
        if chosen[: len(answer)] == answer and all(token in ends for token in chosen[len(answer) :]):
            answers[place] = answer
    others = [place for place in expected if place not in answers]
    spoken = greedy_together(backbone, cache, [case.queries[place][0] for place in others], ANSWER_TOKENS)
    return answers | dict(zip(others, spoken, strict=True))


def _correct(case: TokenizedCase, place: int, answer: str | None) -> bool | None:
    """Exact match after SQuAD normalisation: an accepted answer is in it, and none of the wrong ones."""
    if answer is None:
        return None
    said = f" {normalized(answer)} "

    def holds(texts: Sequence[str]) -> bool:
        return any(f" {normalized(text)} " in said for text in texts)

    return holds(case.accepted[place]) and not holds(case.wrong[place])
