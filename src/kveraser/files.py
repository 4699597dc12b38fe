"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; what was written there takes its place when the block ends without an error.

    It is on the disk before that, so that after a crash of the machine one of the two files is there and whole.

    Raises:
        OSError: it can't be written; an earlier file stays.
    """
    temporary = target.with_name(f".{target.name}.{token_hex(4)}.part")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink()
