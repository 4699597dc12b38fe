"""Checkpoints: the state of a run in one file, from which it resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kveraser.errors import KVEraserError
from kveraser.files import replacing


class TrainingError(KVEraserError):
    """Training can't continue: NaN loss, a full disk, or a checkpoint of another recipe."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values to a temporary file and rename it.

    Raises:
        TrainingError: the file can't be written; the earlier checkpoint is kept.
    """
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"can't write a checkpoint to {path.parent} ({error}): free space and resume; the earlier one is kept"
        ) from error


def read_checkpoint(path: Path, fingerprint: str, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of the recipe with this fingerprint.

    Raises:
        TrainingError: the file is unreadable, or belongs to another recipe.
    """
    try:
        # `weights_only`: a checkpoint can't run code.
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:
        raise TrainingError(
            f"{path} is not a checkpoint ({type(error).__name__}: {error}): train without --resume, or copy the file "
            "again"
        ) from error
    if state["recipe"] != fingerprint:
        raise TrainingError(f"{path} was written by another recipe: resume with that one, or choose another output")
    return state
