"""The durable record of sessions: the last revision that the server acknowledged to each session's owner.

A snapshot is served only at the revision in the ledger. Loss of or damage to the ledger makes sessions unavailable; it
never brings back an older state, because older snapshots are overwritten before a change is acknowledged.
"""

from __future__ import annotations

import sqlite3
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from kveraser.serve.errors import OutOfSpace, ServeError

CHECKPOINT_PAGES = 100
"""Pages in the write-ahead log at which SQLite copies them into the database."""


@dataclass(frozen=True)
class Acknowledged:
    """The state of one session as its owner knows it.

    Attributes:
        owner: digest of the API key that the session belongs to.
        state: `held`: it can be used; `gone`: it existed and can't be restored; `deleted`: the ledger drops it.
        revision: number of the last acknowledged change.
        digest: of the tokens and which of them are live.
        created, expires: in seconds since 1970; `ttl` in seconds from the last use.
        turn_open: whether appended text continues an open user turn.
        tokens, live_tokens, exact: as in the session's view, for lists.
    """

    id: str
    owner: str
    state: Literal["held", "gone", "deleted"]
    revision: int
    digest: str
    created: float
    expires: float
    ttl: float
    turn_open: bool
    tokens: int
    live_tokens: int
    exact: bool


RECORD = TypeAdapter(Acknowledged)


class Ledger:
    """An SQLite database with one record per session. Only one process can open it at a time.

    Args:
        path: of the database; created if it does not exist. Records with a wrong checksum are dropped, and a database
            that SQLite can't read is replaced by an empty one.

    Raises:
        ServeError: another process has it open, or it can't be read or created.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        try:
            try:
                self._database, self.records = _open(path)
            except sqlite3.DatabaseError as error:
                damaged = sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB
                if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in damaged:
                    raise
                for name in (path.name, f"{path.name}-wal", f"{path.name}-journal"):
                    path.with_name(name).unlink(missing_ok=True)
                self._database, self.records = _open(path)
        except (sqlite3.Error, OSError) as error:
            raise ServeError(
                f"the ledger {path} can't be opened ({error}): check the folder, and that no other server uses it"
            ) from error

    def append(self, record: Acknowledged) -> None:
        """Write a record; it is on disk when this returns.

        Raises:
            OutOfSpace: it can't be written; the ledger is unchanged.
        """
        text = RECORD.dump_json(record)
        with self._lock:
            try:
                if record.state == "deleted":
                    self._database.execute("DELETE FROM sessions WHERE id = ?", (record.id,))
                else:
                    self._database.execute(
                        "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", (record.id, text, zlib.crc32(text))
                    )
            except sqlite3.Error as error:
                raise OutOfSpace(f"the server can't record the session ({error}): free disk space") from error
            self.records.pop(record.id, None)
            if record.state != "deleted":
                self.records[record.id] = record

    def close(self) -> None:
        """Close the database, so that another process can open it."""
        with self._lock:
            self._database.close()


def _open(path: Path) -> tuple[sqlite3.Connection, dict[str, Acknowledged]]:
    """The database, locked against other processes, and its records in the order of their last change."""
    path.touch(mode=0o600)
    database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        for setting in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
            # A write, so that a read-only database is refused here.
            "user_version = 1",
        ):
            database.execute(f"PRAGMA {setting}")
        database.execute("CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, record BLOB, checksum INTEGER)")
        if database.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the integrity check failed")
        rows = database.execute(
            "SELECT CAST(record AS BLOB), CAST(checksum AS INTEGER) FROM sessions WHERE record NOT NULL ORDER BY rowid"
        )
        records = [RECORD.validate_json(text) for text, checksum in rows if zlib.crc32(text) == checksum]
        return database, {record.id: record for record in records}
    except BaseException:
        database.close()
        raise


__all__ = ["Acknowledged", "Ledger"]
