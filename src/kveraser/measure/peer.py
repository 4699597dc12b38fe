"""The interface of other engines that the latency benchmark times."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class PeerTask:
    """A span to remove from a context and a question to ask afterwards, in the token ids that methods get.

    Attributes:
        tokens: of the context.
        span: the tokens to remove.
        question: tokens appended after the removal; not empty.
        answer_tokens: maximum tokens of a greedy answer.
    """

    tokens: tuple[int, ...]
    span: Span
    question: tuple[int, ...]
    answer_tokens: int

    @property
    def edited(self) -> tuple[int, ...]:
        """The context without the span."""
        return self.tokens[: self.span.start] + self.tokens[self.span.end :]


@dataclass(frozen=True)
class PeerRow:
    """One operation of a peer at one context length.

    Attributes:
        peer, operation: names of both.
        context, span: tokens in the cache, and of them removed.
        seconds: of the edit; None where the engine does not separate it from the answer.
        first_token_seconds: from the start of the edit to the first token of the answer.
        answer: the greedy answer's text; None where the peer gives none.
        version: of the peer.
    """

    peer: str
    operation: str
    context: int
    span: int
    seconds: float | None
    first_token_seconds: float
    answer: str | None
    version: str


class Peer(ABC):
    """An engine that is loaded once, holds one context at a time, and edits it once per round.

    Attributes:
        name: as `--peers` takes it.
        note: how its rows compare with those of the methods.

    Args:
        backbone: the model whose tokens, threads and end tokens it uses.
        longest: tokens of the longest context, question and answer together.
    """

    name: ClassVar[str]
    note: ClassVar[str]

    @classmethod
    @abstractmethod
    def available(cls, backbone: Backbone) -> str | None:
        """None where it can run beside `backbone`; else the reason, and what to do about it."""

    @abstractmethod
    def __init__(self, backbone: Backbone, longest: int) -> None: ...

    @abstractmethod
    def prepare(self, task: PeerTask) -> None:
        """Prefill the context of `task`, and answer its question after every operation. Not timed."""

    @abstractmethod
    def measure(self) -> list[PeerRow]:
        """Time every operation once on the unedited context, and restore the context."""

    @abstractmethod
    def close(self) -> None:
        """Release all resources."""


def medians(rounds: Sequence[Sequence[PeerRow]]) -> list[PeerRow]:
    """One row per operation with medians over rounds, in the order of the first round."""
    rows = []
    for operation in rounds[0] if rounds else ():
        same = [row for rows_of_round in rounds for row in rows_of_round if row.operation == operation.operation]
        edits = [row.seconds for row in same if row.seconds is not None]
        rows.append(
            replace(
                operation,
                seconds=statistics.median(edits) if edits else None,
                first_token_seconds=statistics.median(row.first_token_seconds for row in same),
            )
        )
    return rows
