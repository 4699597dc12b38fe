"""The training loop: trains an eraser in one process or several, and resumes bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kveraser.errors import InputError
from kveraser.measure.audit import fidelity_interval
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import Eraser
from kveraser.training.batches import Order, batches, tokenized
from kveraser.training.cases import TokenizedCase, read_cases
from kveraser.training.checkpoint import TrainingError, read_checkpoint, write_checkpoint
from kveraser.training.distill import (
    Prefills,
    PreparedBatch,
    case_losses,
    check_head,
    edited_log_probabilities,
    prepare,
    shared_prefills,
    token_kl,
)
from kveraser.training.linear import pack_linear_layers
from kveraser.training.log import Log, Progress
from kveraser.training.prepared import PreparedStore
from kveraser.training.processes import Processes
from kveraser.training.recipe import OptimizerSettings, Recipe, as_recipe

CHECKPOINT, BEST, PREPARED = "checkpoint.pt", "best", "prepared"

KEPT_BYTES = 2 << 30
"""Limit of prepared held-out cases in memory; cases beyond it are prepared again in every evaluation."""


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: int | None = None,
) -> Path:
    """Train an eraser and return the folder of the best one, in plain PEFT format.

    Launched as several processes (`accelerate launch -m kveraser train RECIPE`, `torchrun`), each trains on its share
    of every step's cases; losses equal those of a single process up to rounding. All write to one output folder.

    Args:
        recipe: a recipe, its fields, or the path of its file.
        resume: continue from the checkpoint in the recipe's output folder, if there is one.
        progress: called after every optimizer step, in the main process.
        stop: end after this many steps, as if interrupted; the learning rate schedule still spans all steps.

    Raises:
        InputError: a malformed recipe, or cases that are missing, malformed or too few.
        ContextLengthError: a case is longer than the backbone allows.
        TrainingError: NaN loss (the message names the case, the last checkpoint is kept), or a checkpoint of another
            recipe.
    """
    run = _Run(as_recipe(recipe), resume)
    try:
        run.go(progress or (lambda _: None), stop)
    finally:
        if run.log is not None:
            run.log.close()
    return run.folder / BEST


def learning_rate(settings: OptimizerSettings, step: int, done: float) -> float:
    """Learning rate of a step, counted from 0, after the fraction `done` of the run."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    fall = 1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * warm * (settings.final_fraction + (1 - settings.final_fraction) * fall)


