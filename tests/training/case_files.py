"""Case files for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kveraser.training.cases import Case


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    """Write a JSON Lines case file."""
    path.write_text("".join(case.to_json() + "\n" for case in cases), "utf-8")
