"""Storage of contexts: in memory within a budget, on disk beyond it, and across restarts.

The ledger records the acknowledged revision of each session, and snapshots are written in idle time. After a restart a
session is restored at its acknowledged revision or reported as gone. Cached conversations may be moved to disk,
too, but end with the process.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from kveraser.errors import KVEraserError
from kveraser.serve.engine import Engine, Held
from kveraser.serve.entries import Entry, Guard, Kind, Limits, Measured, Undoable, measure
from kveraser.serve.errors import OutOfSpace, Overloaded, ServeError, SessionGone, UnknownSession
from kveraser.serve.ledger import Acknowledged, Ledger
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.secure_delete import secure_delete

SUFFIX = ".session"

TOMBSTONE_SECONDS = 7 * 24 * 3600.0
"""How long after its expiry a session is reported as gone instead of not found."""


class Store:
    """All contexts of a server. Use it from one asyncio loop.

    Args:
        folder: for the ledger and snapshots; None: contexts are in memory only and end with the process.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        limits: Limits,
        folder: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine, self.scheduler, self.limits, self.clock = engine, scheduler, limits, clock
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.gone: dict[str, Acknowledged] = {}
        self._freed = asyncio.Event()
        self._behind: asyncio.Task[None] | None = None
        self.ledger: Ledger | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise ServeError(f"the session folder {folder} can't be made ({error}): choose another") from error
            self.ledger = Ledger(folder / "ledger.sqlite3")
            self._bring_back(folder)

    def _bring_back(self, folder: Path) -> None:
        """Restore the sessions that have a snapshot of the acknowledged revision; delete other files securely."""
        assert self.ledger is not None
        present = {path.name: path for path in folder.iterdir() if path.name.endswith((SUFFIX, ".part"))}
        for record in list(self.ledger.records.values()):
            path = present.get(f"{record.id}.{record.revision}{SUFFIX}") if record.state == "held" else None
            if path is None or record.expires <= self.clock():
                self._bury(record)
                continue
            del present[path.name]
            self.entries[record.id] = Entry(
                record.id, record.owner, "session", record.created, record.expires - record.ttl, record.ttl,
                Guard(self._notify),
                revision=record.revision, turn_open=record.turn_open, saved=record.revision,
                snapshot_bytes=path.stat().st_size,
                measured=Measured(
                    tokens=record.tokens, live_tokens=record.live_tokens, exact=record.exact, digest=record.digest
                ),
            )  # fmt: skip
        for path in present.values():
            secure_delete(path)

    def _bury(self, record: Acknowledged) -> None:
        """Report a session that can't be restored as gone for `TOMBSTONE_SECONDS` after its expiry."""
        assert self.ledger is not None
        late = record.expires + TOMBSTONE_SECONDS <= self.clock()
        if late or record.state != "gone":
            with suppress(OutOfSpace):
                self.ledger.append(replace(record, state="deleted" if late else "gone"))
        if not late:
            self.gone[record.id] = record

    # Finding

    def of(self, owner: str, kind: Kind) -> list[Entry]:
        """The contexts of an owner of one kind, oldest first."""
        found = [entry for entry in self.entries.values() if entry.owner == owner and entry.kind == kind]
        return sorted(found, key=lambda entry: entry.created)

    def session(self, owner: str, id: str) -> Entry:
        """Find a session. Raises UnknownSession, SessionGone."""
        entry = self.entries.get(id)
        if entry is not None and entry.owner == owner and entry.kind == "session":
            if entry.expires > self.clock():
                return entry
            raise SessionGone(f"session {id} has expired: create a new one")
        record = self.gone.get(id)
        if record is not None and record.owner == owner:
            raise SessionGone(f"session {id} can't be brought back as it last was: create it anew")
        raise UnknownSession(f"no session {id!r}: list yours with GET /v1/sessions, or create one")

    # Entering and changing

    def enter(self, owner: str, kind: Kind, ttl: float) -> Entry:
        """Create an entry without a context."""
        now = self.clock()
        entry = Entry(f"{kind[:4]}_{secrets.token_hex(12)}", owner, kind, now, now, ttl, Guard(self._notify))
        self.entries[entry.id] = entry
        return entry

    async def settle(self, entry: Entry, changed: bool = True) -> None:
        """Measure a context after an operation, and record the new revision of a session before it is acknowledged.

        If the disk is full, the session continues in memory and is gone after a restart. The caller must hold its lock.

        Raises:
            OutOfSpace: a new session can't be recorded.
        """
        held = entry.held
        assert held is not None
        entry.measured = await self.scheduler.run(lambda: measure(held), always=True)
        entry.used, entry.reserved = self.clock(), 0
        if not changed:
            return
        entry.revision += 1
        old = self._snapshot(entry, entry.saved) if entry.saved is not None else None
        entry.saved, entry.snapshot_bytes = None, 0
        if entry.kind == "session":
            entry.changed_at = entry.changed_at or self.clock()
            try:
                await self._record(entry)
            except OutOfSpace:
                if entry.revision == 1:
                    raise
            finally:
                # It may hold erased text, and the session may be restored only at the recorded revision.
                if old is not None:
                    await asyncio.to_thread(secure_delete, old)
            self.write_behind()
        elif old is not None:
            await asyncio.to_thread(secure_delete, old)

    async def _record(self, entry: Entry, state: Literal["held", "gone", "deleted"] = "held") -> None:
        if self.ledger is not None:
            await asyncio.to_thread(self.ledger.append, self._acknowledged(entry, state))

    def _acknowledged(self, entry: Entry, state: Literal["held", "gone", "deleted"]) -> Acknowledged:
        measured = entry.measured
        return Acknowledged(
            entry.id, entry.owner, state, entry.revision, measured.digest, entry.created, entry.expires, entry.ttl,
            entry.turn_open, measured.tokens, measured.live_tokens, measured.exact,
        )  # fmt: skip

    # Room

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values in memory, and bytes reserved by running requests."""
        return sum(entry.bytes + entry.reserved + entry.copy_bytes for entry in self.entries.values())

    @property
    def bytes_spilled(self) -> int:
        """Bytes of snapshots on disk."""
        return sum(entry.snapshot_bytes for entry in self.entries.values())

    def size(self, tokens: int) -> int:
        """Maximum size in bytes of a context of `tokens` tokens."""
        return (tokens + self.engine.spare_tokens) * self.engine.bytes_per_token

    async def reserve(self, entry: Entry, tokens: int, more: int = 0) -> None:
        """Reserve memory for `tokens` more tokens, spare slots and `more` bytes; evict least recently used contexts.

        Raises:
            OutOfSpace: the limit is too small, or memory and disk are full.
            Overloaded: all other contexts stayed in use for `Limits.busy_seconds`.
        """
        wanted = self.size(tokens) + more
        try:
            needed = entry.bytes + wanted
            if needed > self.limits.memory_bytes:
                raise OutOfSpace(
                    f"the context needs about {needed} bytes, the server has {self.limits.memory_bytes}: shorten it"
                )
            stuck, until = set[str](), asyncio.get_running_loop().time() + self.limits.busy_seconds
            # The reservation counts only when granted, so `bytes_held` never exceeds the budget.
            while self.bytes_held - entry.reserved + wanted > self.limits.memory_bytes:
                idle = [
                    other for other in self.entries.values()
                    if other is not entry and other.held is not None and other.id not in stuck
                    and not other.lock.locked()
                ]  # fmt: skip
                if not idle:
                    if stuck:
                        raise OutOfSpace("no context can be put on disk, and memory is full: free disk space")
                    await self._wait_for_one(until)
                    continue
                oldest = min(idle, key=lambda other: other.used)
                async with oldest.lock:
                    if oldest.held is not None and not await self.put_away(oldest):
                        stuck.add(oldest.id)
            entry.reserved = wanted
        except BaseException:
            entry.reserved = 0
            raise

    async def _wait_for_one(self, until: float) -> None:
        """Wait until a context is free. The timeout resolves deadlocks of requests that wait for each other."""
        try:
            async with asyncio.timeout_at(until):
                await self._freed.wait()
        except TimeoutError as error:
            raise Overloaded(
                "all memory for contexts is in use: try again shortly", retry_after=self.limits.busy_seconds
            ) from error

    def _notify(self) -> None:
        self._freed.set()
        self._freed = asyncio.Event()

    async def put_away(self, entry: Entry) -> bool:
        """Move a context to disk, or free a conversation that can't be saved. Returns whether its memory was freed.

        Undo states are discarded. The caller must hold the lock of the entry.
        """
        held = entry.held
        assert held is not None
        if not await self.save(entry):
            if entry.kind == "session":
                return False
            await self.remove(entry)
            return True
        entry.held, entry.undoable = None, []

        def drop() -> None:
            # Overwrite undo states; live states need no overwriting.
            self.engine.forget_undo(held, 0)
            self.engine.drop(held, wipe=False)

        await self.scheduler.run(drop, always=True)
        await self._keep_disk_budget()
        return True

    async def awake(self, entry: Entry) -> Held:
        """Load a context into memory if necessary. The caller must hold its lock.

        Raises:
            SessionGone: its snapshot can't be read, or differs from the acknowledged state.
        """
        if entry.held is not None:
            return entry.held
        path = self._snapshot(entry, entry.saved)
        await self.reserve(entry, 0, entry.snapshot_bytes)
        try:
            held = await self.scheduler.run(lambda: self.engine.load(path), always=True)
            measured = await self.scheduler.run(lambda: measure(held), always=True)
            if measured.digest != entry.measured.digest:
                raise SessionGone(f"the snapshot of {entry.id} holds something else")
        except KVEraserError as error:
            entry.reserved = 0
            await self.remove(entry, gone=True)
            raise SessionGone(f"session {entry.id} can't be brought back as it last was: create it anew") from error
        entry.held, entry.measured, entry.reserved = held, measured, 0
        return held

    async def save(self, entry: Entry) -> bool:
        """Write a snapshot unless it is up to date. Returns whether one exists. The caller must hold the lock."""
        held = entry.held
        if held is None or entry.saved == entry.revision:
            return True
        if self.folder is None:
            return False
        path = self._snapshot(entry, entry.revision)
        try:
            await self.scheduler.run(lambda: self.engine.save(held, path), always=True)
            size = path.stat().st_size
        except (KVEraserError, OSError):
            await asyncio.to_thread(secure_delete, path)
            return False
        if entry.saved is not None:
            await asyncio.to_thread(secure_delete, self._snapshot(entry, entry.saved))
        entry.saved, entry.snapshot_bytes, entry.changed_at = entry.revision, size, None
        return True

    async def remove(self, entry: Entry, *, wipe: bool = False, gone: bool = False) -> None:
        """Free a context in memory and on disk. The caller must hold its lock unless the entry is not yet published.

        Args:
            wipe: overwrite its states in memory.
            gone: report a session as gone afterwards, not as not found.
        """
        self.entries.pop(entry.id, None)
        held, entry.held = entry.held, None
        entry.reserved = entry.copy_bytes = 0
        if entry.kind == "session" and entry.revision:
            with suppress(OutOfSpace):
                await self._record(entry, "gone" if gone else "deleted")
            if gone:
                self.gone[entry.id] = self._acknowledged(entry, "gone")
        if entry.saved is not None:
            await asyncio.to_thread(secure_delete, self._snapshot(entry, entry.saved))
        if held is not None:
            await self.scheduler.run(lambda: self.engine.drop(held, wipe), always=True)

    def _snapshot(self, entry: Entry, revision: int | None) -> Path:
        assert self.folder is not None and revision is not None
        return self.folder / f"{entry.id}.{revision}{SUFFIX}"

    async def _keep_disk_budget(self) -> None:
        """Remove the least recently used conversations on disk while snapshots exceed the limit."""
        while self.bytes_spilled > self.limits.disk_bytes:
            spilled = [
                entry for entry in self.entries.values()
                if entry.kind == "conversation" and entry.held is None and entry.saved and not entry.lock.locked()
            ]  # fmt: skip
            if not spilled:
                return
            await self.remove(min(spilled, key=lambda entry: entry.used))

    # In idle time

    def write_behind(self) -> None:
        """Write snapshots of changed sessions when the engine is idle."""
        if self.folder is not None and (self._behind is None or self._behind.done()):
            self._behind = asyncio.get_running_loop().create_task(self._write_behind())

    async def _write_behind(self) -> None:
        loop = asyncio.get_running_loop()
        tried: set[str] = set()
        while unsaved := [entry for entry in self._unsaved() if entry.id not in tried]:
            idle = asyncio.Event()

            def signal(event: asyncio.Event = idle) -> bool:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(event.set)
                return False

            self.scheduler.when_idle(signal)
            late = min(entry.changed_at or 0.0 for entry in unsaved) + self.limits.snapshot_seconds - self.clock()
            with suppress(TimeoutError):
                await asyncio.wait_for(idle.wait(), max(0.0, late))
            # Sessions that are answering are written afterwards.
            free = [entry for entry in unsaved if not entry.lock.locked()]
            entry = min(free or unsaved, key=lambda entry: entry.changed_at or 0.0)
            async with entry.lock:
                if entry.id in self.entries and not await self.save(entry):
                    # The disk is full; the next change tries again.
                    tried.add(entry.id)

    def _unsaved(self) -> list[Entry]:
        return [
            entry for entry in self.entries.values()
            if entry.kind == "session" and entry.held is not None and entry.changed_at is not None
        ]  # fmt: skip

    async def sweep(self) -> None:
        """Remove expired contexts and expired undo states."""
        now = self.clock()
        for entry in list(self.entries.values()):
            if entry.lock.locked():
                continue
            async with entry.lock:
                if entry.expires <= now:
                    await self.remove(entry, wipe=True, gone=True)
                    await self.forget_made_for(entry.id)
                elif entry.undoable and entry.undoable[0].at + self.limits.undo_seconds <= now:
                    kept = [done for done in entry.undoable if done.at + self.limits.undo_seconds > now]
                    await self.keep_undoable(entry, kept)
                    await self.forget_made_for(entry.id)
        self.gone = {id: record for id, record in self.gone.items() if record.expires + TOMBSTONE_SECONDS > now}

    async def forget_made_for(self, id: str) -> None:
        """Overwrite and remove the contexts created for comparison with session `id`: they may hold its erased text."""
        for entry in list(self.entries.values()):
            if entry.source is not None and entry.source[0] == id:
                async with entry.lock:
                    await self.remove(entry, wipe=True)

    async def keep_undoable(self, entry: Entry, kept: list[Undoable]) -> None:
        """Keep `kept` undoable and overwrite the undo states of other operations. The caller must hold the lock."""
        held, steps = entry.held, sum(done.steps for done in kept)
        entry.undoable = kept
        if held is not None:
            await self.scheduler.run(lambda: self.engine.forget_undo(held, steps), always=True)
            entry.measured = await self.scheduler.run(lambda: measure(held), always=True)

    async def close(self) -> None:
        """Write unsaved sessions to disk. Sessions that are still answering keep their last snapshot."""
        if self._behind is not None:
            self._behind.cancel()
            with suppress(asyncio.CancelledError):
                await self._behind
        for entry in list(self.entries.values()):
            if entry.lock.locked():
                continue
            async with entry.lock:
                if entry.kind == "session":
                    await self.save(entry)
                    # The time of last use may have changed without a new revision.
                    with suppress(OutOfSpace):
                        await self._record(entry)
                else:
                    await self.remove(entry)
        if self.ledger is not None:
            self.ledger.close()
