"""What each method forgets, leaks and harms, against exact recomputation: all cases of one context, on one prefill.

Every method edits that one cache in place, a copy is put aside, and the edit is undone; then the copies of several
cases answer their questions in one pass. The exact reference is the same cache with the suffix prefilled again,
compared with a fresh prefill in every cell's first and last batch. Definitions: docs/measures.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from kveraser.cache.editable import EditableCache
from kveraser.measure.attack import Attacked, attack
from kveraser.measure.audit import kl_divergence
from kveraser.measure.case import Asked, TokenizedCase, TokenizedContext, context_id
from kveraser.measure.packing import score_together
from kveraser.measure.pool import ATTACK_TOKENS, CONFESSION_TOKENS, Pool, Reply, appended, limit
from kveraser.measure.questions import contains
from kveraser.measure.results import Answered, CaseResult, Measured, Question
from kveraser.measure.together import Memory
from kveraser.methods import Method
from kveraser.methods.apply import erase_tokens
from kveraser.methods.recompute import Recompute
from kveraser.model.backbone import Backbone

UNERASED, EXACT = "none", "recompute"
"""The rows of the cache before any erase, and of the exact reference."""
NOTICE_TOKENS = 256
"""Room that every case leaves for words a method appends, whichever methods a run has: a cell stays the same."""
USUAL_NOTICE = 64
"""What these words take as a rule: more memory is reserved when they take more."""
EXCERPT = 300
"""Characters before and after a span that a result quotes."""


def room(context: TokenizedContext, case: TokenizedCase) -> int:
    """Positions that measuring a case takes: its context, a method's notice, the longest question and its answer."""
    asked = max(len(one.prompt) + max(len(one.answer), limit(one)) for one in case.asked)
    return (
        len(context.tokens) + NOTICE_TOKENS + max(asked, ATTACK_TOKENS + CONFESSION_TOKENS if case.case.attack else 0)
    )


def measure_context(
    backbone: Backbone, context: TokenizedContext, cases: Sequence[TokenizedCase], methods: Sequence[Method]
) -> list[CaseResult]:
    """As `measure_contexts`, one context, whose first case is checked."""
    return measure_contexts(backbone, [(context, cases)], methods, cases[:1])


def measure_contexts(
    backbone: Backbone,
    contexts: Sequence[tuple[TokenizedContext, Sequence[TokenizedCase]]],
    methods: Sequence[Method],
    checked: Sequence[TokenizedCase] = (),
    memory: Memory | None = None,
) -> list[CaseResult]:
    """Answer the questions of all cases after each method, beside the unerased cache and the reference.

    Args:
        contexts: with the cases of each; all are asked together, as far as memory allows.
        methods: settled methods; `none` and `recompute` are measured in any case.
        checked: cases whose reference is compared with a fresh prefill.
        memory: for edited caches, to use it again; without it new memory is taken.

    Returns:
        The results of all cases in order.

    Raises:
        ContextLengthError: a case does not fit into the backbone.
    """
    every = [(context, case) for context, cases in contexts for case in cases]
    backbone.check_room(0, max(room(context, case) for context, case in every))
    others = [method for method in methods if not method.is_reference]
    slots = max(len(context.tokens) for context, _ in contexts) + USUAL_NOTICE
    memory = memory or Memory()
    # Before any erase a cache answers the questions of all its cases.
    of_contexts = [([asked for case in cases for asked in case.asked], _attacks(cases)) for _, cases in contexts]
    unerased = Pool(backbone, len(contexts), slots, appended(of_contexts), memory)
    measured: list[_Measuring] = []
    for (context, cases), (asked, _) in zip(contexts, of_contexts, strict=True):
        cache = backbone.prefill(context.tokens)
        of_context = [_Measuring(backbone, cache, context, case) for case in cases]
        found = [one.found() for one in of_context]
        unerased.put(
            cache,
            asked,
            [attacked for of_case in found for attacked in of_case],
            partial(_share_out, of_context, found),
        )
        measured += of_context
    unerased.ask()
    alone = [(case.asked, _attacks([case])) for _, case in every]
    # The reference first: what it says, most edited caches say as well. Longer caches apart: all would be as long.
    removing = [method for method in others if method.removes_text]
    adding = [method for method in others if not method.removes_text]
    for together in ([Recompute()], removing, adding):
        if together:
            edited = Pool(backbone, len(every) * len(together), slots, appended(alone), memory)
            for one in measured:
                one.edit(together, edited)
            edited.ask()
    for one in measured:
        if one.case in checked:
            one.check()
    return [one.result([UNERASED, EXACT, *map(str, others)]) for one in measured]


def _attacks(cases: Sequence[TokenizedCase]) -> int:
    return sum(case.case.attack is not None for case in cases)


def _share_out(
    measured: Sequence[_Measuring],
    found: Sequence[Sequence[Attacked]],
    replies: Sequence[Reply],
    spoken: Sequence[tuple[int, ...]],
) -> None:
    """Give every case of a context its own of what the unerased cache said."""
    said, confessed = iter(replies), iter(spoken)
    for one, of_case in zip(measured, found, strict=True):
        one.receive(UNERASED, 0.0, 0, of_case, [next(said) for _ in one.case.asked], [next(confessed) for _ in of_case])


