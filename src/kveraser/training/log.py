"""The log of a run: a JSON object a step, and the same curves for TensorBoard where it is installed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kveraser.files import replacing

LOG, CURVES = "log.jsonl", "tensorboard"


@dataclass(frozen=True)
class Progress:
    """One line of the log, after an optimizer step.

    Attributes:
        step: optimizer steps done.
        steps: in all.
        loss: mean over the step's cases.
        tokens_per_second: context and answer tokens of the step's cases, over all processes and the step's time.
        seconds_left: at the pace so far, evaluations included.
        kl: of the held-out cases where this step was evaluated, nats per answer token, over all their queries.
        fidelity: of the same.
        no_harm: KL of those of their queries that the span never touched, where there are any.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    kl: float | None = None
    fidelity: float | None = None
    no_harm: float | None = None


class Log:
    """Appends to the log in `folder`, from step `step` on: lines of later steps, left by a killed run, are dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / LOG
        kept = self._path.read_text("utf-8").splitlines()[:step] if self._path.is_file() else []
        with replacing(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        self._curves: Any = None
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._curves = SummaryWriter(str(folder / CURVES), purge_step=step + 1)

    def write(self, line: Progress) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        if self._curves is not None:
            for name, value in asdict(line).items():
                if value is not None and name not in ("step", "steps", "seconds_left"):
                    self._curves.add_scalar(name, value, line.step)

    def close(self) -> None:
        """Flush the curves."""
        if self._curves is not None:
            self._curves.close()
