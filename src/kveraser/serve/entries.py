"""Records of the contexts that the server holds: metadata beside the cache of the engine."""

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
"""Id of the session that a context is compared with, and the kind of comparison."""


@dataclass(frozen=True)
class Limits:
    """Limits on contexts.

    Attributes:
        memory_bytes: of keys and values in memory.
        disk_bytes: of snapshots; cached conversations are removed beyond it. Sessions are removed when they expire.
        session_seconds, longest_session_seconds: time to live of a session after its last use, and the longest that a
            client may request.
        conversation_seconds: time to live of a cached conversation.
        most_sessions, most_conversations: per API key.
        undo_steps, undo_seconds: number of operations that can be undone, and for how long. Their states are then
            overwritten.
        snapshot_seconds: the longest time between a change and the snapshot of a session, idle or not.
        busy_seconds: when a client should retry if all memory is in use.
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
    """An operation that can be undone: its number of engine steps, its time, and whether a turn was open before it."""

    steps: int
    at: float
    turn_open: bool


@dataclass(frozen=True)
class Measured:
    """Measurements of a context, available without the engine.

    Attributes:
        live: int32 `[live tokens]`.
        exact_prefix: number of leading live tokens whose states equal those of a fresh prefill.
        undo_steps: of the engine.
        kl: from the audit of the last erase, in nats per token, or None.
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
    """A lock that calls `freed` on release."""

    def __init__(self, freed: Callable[[], None]) -> None:
        super().__init__()
        self._freed = freed

    def release(self) -> None:
        """Release the lock and call `freed`."""
        super().release()
        self._freed()


@dataclass(eq=False)
class Entry:
    """A context. Use it only while holding `lock`; `streaming` is set while an answer is decoded.

    Attributes:
        held: None while the context is on disk.
        prompt: number of live tokens of the last request, without its answer.
        source: session for whose comparison it was created, if any; removed together with it.
        origin: id of the context that it is a copy of.
        reserved: bytes that a running request may still allocate.
        copy_bytes: of the exact copy that is being computed.
        saved: revision of the snapshot on disk.
        changed_at: time of the first change that is not in a snapshot.
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
    """Measure a context. Call it on the scheduler's thread."""
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
