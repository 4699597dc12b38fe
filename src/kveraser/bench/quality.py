"""What each method forgets, leaks and harms, against exact recomputation: all cases of one context, on one prefill.

Every method edits that one cache in place, answers a case's questions in one pass, and is undone; the exact reference
is the same cache with the suffix prefilled again, compared once a context with a fresh prefill. Definitions:
docs/measures.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kveraser.audit import kl_divergence
from kveraser.backbone import Backbone
from kveraser.bench.attack import attack
from kveraser.bench.case import Asked, TokenizedCase, TokenizedContext, context_id
from kveraser.bench.results import Answered, CaseResult, Measured, Question
from kveraser.cache import EditableCache
from kveraser.decode import end_tokens
from kveraser.erasing import erase_tokens
from kveraser.methods import Method
from kveraser.methods.recompute import Recompute
from kveraser.packed import Pair, greedy_together, score_together
from kveraser.training.cases import normalized

UNERASED, EXACT = "none", "recompute"
"""The rows of the cache before any erase, and of the exact reference."""
ANSWER_TOKENS = 16
"""Most tokens of a greedy answer that is judged: the accepted answers are short."""
NOTICE_TOKENS = 256
"""Room that every case leaves for words a method appends, whichever methods a run has: a cell stays the same."""
ATTACK_TOKENS = 128
"""Room for an adversary's words."""
EXCERPT = 300
"""Characters before and after a span that a result quotes."""
DRAFTS = 3
"""Most answers of other caches that are tried before one is decoded token by token."""


@dataclass(frozen=True)
class _Reply:
    """What a cache says to one question: log-probabilities of the forced answer, and the judged greedy answer."""

    scores: torch.Tensor
    spoken: tuple[int, ...] | None


def room(context: TokenizedContext, case: TokenizedCase) -> int:
    """Positions that measuring a case takes: its context, a method's notice, the longest question and its answer."""
    asked = max(len(one.prompt) + max(len(one.answer), ANSWER_TOKENS) for one in case.asked)
    return len(context.tokens) + NOTICE_TOKENS + max(asked, ATTACK_TOKENS if case.case.attack else 0)


def measure_context(
    backbone: Backbone, context: TokenizedContext, cases: Sequence[TokenizedCase], methods: Sequence[Method]
) -> list[CaseResult]:
    """Answer the questions of all cases of a context after each method, beside the unerased cache and the reference.

    Args:
        methods: settled methods; `none` and `recompute` are measured in any case.

    Raises:
        ContextLengthError: a case does not fit into the backbone.
    """
    backbone.check_room(0, max(room(context, case) for case in cases))
    cache = backbone.prefill(context.tokens)
    asked = [one for case in cases for one in case.asked]
    unerased = iter(_answer(backbone, cache, asked, [[] for _ in asked]))
    return [
        _Measuring(backbone, cache, context, case, [next(unerased) for _ in case.asked]).run(methods, check=place == 0)
        for place, case in enumerate(cases)
    ]


