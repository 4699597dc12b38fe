"""A session's operations run alone, and what a server said against that.

Alone means: by a service of its own in this process, one operation after the other, with all memory that it wants.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from kveraser.errors import KVEraserError, MeasurementError
from kveraser.model.backbone import Backbone
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Sampling
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.service import Limits, Service
from kveraser.serve.types import Delta
from tests.stress.operations import LIKELY, Done, Operation, Said

T = TypeVar("T")

TIE = 1e-3
"""Two tokens whose log-probabilities differ by less (nats) are equally likely: sums in another order decide."""

EVERYTHING = 1 << 50
KEY = "alone"


class Reference:
    """A service that does one thing at a time, and keeps everything."""

    def __init__(self, backbone: Backbone) -> None:
        self._runner = asyncio.Runner()
        engine = TransformersEngine(backbone)
        limits = Limits(
            memory_bytes=EVERYTHING, most_sessions=EVERYTHING, undo_steps=EVERYTHING, undo_seconds=EVERYTHING
        )
        self._scheduler = Scheduler(engine)
        self.service = Service(engine, self._scheduler, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.run(self.service.close())
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a call of the service."""
        return self._runner.run(work)

    def ask(self, id: str, body: dict[str, Any]) -> Said:
        """A greedy answer."""
        return self.run(self._answer(id, body))

    async def _answer(self, id: str, body: dict[str, Any]) -> Said:
        sampling = Sampling(max_tokens=body["max_tokens"], temperature=0.0, logprobs=LIKELY)
        text, tokens = list[str](), list[Any]()
        async for event in self.service.ask(KEY, id, body["question"], sampling, body["keep"]):
            if isinstance(event, Delta):
                text.append(event.text)
                tokens += event.tokens
        return Said(
            "".join(text),
            tuple(self.service.token_text(token.token) for token in tokens),
            tuple(token.logprob for token in tokens),
            tuple(token.top[0][1] - token.top[1][1] for token in tokens),
        )


@dataclass(frozen=True)
class Difference:
    """Where the server said or did something else: operation `number` of a session."""

    session: str
    number: int
    operation: Operation
    served: str
    alone: str


@dataclass(frozen=True)
class Compared:
    """An answer alone and the served one.

    Attributes:
        largest: the largest difference of the log-probability of a token that both say, in nats.
        gap: between the two likeliest tokens where one leaves the other, in nats; 0 where none does.
    """

    same: bool
    largest: float
    gap: float

    @classmethod
    def of(cls, alone: Said, served: Said) -> Compared:
        """Compare the two."""
        shared = 0
        for one, other in zip(alone.tokens, served.tokens, strict=False):
            if one != other:
                break
            shared += 1
        pairs = zip(alone.logprobs[:shared], served.logprobs, strict=False)
        # Where one of them ends, only the other one tells.
        gaps = [said.gaps[shared] for said in (alone, served) if len(said.tokens) > shared]
        same = alone.text == served.text and alone.tokens == served.tokens
        return cls(same, max((abs(one - other) for one, other in pairs), default=0.0), min(gaps, default=0.0))

    @property
    def agree(self) -> bool:
        """Whether they are the same, or leave each other where two tokens are equally likely."""
        return self.same or self.gap < TIE


@dataclass
class Alone:
    """One session of a server, replayed.

    Attributes:
        id: the server's; `own` is the one here, when it is there.
        reached: operations done so far.
        compared: answers that were compared.
        ties: of these, answers that differ where two tokens are equally likely.
        parted: a kept answer was such a tie: from there on the two sessions differ, and nothing is compared.
        unchecked: answers behind such a place.
        largest: the largest difference of a token's log-probability, in nats.
    """

    id: str
    reference: Reference
    own: str | None = None
    reached: int = 0
    compared: int = 0
    ties: int = 0
    unchecked: int = 0
    parted: bool = False
    largest: float = 0.0
    differences: list[Difference] = field(default_factory=list)

    def follow(self, done: Sequence[Done], inherited: int = 0) -> None:
        """Do what the server was asked to, from where this one is.

        Args:
            inherited: operations that were another session's: of these, questions that changed nothing are left out.
        """
        for number in range(self.reached, len(done)):
            one = done[number]
            self.reached = number + 1
            if self.parted:
                self.unchecked += one.said is not None and number >= inherited
            elif number >= inherited or one.operation.kind != "ask":
                self._take(number, one, number >= inherited)

    def _take(self, number: int, one: Done, counts: bool) -> None:
        if one.refused is not None and one.operation.kind == "undo":
            # The server keeps undo for a while only, and only for what is in memory.
            return
        served = one.said.text if one.said is not None else "done"
        try:
            said = self.apply(one.operation)
        except KVEraserError as error:
            if one.refused is None:
                self._differ(number, one, served, f"refused: {error}")
            return
        if one.refused is not None:
            self._differ(number, one, f"refused: {one.refused}", "done")
        elif one.said is not None and said is not None:
            compared = Compared.of(said, one.said)
            self.compared += counts
            self.largest = max(self.largest, compared.largest)
            if not compared.same:
                self.parted = one.operation.kind == "keep"
                self.ties += counts and compared.agree
                if not compared.agree:
                    self._differ(number, one, served, said.text)

    def _differ(self, number: int, one: Done, served: str, alone: str) -> None:
        self.differences.append(Difference(self.id, number, one.operation, served, alone))

    def apply(self, operation: Operation) -> Said | None:
        """Do one operation; the answer to a question.

        Raises:
            KVEraserError: it is refused; the session is as before.
        """
        kind, body, service, run = operation.kind, operation.body, self.reference.service, self.reference.run
        if kind == "create":
            self.own = run(service.create(KEY, messages=body["messages"])).id
            return None
        if self.own is None:
            raise MeasurementError(f"the first operation on session {self.id} is {kind}, not its creation: report it")
        if kind == "append":
            run(service.append(KEY, self.own, messages=body["messages"]))
        elif kind == "erase":
            run(service.erase(KEY, self.own, body["spans"], body["method"], undoable=body["undoable"]))
        elif kind == "undo":
            run(service.undo(KEY, self.own, body["steps"]))
        else:
            return self.reference.ask(self.own, body)
        return None

    def text(self) -> str | None:
        """The live text."""
        view = self.reference.run(self.reference.service.view(KEY, self.own or "", contents=True))
        return view.text

    def close(self) -> None:
        """Let the session go."""
        if self.own is not None:
            self.reference.run(self.reference.service.delete(KEY, self.own))
            self.own = None