class _Run:
    def __init__(self, recipe: Recipe, resume: bool) -> None:
        self.recipe, self.folder = recipe, Path(recipe.output)
        self.processes = Processes()
        self.backbone = Backbone.load(
            recipe.backbone,
            device=str(self.processes.device),
            dtype=None if recipe.precision == "auto" else recipe.precision,
            eraser=None,
        )
        check_head(self.backbone)
        self.settings = recipe.settings
        training, self.evaluating = self._cases()
        optimizer = recipe.optimizer
        self.order = Order(training, recipe.seed, optimizer.cases_per_step, optimizer.cases_per_batch)
        self.steps = self.order.steps_per_epoch * recipe.epochs
        self.eraser = self._eraser()
        self.processes.shard(self.backbone)
        if not self.processes.lockstep:
            pack_linear_layers(self.backbone.model, self.processes.count)
        self.parameters = list(self.eraser.parameters().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
        )
        self.step, self.best, self.seconds = 0, math.inf, 0.0
        self.kept: dict[int, PreparedBatch] = {}
        # In lockstep, batches depend on the processes, and idle ones repeat a batch: nothing is stored.
        stored = recipe.prepared_gigabytes if recipe.epochs > 1 and not self.processes.lockstep else 0
        self.store = PreparedStore(self.folder / PREPARED, int(stored * 1e9 / self.processes.count))
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and (self.folder / CHECKPOINT).is_file():
            self._restore()
        self.log = Log(self.folder, self.step) if self.processes.main else None

    def _cases(self) -> tuple[list[TokenizedCase], list[TokenizedCase]]:
        """Read training and held-out cases."""
        recipe, multiple = self.recipe, self.recipe.optimizer.shape_multiple
        wanted, per_step = recipe.evaluation.cases, recipe.optimizer.cases_per_step
        cases = list(tokenized(self.backbone, read_cases(recipe.data), multiple))
        if recipe.evaluation.data is None:
            if len(cases) < wanted + per_step:
                raise InputError(
                    f"{recipe.data} has {len(cases)} cases, but {wanted} are held out and a step takes {per_step}: "
                    "build more, or lower evaluation.cases"
                )
            return cases[:-wanted], cases[-wanted:]
        if len(cases) < per_step:
            raise InputError(f"{recipe.data} has {len(cases)} cases, but a step takes {per_step}: build more")
        # Held-out cases are never cut.
        held_out = list(tokenized(self.backbone, islice(read_cases(recipe.evaluation.data), wanted)))
        if len(held_out) < wanted:
            raise InputError(
                f"{recipe.evaluation.data} has {len(held_out)} cases, but evaluation.cases is {wanted}: "
                "build more, or lower it"
            )
        return cases, held_out

    def _eraser(self) -> Eraser:
        recipe = self.recipe
        if recipe.initial is not None:
            eraser = self.backbone.load_eraser(recipe.initial)
            trained, wanted = eraser.settings, self.settings
            if (trained.layout, trained.slots) != (wanted.layout, wanted.slots) and trained.slots + wanted.slots:
                raise InputError(
                    f"initial {recipe.initial} is an eraser of layout {trained.layout} with {trained.slots} slots, the "
                    f"recipe asks for {wanted.layout} with {wanted.slots}: keep both, or start without initial"
                )
            eraser.settings = wanted
        else:
            eraser = Eraser.untrained(
                self.backbone.model, recipe.adapter.rank, recipe.adapter.alpha, self.settings, recipe.seed
            )
            self.backbone.eraser = eraser
        for parameter in eraser.parameters().values():
            # In bfloat16, an update would be rounded away.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return eraser

    def go(self, progress: Callable[[Progress], None], stop: int | None) -> None:
        if self.step == 0:
            # The start is the first best eraser.
            self._evaluate()
        last_checkpoint = started = time.monotonic()
        earlier = self.seconds
        while not self._finished() and (stop is None or self.step < stop):
            began = time.monotonic()
            rate = learning_rate(self.recipe.optimizer, self.step, self._done())
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            cases = self.order.cases_of(self.step)
            loss = self._gradients(cases, earlier + began - started)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            spent = time.monotonic() - began
            due = self.step % self.recipe.evaluation.every_steps == 0 or self._finished()
            kl, fidelity, no_harm = self._evaluate() if due else (None, None, None)
            line = Progress(
                step=self.step,
                steps=self.steps,
                loss=loss,
                learning_rate=rate,
                tokens_per_second=sum(_tokens(case) for case in cases) / spent,
                seconds_left=self._seconds_left(earlier + time.monotonic() - started),
                kl=kl,
                fidelity=fidelity,
                no_harm=no_harm,
            )
            if self.log is not None:
                self.log.write(line)
                progress(line)
            if due or time.monotonic() - last_checkpoint > 60 * self.recipe.checkpoint_minutes:
                self._save()
                last_checkpoint = time.monotonic()
        self._save()
        if self._finished() and self.processes.main:
            self.store.clear()

    def _done(self) -> float:
        """Fraction of the run that is done, by steps or by time."""
        limit = self.recipe.max_minutes
        return min(1.0, max(self.step / self.steps, 0.0 if limit is None else self.seconds / (60 * limit)))

    def _finished(self) -> bool:
        return self._done() == 1

    def _seconds_left(self, seconds: float) -> float:
        left = (self.steps - self.step) * seconds / self.step
        limit = self.recipe.max_minutes
        return left if limit is None else max(0.0, min(left, 60 * limit - seconds))

    def _gradients(self, cases: Sequence[TokenizedCase], seconds: float) -> float:
        """Compute the gradients of the mean loss of a step's cases over all processes, and return that loss.

        `seconds` since the start of the run are taken from the main process in all processes.
        """
        recipe = self.recipe
        losses = torch.zeros(len(cases) + 1, dtype=torch.float64)
        losses[-1] = seconds if self.processes.main else 0.0
        own = [cases[place] for place in self.processes.share(len(cases))]
        prefills = {} if self.processes.lockstep else shared_prefills(self.backbone, own)
        for places, weight in self._shares(cases):
            batch = self._prepared([cases[place] for place in places], prefills)
            loss = case_losses(self.backbone, batch, self.settings, recipe.objective, recipe.no_harm_weight)
            (loss.sum() * (weight / len(cases))).backward()
            if weight:
                losses[places] = loss.detach().double().cpu()
        losses = self.processes.sum(losses.to(self.processes.device)).cpu()
        broken = [place for place, loss in enumerate(losses[:-1].tolist()) if not math.isfinite(loss)]
        if broken:
            raise TrainingError(
                f"the loss of case {cases[broken[0]].id} at step {self.step + 1} is {float(losses[broken[0]])}: the "
                f"last good checkpoint is in {self.folder}; lower the learning rate in a new recipe whose initial is "
                f"the eraser in {self.folder / BEST}"
            )
        self.processes.sum_gradients(self.parameters)
        self.seconds = float(losses[-1])
        return float(losses[:-1].mean())

    def _prepared(self, cases: Sequence[TokenizedCase], prefills: Prefills) -> PreparedBatch:
        """Load the prepared batch of these cases, or prepare and store it."""
        batch = self.store.load(self.backbone, cases)
        if batch is None:
            batch = prepare(self.backbone, cases, prefills=prefills)
            self.store.save(self.backbone, batch)
        return batch

    def _shares(self, cases: Sequence[TokenizedCase]) -> list[tuple[list[int], float]]:
        """Batches of this process among `cases`, as indices, each with its weight."""
        size, processes = self.recipe.optimizer.cases_per_batch, self.processes

        def dealt(index: int) -> list[list[int]]:
            own = processes.share(len(cases), index)
            return [[own[place] for place in batch] for batch in batches([cases[place] for place in own], size)]

        own = [(batch, 1.0) for batch in dealt(processes.index)]
        if processes.lockstep:
            # All processes must run equally many passes: fewer batches are filled up with one of weight zero.
            longest = max(len(dealt(index)) for index in range(processes.count))
            idle = own[0][0] if own else [0]
            own += [(idle, 0.0)] * (longest - len(own))
        return own

    def _evaluate(self) -> tuple[float, float | None, float | None]:
        """Evaluate on the held-out cases and save the eraser if it is the best.

        Returns:
            KL in nats per answer token, fidelity, and KL of the no-harm queries.
        """
        # One row per case: KL sums of edited and unerased cache, tokens, KL sum and tokens of the no-harm queries.
        sums = torch.zeros(len(self.evaluating), 5, dtype=torch.float64)
        for places, weight in self._shares(self.evaluating):
            batch = self._held_out(places)
            with torch.no_grad():
                edited = token_kl(batch.teacher, edited_log_probabilities(self.backbone, batch, self.settings))
            harmless = batch.no_harm.double()
            assert batch.unerased is not None
            columns = (edited, batch.unerased, torch.ones_like(harmless), edited * harmless, harmless)
            rows = [part.double().sum(0) for part in torch.stack(columns, dim=1).split(batch.answers)]
            if weight:
                sums[places] = torch.stack(rows).cpu()
        sums = self.processes.sum(sums.to(self.processes.device)).cpu()
        edited_sum, _, tokens, harm, harmless_tokens = sums.sum(0).tolist()
        kl = edited_sum / tokens
        if kl < self.best:
            self.best = kl
            if self.processes.main:
                self.eraser.save_pretrained(self.folder / BEST)
        fidelity, _, _ = fidelity_interval(sums[:, 0].tolist(), sums[:, 1].tolist(), int(tokens))
        return kl, fidelity, harm / harmless_tokens if harmless_tokens else None

    def _held_out(self, places: list[int]) -> PreparedBatch:
        if places[0] in self.kept:
            return self.kept[places[0]]
        batch = prepare(self.backbone, [self.evaluating[place] for place in places], measure_unerased=True)
        held = sum(other.nbytes for other in self.kept.values())
        if not self.processes.lockstep and held + batch.nbytes <= KEPT_BYTES:
            self.kept[places[0]] = batch
        return batch

    def _save(self) -> None:
        if not self.processes.main:
            return
        state = {
            "recipe": self.recipe.fingerprint,
            "step": self.step,
            "best": self.best,
            "seconds": self.seconds,
            "adapter": {name: parameter.detach() for name, parameter in self.eraser.parameters().items()},
            "optimizer": self.optimizer.state_dict(),
        }
        write_checkpoint(self.folder / CHECKPOINT, state)

    def _restore(self) -> None:
        state = read_checkpoint(self.folder / CHECKPOINT, self.recipe.fingerprint, self.processes.device)
        own = self.eraser.parameters()
        with torch.no_grad():
            for name, value in state["adapter"].items():
                own[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]


def _tokens(case: TokenizedCase) -> int:
    return case.tokens + sum(len(prompt) + len(answer) for prompt, answer in case.queries)