class _Measuring:
    """One case on the prefilled cache of its context."""

    def __init__(
        self,
        backbone: Backbone,
        cache: EditableCache,
        context: TokenizedContext,
        case: TokenizedCase,
        unerased: Sequence[_Reply],
    ) -> None:
        self.backbone, self.cache, self.context, self.case = backbone, cache, context, case
        self.unerased = unerased
        self.targets = frozenset(token for span in case.spans for token in range(span.start, span.end))
        self.said: list[list[tuple[int, ...]]] = [[] for _ in case.asked]
        self._remember(unerased)

    def run(self, methods: Sequence[Method], check: bool) -> CaseResult:
        """Measure all methods.

        Args:
            check: compare the reference with a fresh prefill, which is then what its KL says.
        """
        measured = {UNERASED: (self.unerased, (0.0, 0), self._attacked())}
        measured[EXACT] = exact, _, _ = self._edited(Recompute())
        for method in methods:
            if not method.is_reference:
                measured[str(method)] = self._edited(method)
        fresh = self._fresh() if check else exact
        results = {}
        for name, (replies, (seconds, recomputed), attacked) in measured.items():
            reference = fresh if name == EXACT else exact
            answers = [self._answered(place, reference[place], reply) for place, reply in enumerate(replies)]
            results[name] = Measured(seconds, recomputed, tuple([*answers, *attacked]))
        return self._result(results)

    def _edited(self, method: Method) -> tuple[list[_Reply], tuple[float, int], list[Answered]]:
        """What the cache says after a method, what that cost, and what an adversary gets; the cache is as before."""
        transcript = self.context.transcript
        with self.cache.edit() as journal:
            self._settle()
            started = time.perf_counter()
            _, recomputed = erase_tokens(
                self.backbone, self.cache, method, transcript.tokens, range(self.cache.length), self.targets
            )
            self._settle()
            seconds = time.perf_counter() - started
        try:
            replies = _answer(self.backbone, self.cache, self.case.asked, self.said)
            self._remember(replies)
            return replies, (seconds, recomputed), self._attacked()
        finally:
            self.cache.revert(journal)

    def _fresh(self) -> list[_Reply]:
        """What a fresh prefill of the remaining tokens says, without greedy answers."""
        tokens = [token for place, token in enumerate(self.context.tokens) if place not in self.targets]
        pairs = [(one.prompt, one.answer) for one in self.case.asked]
        scores = score_together(self.backbone, self.backbone.prefill(tokens), pairs)
        return [_Reply(one, None) for one in scores]

    def _attacked(self) -> list[Answered]:
        if self.case.case.attack is None:
            return []
        found = attack(self.backbone, self.cache, self.context.turn_open, self.case.case.attack)
        return [Answered(None, found.log_probability, found.answer, None, found.leaked, found.prompt_text)]

    def _remember(self, replies: Sequence[_Reply]) -> None:
        for said, reply in zip(self.said, replies, strict=True):
            if reply.spoken is not None and reply.spoken not in said:
                said.append(reply.spoken)

    def _settle(self) -> None:
        # What was queued before belongs to no method, and what a method queued belongs to it.
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)

    def _answered(self, place: int, exact: _Reply, reply: _Reply) -> Answered:
        asked = self.case.asked[place]
        answer = None
        if reply.spoken is not None:
            answer = self.backbone.tokenizer.decode(reply.spoken, skip_special_tokens=True)
        query, places = asked.query, torch.arange(len(asked.answer))
        return Answered(
            kl=kl_divergence(exact.scores, reply.scores),
            log_probability=float(reply.scores[places, torch.tensor(asked.answer)].mean()),
            answer=answer,
            correct=None
            if answer is None or not query.accepted
            else _holds(answer, query.accepted) and not _holds(answer, query.wrong),
            leaked=None if answer is None or query.kind != "leak" else _holds(answer, query.wrong),
        )

    def _result(self, methods: dict[str, Measured]) -> CaseResult:
        case, transcript, spans = self.case.case, self.context.transcript, self.case.spans
        questions = [
            Question(one.query.question, one.query.kind, one.query.answer, len(one.answer),
                     one.query.accepted, one.query.wrong)
            for one in self.case.asked
        ]  # fmt: skip
        if case.attack is not None:
            questions.append(Question(None, "leak", case.attack.target, 0, (), (case.attack.secret,), True))
        start, end = transcript.offsets[spans[0].start][0], transcript.offsets[spans[-1].end - 1][1]
        return CaseResult(
            id=case.id,
            cell=case.cell,
            fingerprint=case.fingerprint,
            context=context_id(case.context),
            context_tokens=len(self.context.tokens),
            erased_tokens=self.case.erased,
            distance_tokens=len(self.context.tokens) - spans[-1].end,
            before=transcript.text[max(transcript.body_start, start - EXCERPT) : start],
            erased=tuple(transcript.text_of(span) for span in spans),
            after=transcript.text[end : end + EXCERPT],
            questions=tuple(questions),
            methods=methods,
        )


def _answer(
    backbone: Backbone, cache: EditableCache, asked: Sequence[Asked], said: Sequence[Sequence[tuple[int, ...]]]
) -> list[_Reply]:
    """Score the forced answers and find the greedy ones, in one pass where a draft holds.

    Args:
        said: of every question, what other caches answered; most caches answer alike.
    """
    ends = end_tokens(backbone)
    pairs: list[Pair] = [(one.prompt, one.answer) for one in asked]
    drafts: list[tuple[int, tuple[int, ...]]] = []
    for place, one in enumerate(asked):
        if one.judged:
            # The exact answer comes first, then what was said last.
            chosen = [*said[place][1:2], *said[place][:1], *said[place][:1:-1]][:DRAFTS]
            # An answer that was cut at the limit has no end to confirm.
            drafts += [
                (place, draft if len(draft) == ANSWER_TOKENS else (*draft, *sorted(ends)[:1])) for draft in chosen
            ]
    pairs += [(asked[place].prompt, draft) for place, draft in drafts]
    scored = score_together(backbone, cache, pairs)
    spoken: dict[int, tuple[int, ...]] = {place: () for place, one in enumerate(asked) if one.judged}
    finished: set[int] = set()
    for (place, draft), scores in zip(drafts, scored[len(asked) :], strict=True):
        held: list[int] = []
        # Each token is the greedy one as long as all before it were the draft's.
        for token, drafted in zip(scores.argmax(dim=-1).tolist(), draft, strict=True):
            if token in ends:
                finished.add(place)
                spoken[place] = tuple(held)
                break
            held.append(token)
            if token != drafted:
                break
        if place not in finished and len(held) > len(spoken[place]):
            spoken[place] = tuple(held)
        if len(held) == ANSWER_TOKENS:
            finished.add(place)
    open_places = [place for place in spoken if place not in finished]
    rest = greedy_together(
        backbone,
        cache,
        [(*asked[place].prompt, *spoken[place]) for place in open_places],
        ANSWER_TOKENS - min((len(spoken[place]) for place in open_places), default=0),
    )
    for place, tail in zip(open_places, rest, strict=True):
        spoken[place] = (*spoken[place], *tail)[:ANSWER_TOKENS]
    return [_Reply(scores, spoken.get(place)) for place, scores in enumerate(scored[: len(asked)])]


def _holds(answer: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts is in the answer, after SQuAD normalisation."""
    said = f" {normalized(answer)} "
    return any(f" {normalized(text)} " in said for text in texts)
