"""Checkpoints: all that a run needs to go on as if it had never stopped, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kveraser.errors import KVEraserError
from kveraser.files import replacing


class TrainingError(KVEraserError):
    """Training can't go on: NaN loss, a full disk, or a checkpoint that does not belong to the recipe."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values by temporary name and atomic rename.

    Raises:
        TrainingError: they can't be written; an earlier checkpoint stays.
    """
    try:
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:
        raise TrainingError(
            f"can't write a checkpoint to {path.parent} ({error}): free space and resume; the earlier one stays"
        ) from error


def read_checkpoint(path: Path, fingerprint: str, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of the recipe with this fingerprint.

    Raises:
        TrainingError: it can't be read, or another recipe wrote it.
    """
    try:
        # Tensors and plain values only: a checkpoint can run no code.
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:
        raise TrainingError(
            f"{path} is not a checkpoint ({type(error).__name__}): train without --resume, or copy the file again"
        ) from error
    if state["recipe"] != fingerprint:
        raise TrainingError(f"{path} was written by another recipe: resume with that one, or choose another output")
    return state