class _Measuring:
    """One case on the prefilled cache of its context."""

    def __init__(
        self, backbone: Backbone, cache: EditableCache, context: TokenizedContext, case: TokenizedCase
    ) -> None:
        self.backbone, self.cache, self.context, self.case = backbone, cache, context, case
        self.targets = frozenset(token for span in case.spans for token in range(span.start, span.end))
        self.replies: dict[str, list[Reply]] = {}
        self.costs: dict[str, tuple[float, int]] = {}
        self.attacked: dict[str, list[Answered]] = {}
        self.drafts: list[tuple[int, ...]] = []
        self.fresh: list[torch.Tensor] | None = None

    def edit(self, methods: Sequence[Method], pool: Pool) -> None:
        """Put the cache as it is after each method into the pool."""
        for method in methods:
            with self._edited(method) as (seconds, recomputed):
                found = self.found()
                name = EXACT if method.is_reference else str(method)
                deliver = partial(self.receive, name, seconds, recomputed, found)
                pool.put(self.cache, self.case.asked, found, deliver, self.drafts)

    def receive(
        self,
        name: str,
        seconds: float,
        recomputed: int,
        found: Sequence[Attacked],
        replies: list[Reply],
        spoken: Sequence[tuple[int, ...]],
    ) -> None:
        """Keep what the cache said after the method `name`, whose erase took `seconds` and ran `recomputed` tokens."""
        self.costs[name], self.replies[name] = (seconds, recomputed), replies
        self.attacked[name] = [self._confessed(one, said) for one, said in zip(found, spoken, strict=True)]
        if name in (UNERASED, EXACT):
            self.drafts = [*(reply.spoken for reply in replies if reply.spoken is not None), *spoken]

    def check(self) -> None:
        """Ask a fresh prefill of the remaining tokens as well, which the reference is then compared with."""
        tokens = [token for place, token in enumerate(self.context.tokens) if place not in self.targets]
        pairs = [(one.prompt, one.answer) for one in self.case.asked]
        self.fresh = score_together(self.backbone, self.backbone.prefill(tokens), pairs)

    def found(self) -> list[Attacked]:
        """The words in which an adversary would ask the cache as it is now; none where there is no adversary."""
        if self.case.case.attack is None:
            return []
        return [attack(self.backbone, self.cache, self.context.turn_open, self.case.case.attack)]

    @contextmanager
    def _edited(self, method: Method) -> Iterator[tuple[float, int]]:
        """The cache after a method, with its seconds and the tokens it ran; behind it the cache is as before."""
        with self.cache.edit() as journal:
            self._settle()
            started = time.perf_counter()
            recomputed = erase_tokens(self.backbone, self.cache, method, self.context.tokens, self.targets)
            self._settle()
            seconds = time.perf_counter() - started
        try:
            yield seconds, recomputed
        finally:
            self.cache.revert(journal)

    def _confessed(self, found: Attacked, spoken: Sequence[int]) -> Answered:
        """What the cache answers to an adversary."""
        assert self.case.case.attack is not None
        answer = self.backbone.tokenizer.decode(spoken, skip_special_tokens=True)
        leaked = contains(answer, self.case.case.attack.secret)
        return Answered(None, found.log_probability, answer, None, leaked, found.prompt_text)

    def _settle(self) -> None:
        # What was queued before belongs to no method, and what a method queued belongs to it.
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)

    def _answered(self, asked: Asked, exact: torch.Tensor, reply: Reply) -> Answered:
        answer = None
        if reply.spoken is not None:
            answer = self.backbone.tokenizer.decode(reply.spoken, skip_special_tokens=True)
        query, places = asked.query, torch.arange(len(asked.answer))
        return Answered(
            kl=kl_divergence(exact, reply.scores),
            log_probability=float(reply.scores[places, torch.tensor(asked.answer)].mean()),
            answer=answer,
            correct=None
            if answer is None or not query.accepted
            else any(contains(answer, one) for one in query.accepted)
            and not any(contains(answer, one) for one in query.wrong),
            leaked=None
            if answer is None or query.kind != "leak"
            else any(contains(answer, one) for one in query.wrong),
        )

    def result(self, names: Sequence[str]) -> CaseResult:
        """All that was received, against what the reference said; `names` of the methods, in order."""
        exact = [reply.scores for reply in self.replies[EXACT]]
        methods = {}
        for name in names:
            reference = self.fresh if name == EXACT and self.fresh is not None else exact
            answers = [self._answered(*one) for one in zip(self.case.asked, reference, self.replies[name], strict=True)]
            methods[name] = Measured(*self.costs[name], (*answers, *self.attacked[name]))
        case, transcript, spans = self.case.case, self.context.transcript, self.case.spans
        questions = [
            Question(one.query.question, one.query.kind, one.query.answer, len(one.answer),
                     one.query.accepted, one.query.wrong, answer_prefix=one.query.answer_prefix)
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
