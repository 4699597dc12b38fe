"""What each method forgets, leaks and harms, against exact recomputation: all cases of one context, on one prefill.

Every method edits that one cache in place, a copy is put aside, and the edit is undone; then all copies answer the
case's questions in one pass. The exact reference is the same cache with the suffix prefilled again, compared once a
context with a fresh prefill. Definitions: docs/measures.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kveraser.audit import kl_divergence
from kveraser.backbone import Backbone
from kveraser.bench.attack import Attacked, attack
from kveraser.bench.case import Asked, TokenizedCase, TokenizedContext, context_id
from kveraser.bench.results import Answered, CaseResult, Measured, Question
from kveraser.bench.together import Rows
from kveraser.cache import EditableCache
from kveraser.decode import end_tokens
from kveraser.erasing import erase_tokens
from kveraser.methods import Method
from kveraser.methods.recompute import Recompute
from kveraser.packed import Pair
from kveraser.training.cases import normalized

UNERASED, EXACT = "none", "recompute"
"""The rows of the cache before any erase, and of the exact reference."""
ANSWER_TOKENS = 16
"""Most tokens of a greedy answer that is judged: the accepted answers are short."""
LEAK_TOKENS = 32
"""The same of an answer that may give a secret away, which can come late."""
NOTICE_TOKENS = 256
"""Room that every case leaves for words a method appends, whichever methods a run has: a cell stays the same."""
ATTACK_TOKENS = 128
"""Room for an adversary's words."""
EXCERPT = 300
"""Characters before and after a span that a result quotes."""
ROW_SLOTS = 16_384
"""Most slots of caches that are asked together: under a gigabyte for the bundled backbone."""


@dataclass(frozen=True)
class _Reply:
    """What a cache says to one question: log-probabilities of the forced answer, and the judged greedy answer."""

    scores: torch.Tensor
    spoken: tuple[int, ...] | None


def room(context: TokenizedContext, case: TokenizedCase) -> int:
    """Positions that measuring a case takes: its context, a method's notice, the longest question and its answer."""
    asked = max(len(one.prompt) + max(len(one.answer), _limit(one)) for one in case.asked)
    return len(context.tokens) + NOTICE_TOKENS + max(asked, ATTACK_TOKENS if case.case.attack else 0)


def _limit(asked: Asked) -> int:
    return LEAK_TOKENS if asked.query.kind == "leak" else ANSWER_TOKENS


def measure_context(
    backbone: Backbone,
    context: TokenizedContext,
    cases: Sequence[TokenizedCase],
    methods: Sequence[Method],
    check: bool = True,
) -> list[CaseResult]:
    """Answer the questions of all cases of a context after each method, beside the unerased cache and the reference.

    Args:
        methods: settled methods; `none` and `recompute` are measured in any case.
        check: compare the reference of the first case with a fresh prefill.

    Raises:
        ContextLengthError: a case does not fit into the backbone.
    """
    backbone.check_room(0, max(room(context, case) for case in cases))
    cache = backbone.prefill(context.tokens)
    asked = [one for case in cases for one in case.asked]
    unerased = iter(_answer(_row(backbone, cache), asked)[0])
    return [
        _Measuring(backbone, cache, context, case, [next(unerased) for _ in case.asked]).run(
            methods, check and place == 0
        )
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

    def run(self, methods: Sequence[Method], check: bool) -> CaseResult:
        """Measure all methods.

        Args:
            check: compare the reference with a fresh prefill, which is then what its KL says.
        """
        chosen = [Recompute(), *(method for method in methods if not method.is_reference)]
        costs, replies = [(0.0, 0)], [list(self.unerased)]
        first = self._attack()
        attacked = self._attacked(_row(self.backbone, self.cache), [first]) if first is not None else [[]]
        rows, found = Rows(self.backbone), list[Attacked | None]()
        for method in chosen:
            with self._edited(method) as cost:
                costs.append(cost)
                found.append(self._attack())
                rows.add(self.cache)
            full = (len(rows.states) + 1) * max(rows.slots) > ROW_SLOTS
            # The exact reference speaks first: most methods say what it says, or what was said before the erase.
            if full or method in (chosen[0], chosen[-1]):
                replies += _answer(rows, self.case.asked, [replies[0], *replies[1:2]])
                attacked += self._attacked(rows, found)
                rows, found = Rows(self.backbone), []
        exact = replies[1]
        fresh = self._fresh() if check else [reply.scores for reply in exact]
        results = {}
        for place, name in enumerate([UNERASED, EXACT, *map(str, chosen[1:])]):
            reference = fresh if name == EXACT else [reply.scores for reply in exact]
            answers = [self._answered(*one) for one in zip(self.case.asked, reference, replies[place], strict=True)]
            results[name] = Measured(*costs[place], tuple([*answers, *attacked[place]]))
        return self._result(results)

    @contextmanager
    def _edited(self, method: Method) -> Iterator[tuple[float, int]]:
        """The cache after a method, with its seconds and the tokens it ran; behind it the cache is as before."""
        with self.cache.edit() as journal:
            self._settle()
            started = time.perf_counter()
            _, recomputed = erase_tokens(
                self.backbone, self.cache, method, self.context.tokens, range(self.cache.length), self.targets
            )
            self._settle()
            seconds = time.perf_counter() - started
        try:
            yield seconds, recomputed
        finally:
            self.cache.revert(journal)

    def _fresh(self) -> list[torch.Tensor]:
        """What a fresh prefill of the remaining tokens gives the forced answers."""
        tokens = [token for place, token in enumerate(self.context.tokens) if place not in self.targets]
        pairs = [(one.prompt, one.answer) for one in self.case.asked]
        return _row(self.backbone, self.backbone.prefill(tokens)).score(pairs)[0]

    def _attack(self) -> Attacked | None:
        """The words in which an adversary would ask the cache as it is now."""
        if self.case.case.attack is None:
            return None
        return attack(self.backbone, self.cache, self.context.turn_open, self.case.case.attack)

    def _attacked(self, rows: Rows, found: Sequence[Attacked | None]) -> list[list[Answered]]:
        """What every row answers to the words that were found for it; nothing where there is no adversary."""
        prompts = [one.prompt for one in found if one is not None]
        if not prompts or self.case.case.attack is None:
            return [[] for _ in found]
        secret, answered = self.case.case.attack.secret, list[list[Answered]]()
        for one, (spoken,) in zip(found, rows.greedy([[prompt] for prompt in prompts], LEAK_TOKENS), strict=True):
            assert one is not None
            answer = self.backbone.tokenizer.decode(spoken, skip_special_tokens=True)
            leaked = _holds(answer, (secret,))
            answered.append([Answered(None, one.log_probability, answer, None, leaked, one.prompt_text)])
        return answered

    def _settle(self) -> None:
        # What was queued before belongs to no method, and what a method queued belongs to it.
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)

    def _answered(self, asked: Asked, exact: torch.Tensor, reply: _Reply) -> Answered:
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


