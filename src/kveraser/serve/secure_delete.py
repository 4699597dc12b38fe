"""Deletion of files with their contents overwritten."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CHUNK = 1 << 20


def secure_delete(path: Path) -> None:
    """Overwrite a file with zeros and delete it. A missing file is ignored.

    Journaling file systems and flash storage may keep the old contents: encrypt such disks.
    """
    with suppress(OSError), open(path, "r+b", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0:
            left -= file.write(bytes(min(left, CHUNK)))
        os.fsync(file.fileno())
    with suppress(OSError):
        path.unlink()
