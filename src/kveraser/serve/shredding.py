"""Deleting files so that what they held is not left on the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CHUNK = 1 << 20


def shred(path: Path) -> None:
    """Overwrite a file and delete it.

    Journaling file systems and flash may keep what was there: encrypt such disks.
    """
    with suppress(OSError), open(path, "r+b", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0:
            left -= file.write(bytes(min(left, CHUNK)))
        os.fsync(file.fileno())
    with suppress(OSError):
        path.unlink()
