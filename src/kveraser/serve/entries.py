"""One context of the server: what is known of it beside what the engine holds."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kveraser.serve.engine import Held
from kveraser.serve.history import Tokens
from kveraser.serve.rendering import Reading

Kind = Literal["session", "conversation"]

Source = tuple[str, str]
"""The session that a context is compared with, and how it differs."""


@dataclass(frozen=True)
class Limits:
    """What contexts may take.

    Attributes:
        memory_bytes: of keys and values in memory.
        disk_bytes: of snapshots; beyond it cached conversations go. Sessions go when they expire.
        session_seconds, longest_session_seconds: after its last use a session expires; a client may
            ask for another time, up to the longest.
        conversation_seconds: the same for a cached conversation.
        most_sessions, most_conversations: of one key.
        undo_steps, undo_seconds: operations that can be undone, and for how long; then what they kept is overwritten.
        snapshot_seconds: a session's snapshot is written at the latest so long after a change, idle or not.
        busy_seconds: how soon a client should come back when all memory is in use.
    """

    memory_bytes: int = 4 << 30
    disk_bytes: int = 64 << 30
    session_seconds: float = 24 * 3600.0
    longest_session_seconds: float = 30 * 24 * 3600.0
    conversation_seconds: float = 3600.0
    most_sessions: int = 256
    most_conversations: int = 32
    undo_steps: int = 16
    undo_seconds: float = 3600.0
    snapshot_seconds: float = 10.0
    busy_seconds: float = 1.0


@dataclass(frozen=True)
class Undoable:
    """An operation that can be undone: its steps of the engine, when it was, and whether a turn was open before."""

    steps: int
    at: float
    turn_open: bool


@dataclass(frozen=True)
class Measured:
    """What is known of a context without asking the engine.

    Attributes:
        live: int32 `[live tokens]`.
        exact_prefix: leading live tokens whose states equal a fresh prefill's.
        undo_steps: of the engine.
        kl: of the last erase's audit, if it had one: nats per token.
        digest: of all tokens and which of them are live.
    """

    live: Tokens = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    tokens: int = 0
    live_tokens: int = 0
    exact: bool = True
    exact_prefix: int = 0
    bytes: int = 0
    undo_steps: int = 0
    kl: float | None = None
    digest: str = ""


class Guard(asyncio.Lock):
    """A lock that tells when it is free again."""

    def __init__(self, freed: Callable[[], None]) -> None:
        super().__init__()
        self._freed = freed

    def release(self) -> None:
        """Free it."""
        super().release()
        self._freed()


@dataclass(eq=False)
class Entry:
    """A context. Whoever holds `lock` may use it; `streaming` while that is for an answer.

    Attributes:
        held: None while it lies on disk.
        prompt: live tokens that the last request had, before its answer.
        source: what it was made for, where that is a session; with the session it goes.
        origin: id of the context that it was copied from.
        reserved: bytes that a running request may still take.
        copy_bytes: of the exact copy that is being made of it.
        saved: the revision of the snapshot on disk.
        changed_at: when the first change came that no snapshot has.
    """

    id: str
    owner: str
    kind: Kind
    created: float
    used: float
    ttl: float
    lock: Guard
    held: Held | None = None
    revision: int = 0
    turn_open: bool = False
    measured: Measured = field(default_factory=Measured)
    undoable: list[Undoable] = field(default_factory=list)
    reading: Reading | None = None
    prompt: int = 0
    source: Source | None = None
    origin: str | None = None
    reserved: int = 0
    copy_bytes: int = 0
    saved: int | None = None
    snapshot_bytes: int = 0
    changed_at: float | None = None
    streaming: bool = False
    exact_wanted: bool = False

    @property
    def expires(self) -> float:
        return self.used + self.ttl

    @property
    def bytes(self) -> int:
        return self.measured.bytes if self.held is not None else 0


def measure(held: Held) -> Measured:
    """Read a context; on the owner thread."""
    transcript = held.transcript
    tokens, live = np.array(transcript.tokens, dtype=np.int32), np.array(transcript.live, dtype=bool)
    kept = tokens[live]
    digest = hashlib.sha256(tokens.tobytes() + b"/" + live.tobytes()).hexdigest()
    erased = np.flatnonzero(~live)
    prefix = len(kept) if held.exact else int(erased[0]) if len(erased) else 0
    audit = held.receipts[-1].audit if held.receipts else None
    return Measured(
        live=kept, tokens=len(tokens), live_tokens=len(kept), exact=held.exact, exact_prefix=prefix,
        bytes=held.nbytes, undo_steps=held.undo_steps, kl=None if audit is None else audit.kl, digest=digest,
    )  # fmt: skip
