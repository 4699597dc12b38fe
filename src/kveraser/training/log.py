"""The log of a run: one JSON object per step, and curves for TensorBoard if it is installed."""

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
    """One line of the log, written after an optimizer step.

    Attributes:
        step: number of optimizer steps done.
        steps: number of steps of the run.
        loss: mean over the step's cases.
        tokens_per_second: context and query tokens of the step's cases in all processes, by the time of the step.
        seconds_left: estimate from the average pace, evaluations included.
        kl: KL of the held-out cases, nats per answer token; None if this step was not evaluated.
        fidelity: fidelity of the held-out cases.
        no_harm: KL of the held-out queries that do not depend on the span, if there are any.
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
    """Appends to the log in `folder` after step `step`. Lines of later steps, left by a killed run, are dropped."""

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
