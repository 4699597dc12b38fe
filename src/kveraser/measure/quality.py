"""Measures what each method forgets, leaks and harms, against exact recomputation.

All cases of one context share one prefill. Every method edits that cache in place, the questions are asked, and the
edit is reverted. The exact reference is the same cache with the suffix recomputed. Definitions: docs/measures.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import MethodError
from kveraser.measure.audit import kl_divergence
from kveraser.measure.case import Asked, Attacked, TokenizedCase, TokenizedContext, context_id
from kveraser.measure.packing import greedy_start, greedy_together, score_together
from kveraser.measure.questions import contains
from kveraser.measure.results import Answered, CaseResult, Measured, Question
from kveraser.methods import Method
from kveraser.methods.apply import edit_tokens
from kveraser.methods.recompute import Recompute
from kveraser.model.backbone import Backbone

UNERASED, EXACT = "none", "recompute"
"""Names of the results of the cache before any erase, and of the exact reference."""
ANSWER_TOKENS = 16
"""Maximum tokens of a greedy answer that is judged: the accepted answers are short."""
LEAK_TOKENS = 12
"""Tokens that an answer which may reveal a secret can use besides those of the secret."""
ATTACK_TOKENS = 96
"""Positions reserved for an adversary's prompt."""
CONFESSION_TOKENS = 32
"""Maximum tokens of the answer to an adversary's prompt."""
NOTICE_TOKENS = 256
"""Positions that every case reserves for text that a method appends, so that a cell has the same cases in every run."""
EXCERPT = 300
"""Characters before and after a span that a result quotes."""


@dataclass(frozen=True)
class _Replies:
    """What one cache replied.

    Attributes:
        scores: of every question, log-probabilities of the forced answer, float32 `[answer, vocabulary]`.
        spoken: tokens of the greedy answers, to every judged question and then to the adversary's prompt.
        attacked: the prompt that an adversary found for this cache.
    """

    scores: list[torch.Tensor]
    spoken: tuple[tuple[int, ...], ...]
    attacked: Attacked | None


def answer_limit(asked: Asked) -> int:
    """Maximum tokens of the greedy answer to a question."""
    return len(asked.answer) + LEAK_TOKENS if asked.query.kind == "leak" else ANSWER_TOKENS


def positions_needed(context: TokenizedContext, case: TokenizedCase) -> int:
    """Positions to measure a case: its context, a method's appended text, the longest question and its answer."""
    asked = max(len(one.prompt) + max(len(one.answer), answer_limit(one)) for one in case.asked)
    attacked = ATTACK_TOKENS + CONFESSION_TOKENS if case.case.attack else 0
    return len(context.tokens) + sum(map(len, case.inserted)) + NOTICE_TOKENS + max(asked, attacked)


def measure_context(
    backbone: Backbone,
    context: TokenizedContext,
    cases: Sequence[TokenizedCase],
    methods: Sequence[Method],
    checked: Sequence[TokenizedCase] = (),
) -> list[CaseResult]:
    """Ask the questions of all cases of one context after each method.

    Args:
        methods: resolved methods. The unerased cache and the exact reference are always measured, and come first.
        checked: cases whose exact reference is also compared with a fresh prefill of the remaining tokens.

    Returns:
        One result a case, in order.

    Raises:
        ContextLengthError: a case does not fit into the backbone; nothing is computed then.
    """
    backbone.check_room(0, max(positions_needed(context, case) for case in cases))
    cache = backbone.prefill(context.tokens)
    return [_measure_case(backbone, cache, context, case, methods, case in checked) for case in cases]


def _measure_case(
    backbone: Backbone,
    cache: EditableCache,
    context: TokenizedContext,
    case: TokenizedCase,
    methods: Sequence[Method],
    check: bool,
) -> CaseResult:
    tokens, changes = case.edited(context.tokens)
    targets = frozenset[int]().union(*(change.targets for change in changes))
    refused: list[str] = []
    costs: dict[str, tuple[float, int]] = {UNERASED: (0.0, 0)}
    replies = {UNERASED: _ask(backbone, cache, context, case, [])}
    edits = {EXACT: Recompute(), **{str(method): method for method in methods if not method.is_reference}}
    for name, method in edits.items():
        try:
            with cache.edit() as journal:
                for change in changes:
                    cache.renumber(change.inserted.start, len(change.inserted))
                _synchronize(backbone)
                started = time.perf_counter()
                recomputed = edit_tokens(backbone, cache, method, tokens, changes)
                _synchronize(backbone)
                costs[name] = time.perf_counter() - started, recomputed
        except MethodError:
            if not case.inserted:
                raise
            refused.append(name)
            continue
        try:
            replies[name] = _ask(backbone, cache, context, case, [*replies.values()])
        finally:
            cache.revert(journal)
    exact = fresh = replies[EXACT].scores
    if check:
        left = [token for place, token in enumerate(tokens) if place not in targets]
        fresh = score_together(backbone, backbone.prefill(left), [(one.prompt, one.answer) for one in case.asked])
    measured = {
        name: Measured(*costs[name], _answers(backbone, case, replied, fresh if name == EXACT else exact))
        for name, replied in replies.items()
    }
    return replace(_result(context, case, measured), refused=tuple(refused))


