"""The train and held-out splits of a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from kveraser.errors import InputError
from kveraser.training.cases import CaseSizes

Split = Literal["train", "heldout"]

HELD_OUT = 10
"""One passage in ten is held out."""


def split_passages(passages: Sequence[str], split: Split) -> list[str]:
    """Select the passages of a split, in order.

    The SHA-256 of the text decides, so a passage is in the same split in every corpus.
    """

    def held_out(passage: str) -> bool:
        return int.from_bytes(hashlib.sha256(passage.encode()).digest()) % HELD_OUT == 0

    return [passage for passage in passages if held_out(passage) == (split == "heldout")]


def sufficient_passages(passages: Sequence[str], split: Split, sizes: CaseSizes, fewest: int) -> list[str]:
    """Select the passages of a split and check that cases of these sizes can be made of them.

    Raises:
        InputError: fewer than `fewest` passages, or fewer words than one case takes.
    """
    own = split_passages(passages, split)
    if len(own) < fewest:
        raise InputError(
            f"the corpus has {len(own)} passages in the {split} split (of {len(passages)}): give enough for {fewest} "
            "there (one passage in ten is held out)"
        )
    available, wanted = sum(len(passage.split()) for passage in own), sizes.context[1] + sizes.span[1]
    if available < wanted:
        raise InputError(
            f"the {split} split of the corpus has {available} words, a case takes up to {wanted}: give a longer corpus"
        )
    return own
