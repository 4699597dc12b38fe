"""Some random scripts of edits; `python -m tests.stress.edits` runs thousands."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.stress.edits import OPERATIONS, backbones, run_script


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_scripts_equal_their_reference(tmp_path: Path) -> None:
    made, counts = backbones(), Counter[str]()
    for seed in range(9):
        counts += run_script(made[seed % len(made)], seed, 12, tmp_path)
    # Every operation has been done, and not only those that are always possible.
    assert all(counts[operation] for operation in OPERATIONS) and counts["recomputed"] > 10


def test_states_are_compared(tmp_path: Path) -> None:
    # A fresh prefill runs other batches, so that no state is the same to the last bit.
    with pytest.raises(AssertionError):
        for seed in range(9):
            run_script(backbones()[0], seed, 12, tmp_path, limit=0.0)
