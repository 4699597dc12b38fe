"""What a peer is given, what it does, and what it reports."""

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
    """What to remove from a context, and what to ask afterwards: the same token ids as our own methods get.

    Attributes:
        tokens: of the context.
        span: what to remove of them.
        question: tokens appended after the removal; not empty.
        answer_tokens: most tokens of a greedy answer.
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
        peer, operation: what did what.
        context, span: tokens in the cache, and of them removed.
        seconds: until the cache is edited; None where the engine does not tell it from the answer's beginning.
        first_token_seconds: from the same moment to the first token of the answer.
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
    """An engine that is loaded once, holds one context at a time, and edits it once a round.

    Attributes:
        name: as `--peers` takes it.
        note: what a reader has to know to compare it with our rows.

    Args:
        backbone: whose tokens, threads and end tokens it uses.
        longest: tokens of the longest context, question and answer together.
    """

    name: ClassVar[str]
    note: ClassVar[str]

    @classmethod
    @abstractmethod
    def available(cls, backbone: Backbone) -> str | None:
        """None where it can run beside `backbone`; else why not, and what to do about it."""

    @abstractmethod
    def __init__(self, backbone: Backbone, longest: int) -> None: ...

    @abstractmethod
    def prepare(self, task: PeerTask) -> None:
        """Read the context of `task`, and answer its question after every operation. Not timed."""

    @abstractmethod
    def measure(self) -> list[PeerRow]:
        """Every operation once on the unedited context, each timed; the next round finds the context as it was."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


def medians(rounds: Sequence[Sequence[PeerRow]]) -> list[PeerRow]:
    """Each operation's row with the medians over rounds, in the order of the first round."""
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
