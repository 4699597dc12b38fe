"""Prepared batches on disk, so that later epochs skip the prefill and the exact reference."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kveraser.files import replacing
from kveraser.model.backbone import Backbone
from kveraser.training.cases import TokenizedCase
from kveraser.training.distill import PreparedBatch, log_probabilities

log = logging.getLogger(__name__)


class PreparedStore:
    """Prepared batches of one run, one file each, up to `limit_bytes`; 0 stores nothing.

    A file holds the states of the unerased contexts and the last hidden states of the exact reference. A case of 400
    tokens on SmolLM2-135M takes 18 MB in float32. Files of an interrupted run are reused.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0

    def load(self, backbone: Backbone, cases: Sequence[TokenizedCase]) -> PreparedBatch | None:
        """Load the batch of these cases; None if it is not stored or unreadable."""
        try:
            tensors = load_file(self._file(backbone, cases), device=str(backbone.device))
        except (OSError, SafetensorError):
            return None
        states = [(tensors[f"keys.{layer}"], tensors[f"values.{layer}"]) for layer in range((len(tensors) - 1) // 2)]
        hidden = tensors["hidden"]
        with torch.no_grad():
            teacher = log_probabilities(backbone, hidden)
        return PreparedBatch(tuple(cases), states, hidden, teacher)

    def save(self, backbone: Backbone, batch: PreparedBatch) -> None:
        """Store a batch. Beyond the limit or on a full disk, it is prepared again in the next epoch."""
        if not self.limit_bytes:
            return
        tensors = {"hidden": batch.hidden.cpu().contiguous()}
        for layer, (keys, values) in enumerate(batch.states):
            tensors |= {f"keys.{layer}": keys.cpu().contiguous(), f"values.{layer}": values.cpu().contiguous()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self.bytes + size > self.limit_bytes:
            return
        target = self._file(backbone, batch.cases)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(target) as temporary:
                save_file(tensors, temporary)
            self.bytes += size
        except (OSError, SafetensorError) as error:
            log.warning("can't store prepared batches in %s (%s): later epochs take longer", self.folder, error)
            self.limit_bytes = 0

    def clear(self) -> None:
        """Delete all stored batches."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.bytes = 0

    def _file(self, backbone: Backbone, cases: Sequence[TokenizedCase]) -> Path:
        made_of = json.dumps([backbone.fingerprint, [[c.prefix, c.span, c.suffix, c.queries] for c in cases]])
        return self.folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"
