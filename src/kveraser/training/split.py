"""Which passages are for training and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "heldout"]

HELD_OUT = 10
"""One passage in so many is held out."""


def split_passages(passages: Sequence[str], split: Split) -> list[str]:
    """The passages of a split, in their order: a passage is held out when the SHA-256 of its text divides by ten.

    It hangs on the text alone, so a passage is on the same side in every corpus that holds it.
    """

    def held_out(passage: str) -> bool:
        return int.from_bytes(hashlib.sha256(passage.encode()).digest()) % HELD_OUT == 0

    return [passage for passage in passages if held_out(passage) == (split == "heldout")]