def _ask(
    backbone: Backbone,
    cache: EditableCache,
    context: TokenizedContext,
    case: TokenizedCase,
    earlier: Sequence[_Replies],
) -> _Replies:
    """Ask a cache all questions of a case, and attack it where the case has an adversary. The cache stays as it was.

    Args:
        earlier: replies of other caches. Most of the next are the same, which saves decoding steps.
    """
    judged = [one for one in case.asked if one.judged]
    prompts, limits = [one.prompt for one in judged], [answer_limit(one) for one in judged]
    attacked = None
    if case.case.attack is not None:
        attacked = case.case.attack(backbone, cache, context.turn_open)
        prompts, limits = [*prompts, attacked.prompt], [*limits, CONFESSION_TOKENS]
    forced = [(one.prompt, one.answer) for one in case.asked]
    told = [(place, spoken) for one in earlier for place, spoken in enumerate(one.spoken)]
    drafts = list(dict.fromkeys((place, spoken[: limits[place] - 1]) for place, spoken in told))
    scores = score_together(backbone, cache, [*forced, *((prompts[place], (*draft, 0)) for place, draft in drafts)])
    begun: list[list[int]] = [[] for _ in prompts]
    for (place, draft), scored in zip(drafts, scores[len(forced) :], strict=True):
        begun[place] = max(begun[place], greedy_start(draft, scored), key=len)
    answers = greedy_together(backbone, cache, prompts, limits, begun)
    return _Replies(scores[: len(forced)], tuple(map(tuple, answers)), attacked)


def _answers(
    backbone: Backbone, case: TokenizedCase, replies: _Replies, exact: Sequence[torch.Tensor]
) -> tuple[Answered, ...]:
    """Judge what a cache replied, against the log-probabilities of the exact reference."""
    answers = []
    texts = iter([backbone.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in replies.spoken])
    for asked, reference, scores in zip(case.asked, exact, replies.scores, strict=True):
        query, answer = asked.query, next(texts) if asked.judged else None
        wrong = answer is not None and any(contains(answer, one) for one in query.wrong)
        right = answer is not None and any(contains(answer, one) for one in query.accepted)
        answers.append(
            Answered(
                kl=kl_divergence(reference, scores),
                log_probability=float(scores[range(len(asked.answer)), list(asked.answer)].mean()),
                answer=answer,
                correct=None if answer is None or not query.accepted else right and not wrong,
                leaked=None if answer is None or query.kind != "leak" else wrong,
            )
        )
    if replies.attacked is not None and case.case.attack is not None:
        answer = next(texts)
        leaked, found = contains(answer, case.case.attack.secret), replies.attacked
        answers.append(Answered(None, found.log_probability, answer, None, leaked, found.prompt_text))
    return tuple(answers)


def _result(context: TokenizedContext, tokenized: TokenizedCase, measured: dict[str, Measured]) -> CaseResult:
    case, transcript, spans = tokenized.case, context.transcript, tokenized.spans
    questions = [
        Question(one.query.question, one.query.kind, one.query.answer, len(one.answer),
                 one.query.accepted, one.query.wrong, answer_prefix=one.query.answer_prefix)
        for one in tokenized.asked
    ]  # fmt: skip
    if case.attack is not None:
        questions.append(Question(None, "leak", case.attack.target, 0, (), (case.attack.secret,), True))
    start, end = transcript.offsets[spans[0].start][0], transcript.offsets[spans[-1].end - 1][1]
    return CaseResult(
        id=case.id,
        cell=case.cell,
        fingerprint=case.fingerprint,
        context=context_id(case.context),
        context_tokens=len(context.tokens),
        erased_tokens=tokenized.erased,
        distance_tokens=len(context.tokens) - spans[-1].end,
        before=transcript.text[max(transcript.body_start, start - EXCERPT) : start],
        erased=tuple(transcript.text_of(span) for span in spans),
        after=transcript.text[end : end + EXCERPT],
        questions=tuple(questions),
        methods=measured,
        inserted=case.replace,
    )


def _synchronize(backbone: Backbone) -> None:
    """Wait for queued work on a GPU, so that a measured time holds a method's own work and all of it."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
