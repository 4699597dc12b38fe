"""The training loop: one eraser, one case file, resumable to the bit."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kveraser.audit import fidelity_interval
from kveraser.backbone import Backbone
from kveraser.eraser import Eraser, EraserSettings
from kveraser.errors import InputError, KVEraserError
from kveraser.train.cases import TokenizedCase, read_cases, tokenize
from kveraser.train.distill import PreparedCase, case_loss, edited_log_probabilities, prepare, token_kl
from kveraser.train.recipe import Recipe

CHECKPOINT, LOG, BEST = "checkpoint.pt", "log.jsonl", "best"


class TrainingError(KVEraserError):
    """Training can't go on: NaN loss, or a checkpoint that does not belong to the recipe."""


@dataclass(frozen=True)
class Progress:
    """One line of the log, after an optimizer step.

    Attributes:
        step: optimizer steps done.
        steps: in all.
        loss: mean over the step's cases.
        tokens_per_second: context and answer tokens of the step's cases over its time.
        seconds_left: at the pace so far.
        kl, fidelity: of the held-out cases, where this step was evaluated.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds_left: float
    kl: float | None = None
    fidelity: float | None = None


def train(
    recipe: Recipe, resume: bool = False, progress: Callable[[Progress], None] | None = None, stop: int | None = None
) -> Path:
    """Train an eraser and return the folder of the best one, in plain PEFT format.

    Args:
        resume: go on from the checkpoint in the recipe's output folder, if there is one.
        progress: called after every optimizer step.
        stop: end after this many steps, as if interrupted (the schedule still spans them all).

    Raises:
        InputError: cases missing, malformed or too few.
        ContextLengthError: a case is longer than the backbone allows.
        TrainingError: NaN loss, naming the case; the last checkpoint stays. Or a checkpoint of another recipe.
    """
    run = _Run(recipe, resume)
    with torch.random.fork_rng(devices=[]):
        run.go(progress or (lambda _: None), stop)
    return run.folder / BEST


class _Run:
    def __init__(self, recipe: Recipe, resume: bool) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output)
        self.backbone = Backbone.load(recipe.backbone)
        self.settings = EraserSettings(recipe.layout, recipe.repair)
        cases = [tokenize(self.backbone, case) for case in read_cases(recipe.data)]
        held_out = recipe.evaluation.cases
        if len(cases) < held_out + recipe.optimizer.cases_per_step:
            raise InputError(
                f"{recipe.data} has {len(cases)} cases, but {held_out} are held out and a step takes "
                f"{recipe.optimizer.cases_per_step}: build more, or lower evaluation.cases"
            )
        for case in cases:
            self.backbone.check_room(0, case.tokens + max(len(p) + len(a) for p, a in case.queries))
        self.training, self.evaluating = cases[:-held_out], cases[-held_out:]
        self.steps_per_epoch = len(self.training) // recipe.optimizer.cases_per_step
        self.steps = self.steps_per_epoch * recipe.epochs
        self.eraser = self._eraser()
        self.parameters = list(self.eraser.parameters().values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        optimizer = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
        )
        self.step, self.best, self.seconds = 0, math.inf, 0.0
        self.prepared: list[PreparedCase] | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and (self.folder / CHECKPOINT).is_file():
            self._restore()
        else:
            (self.folder / LOG).unlink(missing_ok=True)

    def _eraser(self) -> Eraser:
        recipe = self.recipe
        if recipe.initial is not None:
            eraser = self.backbone.load_eraser(recipe.initial)
            eraser.settings = self.settings
        else:
            eraser = Eraser.untrained(
                self.backbone.model, recipe.adapter.rank, recipe.adapter.alpha, self.settings, recipe.seed
            )
            self.backbone.eraser = eraser
        return eraser

    def go(self, progress: Callable[[Progress], None], stop: int | None) -> None:
        last_checkpoint = time.monotonic()
        while self.step < self.steps and (stop is None or self.step < stop):
            started = time.monotonic()
            rate = self._set_learning_rate()
            cases = self._cases_of(self.step)
            loss = sum(self._accumulate(case, 1 / len(cases)) for case in cases)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            spent = time.monotonic() - started
            self.seconds += spent
            due = self.step % self.recipe.evaluation.every_steps == 0 or self.step == self.steps
            kl, fidelity = self._evaluate() if due else (None, None)
            line = Progress(
                step=self.step,
                steps=self.steps,
                loss=loss,
                learning_rate=rate,
                tokens_per_second=sum(_tokens(case) for case in cases) / spent,
                seconds_left=(self.steps - self.step) * self.seconds / self.step,
                kl=kl,
                fidelity=fidelity,
            )
            self._log(line)
            progress(line)
            if due or time.monotonic() - last_checkpoint > 60 * self.recipe.checkpoint_minutes:
                self._save()
                last_checkpoint = time.monotonic()
        self._save()

    def _cases_of(self, step: int) -> Sequence[TokenizedCase]:
        """The cases of a step: a function of seed and step alone, so that a resumed run sees the same ones."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.training)))
        random.Random(f"{self.recipe.seed}/{epoch}").shuffle(order)
        size = self.recipe.optimizer.cases_per_step
        return [self.training[index] for index in order[place * size : (place + 1) * size]]

    def _set_learning_rate(self) -> float:
        settings = self.recipe.optimizer
        warm = min(1.0, (self.step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        done = self.step / max(1, self.steps)
        fall = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        rate = settings.learning_rate * warm * (settings.final_fraction + (1 - settings.final_fraction) * fall)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _accumulate(self, case: TokenizedCase, share: float) -> float:
        recipe = self.recipe
        loss = case_loss(
            self.backbone, prepare(self.backbone, case), self.settings, recipe.objective, recipe.no_harm_weight
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss of case {case.id} at step {self.step + 1} is {value}: the last good checkpoint is in "
                f"{self.folder}; resume with a lower learning rate in a new recipe that starts from it"
            )
        (loss * share).backward()
        return value * share

    def _evaluate(self) -> tuple[float, float | None]:
        """KL of the held-out cases, nats per answer token, and their fidelity; a new best eraser is written."""
        with torch.no_grad():
            if self.prepared is None:
                self.prepared = [prepare(self.backbone, case, measure_unerased=True) for case in self.evaluating]
            sums = []
            for prepared in self.prepared:
                edited = edited_log_probabilities(self.backbone, prepared, self.settings)
                sums.append(float(token_kl(prepared.teacher, edited).sum()))
            tokens = sum(len(prepared.teacher) for prepared in self.prepared)
        kl = sum(sums) / tokens
        if kl < self.best:
            self.best = kl
            self.eraser.save_pretrained(self.folder / BEST)
        fidelity, _, _ = fidelity_interval(sums, [prepared.unerased or 0.0 for prepared in self.prepared], tokens)
        return kl, fidelity

    def _log(self, line: Progress) -> None:
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")

    def _save(self) -> None:
        state = {
            "recipe": self.recipe.fingerprint,
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "adapter": {name: parameter.detach() for name, parameter in self.eraser.parameters().items()},
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / f".{CHECKPOINT}.part"
        try:
            torch.save(state, temporary)
            os.replace(temporary, self.folder / CHECKPOINT)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise TrainingError(
                f"can't write a checkpoint to {self.folder} ({error}): free space and resume; the earlier one stays"
            ) from error

    def _restore(self) -> None:
        # Tensors and plain values only: a checkpoint can run no code.
        state: dict[str, Any] = torch.load(self.folder / CHECKPOINT, weights_only=True)
        if state["recipe"] != self.recipe.fingerprint:
            raise TrainingError(
                f"{self.folder / CHECKPOINT} was written by another recipe: "
                "resume with that one, or choose another output"
            )
        own = self.eraser.parameters()
        with torch.no_grad():
            for name, value in state["adapter"].items():
                own[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        kept = (self.folder / LOG).read_text("utf-8").splitlines()[: self.step] if (self.folder / LOG).is_file() else []
        (self.folder / LOG).write_text("".join(f"{line}\n" for line in kept), "utf-8")


def _tokens(case: TokenizedCase) -> int:
    return case.tokens + sum(len(prompt) + len(answer) for prompt, answer in case.queries)
