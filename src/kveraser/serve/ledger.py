"""What was acknowledged: for every session the revision that its owner was last told of, on disk before they are.

An append-only file of lines, each a checksum and a JSON record with a running number. A snapshot is only ever served at
the revision that the ledger ends with; whatever may have been lost of the ledger makes sessions gone, never older.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

from kveraser.serve.errors import OutOfSpace, ServeError

COMPACT_BYTES = 1 << 20
"""A ledger is written anew when it has grown by this much and to twice what it has to say."""


@dataclass(frozen=True)
class Acknowledged:
    """One session as its owner knows it.

    Attributes:
        owner: digest of the key that it belongs to.
        state: `gone`: it was there and can't be brought back; `deleted`: the ledger forgets it.
        revision: of its contents.
        digest: of its tokens and which of them are live.
        created, expires: in seconds since 1970; `ttl` in seconds from its last use.
        turn_open: whether its text goes on in an open user turn.
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


class Ledger:
    """The records in a file, the last one of every session. One process at a time has it open.

    Args:
        path: made if there is none. A torn last line is dropped: nobody was told of it. Where lines before the last are
            damaged or missing, sessions that are not recorded again behind them are gone.

    Raises:
        ServeError: another process has it open, or it can't be read or made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._file = _opened(path)
            self.records, whole, self._number = _read(self._file.read())
            self._size = self._compacted = whole
            self._cut()
            if self._number != len(self.records):
                with suppress(OSError):
                    self._compact()
        except OSError as error:
            raise ServeError(
                f"the ledger {path} can't be opened ({error}): check the folder, and that no other server uses it"
            ) from error

    def append(self, record: Acknowledged) -> None:
        """Put a record on disk; it is there when this returns.

        Raises:
            OutOfSpace: it can't be written; the ledger is as before.
        """
        with self._lock:
            line = _line(self._number, record)
            try:
                self._file.write(line)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                with suppress(OSError):
                    self._cut()
                raise OutOfSpace(f"the server can't record the session ({error}): free disk space") from error
            self._number += 1
            self._size += len(line)
            _enter(self.records, record)
            if self._size > self._compacted + max(COMPACT_BYTES, self._compacted):
                with suppress(OSError):
                    self._compact()

    def close(self) -> None:
        """Let another process open it."""
        with self._lock, suppress(OSError):
            self._file.close()

    def _cut(self) -> None:
        """Cut off what a write left unfinished."""
        self._file.seek(self._size)
        self._file.truncate()

    def _compact(self) -> None:
        """Write the last records alone to a new file, and put it in the place of the old one."""
        lines = [_line(number, record) for number, record in enumerate(self.records.values())]
        temporary = self.path.with_name(f".{self.path.name}.part")
        try:
            written = _opened(temporary, fresh=True)
            written.write(b"".join(lines))
            written.flush()
            os.fsync(written.fileno())
            os.replace(temporary, self.path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        with suppress(OSError):
            self._file.close()
        self._file, self._number = written, len(lines)
        self._size = self._compacted = sum(map(len, lines))


def _opened(path: Path, fresh: bool = False) -> IO[bytes]:
    """The file, unbuffered and locked against other processes."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), 0o600)
    file = os.fdopen(handle, "r+b", buffering=0)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        # Without file locks it is up to whoever starts the servers.
        pass
    except OSError:
        file.close()
        raise
    return file


def _line(number: int, record: Acknowledged) -> bytes:
    text = json.dumps({"number": number, **asdict(record)}, separators=(",", ":")).encode()
    return b"%08x " % zlib.crc32(text) + text + b"\n"


def _read(content: bytes) -> tuple[dict[str, Acknowledged], int, int]:
    """The last record of every session, the bytes of whole lines, and the number of the next line."""
    records: dict[str, Acknowledged] = {}
    whole = content.rfind(b"\n") + 1
    number = 0
    for line in content[:whole].splitlines():
        found = _parsed(line)
        if found is None or found[0] != number:
            # What stood here may have been a later revision of any session before it.
            records = {id: replace(record, state="gone") for id, record in records.items()}
        if found is not None:
            number = found[0]
            _enter(records, found[1])
        number += 1
    return records, whole, number


def _parsed(line: bytes) -> tuple[int, Acknowledged] | None:
    checksum, _, text = line.partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            return None
        values: dict[str, Any] = json.loads(text)
        return values["number"], Acknowledged(**{field.name: values[field.name] for field in fields(Acknowledged)})
    except (ValueError, KeyError, TypeError):
        return None


def _enter(records: dict[str, Acknowledged], record: Acknowledged) -> None:
    records.pop(record.id, None)
    if record.state != "deleted":
        records[record.id] = record


__all__ = ["Acknowledged", "Ledger"]