def _row(backbone: Backbone, cache: EditableCache) -> Rows:
    rows = Rows(backbone)
    rows.add(cache)
    return rows


def _answer(rows: Rows, asked: Sequence[Asked], others: Sequence[Sequence[_Reply]] = ()) -> list[list[_Reply]]:
    """What every row says: forced answers are scored in one pass, greedy ones decoded where no draft holds.

    Args:
        others: what other caches said to the questions; most caches answer alike.
    """
    ends = end_tokens(rows.backbone)
    drafts: dict[tuple[int, tuple[int, ...]], None] = {}
    for place, reply in (one for other in others for one in enumerate(other)):
        if reply.spoken is not None:
            # An answer that was cut at the limit has no end to confirm.
            cut = len(reply.spoken) == _limit(asked[place])
            drafts[place, reply.spoken if cut else (*reply.spoken, *sorted(ends)[:1])] = None
    pairs: list[Pair] = [(one.prompt, one.answer) for one in asked]
    scored = rows.score([*pairs, *((asked[place].prompt, draft) for place, draft in drafts)])
    spoken: list[dict[int, tuple[int, ...]]] = [
        {place: () for place, one in enumerate(asked) if one.judged} for _ in scored
    ]
    unfinished: list[list[int]] = []
    for said, scores in zip(spoken, scored, strict=True):
        finished = set()
        for (place, draft), confirming in zip(drafts, scores[len(asked) :], strict=True):
            held, ended = _held(draft, confirming, ends)
            # Drafts agree as far as they are both greedy, so the longest says most.
            said[place] = max(said[place], held, key=len)
            if ended or len(held) == _limit(asked[place]):
                finished.add(place)
        unfinished.append([place for place in said if place not in finished])
    open_rows = [row for row, places in enumerate(unfinished) if places]
    if open_rows:
        prompts = [[(*asked[place].prompt, *spoken[row][place]) for place in unfinished[row]] for row in open_rows]
        missing = max(_limit(asked[place]) - len(spoken[row][place]) for row in open_rows for place in unfinished[row])
        for row, tails in zip(open_rows, rows.only(open_rows).greedy(prompts, missing), strict=True):
            for place, tail in zip(unfinished[row], tails, strict=True):
                spoken[row][place] = (*spoken[row][place], *tail)[: _limit(asked[place])]
    return [
        [_Reply(scores[place], said.get(place)) for place in range(len(asked))]
        for scores, said in zip(scored, spoken, strict=True)
    ]


def _held(draft: Sequence[int], scores: torch.Tensor, ends: frozenset[int]) -> tuple[tuple[int, ...], bool]:
    """How far a draft is the greedy answer, with the token that follows, and whether the answer ends there."""
    held: list[int] = []
    # Each token is the greedy one as long as all before it were the draft's.
    for token, drafted in zip(scores.argmax(dim=-1).tolist(), draft, strict=True):
        if token in ends:
            return tuple(held), True
        held.append(token)
        if token != drafted:
            break
    return tuple(held), False


def _holds(answer: str, texts: Sequence[str]) -> bool:
    """Whether one of the texts is in the answer, after SQuAD normalisation."""
    said = f" {normalized(answer)} "
    return any(f" {normalized(text)} " in said for text in texts)
