"""`kveraser bench variants`: small erasers that differ in one choice each, trained on the same cases, side by side.

All of a case that does not depend on the eraser is prepared once and serves every variant, so that a table of twenty
trainings costs little more than their steps. Every variant sees the same cases in the same order, once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kveraser.audit import fidelity_interval
from kveraser.backbone import Backbone
from kveraser.eraser import SPAN_BIAS, Eraser, EraserSettings
from kveraser.errors import InputError
from kveraser.training.cases import TokenizedCase
from kveraser.training.distill import (
    Objective,
    PreparedBatch,
    case_losses,
    edited_log_probabilities,
    prepare,
    token_kl,
)
from kveraser.training.loop import learning_rate
from kveraser.training.recipe import OptimizerSettings

BOTH = "both stages"
UNSEEN = -1e4
"""A span bias under which the erased span is not seen at all."""


@dataclass(frozen=True)
class Variant:
    """One eraser of the table.

    Attributes:
        settings: layout and repair.
        trained_on: `stage 1`, `stage 2`, `both stages` (each gives half of the cases), or `nothing`: the training-free
            method of the same cost, `repair` or `shift`.
    """

    name: str
    settings: EraserSettings
    objective: Objective = "kl"
    rank: int = 16
    trained_on: str = BOTH


def _suffix(repair: int, per_span: float = 0.0, echoes: float = 0.0) -> EraserSettings:
    return EraserSettings("suffix", repair, per_span, echoes=echoes)


VARIANTS: tuple[Variant, ...] = (
    *(Variant(f"repair({width})", _suffix(width), trained_on="nothing") for width in (8, 32)),
    Variant("repair(32, per_span=1.0)", _suffix(32, 1.0), trained_on="nothing"),
    Variant("follow(8, 0, 0.5)", _suffix(8, 0.0, 0.5), trained_on="nothing"),
    Variant("follow(32, 0.25, 0.75)", _suffix(32, 0.25, 0.75), trained_on="nothing"),
    *(Variant(f"keep, repair {width}", EraserSettings("keep", width)) for width in (0, 8, 32)),
    *(Variant(f"closed, repair {width}", EraserSettings("closed", width)) for width in (0, 8, 32)),
    *(Variant(f"compact of 16, repair {width}", EraserSettings("compact", width, slots=16)) for width in (8, 32)),
    Variant("suffix 8", _suffix(8)),
    Variant("suffix 32 + span / 4, echoes 3 span / 4", _suffix(32, 0.25, 0.75)),
    *(Variant(f"suffix 8, {stage} only", _suffix(8), trained_on=stage) for stage in ("stage 1", "stage 2")),
    Variant("suffix 8, ce", _suffix(8), "ce"),
    Variant("suffix 8, both objectives", _suffix(8), "both"),
    *(Variant(f"suffix 8, rank {rank}", _suffix(8), rank=rank) for rank in (4, 64)),
    Variant("keep, repair 0, ce", EraserSettings("keep"), "ce"),
)


@dataclass(frozen=True)
class VariantRow:
    """One variant on the held-out cases.

    Attributes:
        samples: cases that it was trained on; `seconds` of training.
        kl: nats per answer token on influence questions; `fidelity` with its 95% bootstrap interval over cases.
        leak: log-probability per token of the erased text above the exact reference's, in nats.
        no_harm: KL on questions that the span never touched.
        answers: mean log-probability per token of the forced answers on influence questions; `answers_exact` the
            reference's. Above it, an eraser prompts the task instead of erasing.
        parameters: trainable numbers.
        tokens: mean tokens that an erase runs through the backbone.
    """

    variant: str
    layout: str
    repair: int
    repair_per_span: float
    echoes: float
    slots: int
    objective: str
    rank: int
    trained_on: str
    samples: int
    seconds: float
    parameters: int
    tokens: float
    kl: float
    fidelity: float | None
    fidelity_low: float | None
    fidelity_high: float | None
    leak: float | None
    no_harm: float | None
    answers: float
    answers_exact: float


def run(
    backbone: Backbone,
    stage1: Sequence[TokenizedCase],
    stage2: Sequence[TokenizedCase],
    held_out: Sequence[TokenizedCase],
    variants: Sequence[Variant],
    optimizer: OptimizerSettings,
    seed: int,
    done: Sequence[VariantRow] = (),
    progress: Callable[[str, float], None] | None = None,
    finished: Callable[[VariantRow], None] | None = None,
) -> list[VariantRow]:
    """Train and measure `variants`, skipping those in `done`; `finished` gets each row as it is ready.

    Raises:
        InputError: stages of unequal size, or too few cases for a step.
    """
    if len(stage1) != len(stage2) or len(stage1) < optimizer.cases_per_step or not held_out:
        raise InputError(
            f"{len(stage1)} and {len(stage2)} cases, {len(held_out)} held out: give equally many of both stages, at "
            f"least {optimizer.cases_per_step}, and held-out ones"
        )
    progress = progress or (lambda _step, _share: None)
    rows = list(done)
    waiting = [variant for variant in variants if variant.name not in {row.variant for row in rows}]
    if not waiting:
        return rows
    cases = [*stage1, *stage2, *held_out]
    prepared = []
    for index, case in enumerate(cases):
        progress(f"preparing case {index + 1} of {len(cases)}", 0.2 * index / len(cases))
        prepared.append(prepare(backbone, [case], measure_unerased=True))
    first, second = prepared[: len(stage1)], prepared[len(stage1) : len(stage1) + len(stage2)]
    half = len(stage1) // 2
    training = {"nothing": [], "stage 1": first, "stage 2": second, BOTH: [*first[:half], *second[: len(first) - half]]}
    for index, variant in enumerate(waiting):
        progress(variant.name, 0.2 + 0.8 * index / len(waiting))
        eraser = Eraser.untrained(backbone.model, variant.rank, 2 * variant.rank, variant.settings, seed)
        backbone.eraser = eraser
        started = time.perf_counter()
        if variant.trained_on == "nothing":
            eraser.extras[SPAN_BIAS].fill_(UNSEEN)
        _train(backbone, eraser, variant, training[variant.trained_on], optimizer)
        seconds = time.perf_counter() - started
        rows.append(_measure(backbone, variant, prepared[-len(held_out) :], len(training[variant.trained_on]), seconds))
        if finished is not None:
            finished(rows[-1])
    return rows


def _train(
    backbone: Backbone,
    eraser: Eraser,
    variant: Variant,
    training: Sequence[PreparedBatch],
    settings: OptimizerSettings,
) -> None:
    parameters = list(eraser.parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(bool(training))
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = len(training) // settings.cases_per_step
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, step / steps)
        for batch in training[step * settings.cases_per_step : (step + 1) * settings.cases_per_step]:
            loss = case_losses(backbone, batch, variant.settings, variant.objective, 1.0).sum()
            (loss / settings.cases_per_step).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _measure(
    backbone: Backbone, variant: Variant, held_out: Sequence[PreparedBatch], samples: int, seconds: float
) -> VariantRow:
    sums: dict[str, float] = {}
    edited_sums, unerased_sums, tokens_run, influenced = [], [], [], 0
    for batch in held_out:
        case = batch.cases[0]
        edited = edited_log_probabilities(backbone, batch, variant.settings)
        answers = torch.tensor([token for _, answer in case.queries for token in answer], device=edited.device)
        kinds = [kind for kind, (_, answer) in zip(case.kinds, case.queries, strict=True) for _ in answer]
        assert batch.unerased is not None
        columns = {
            "kl": token_kl(batch.teacher, edited),
            "unerased": batch.unerased,
            "edited": edited.gather(1, answers[:, None])[:, 0],
            "exact": batch.teacher.gather(1, answers[:, None])[:, 0],
            "tokens": torch.ones(len(answers), device=edited.device),
        }
        own: dict[str, float] = {}
        for kind in ("influence", "leak", "no_harm"):
            places = torch.tensor([one == kind for one in kinds], device=edited.device)
            for name, column in columns.items():
                own[f"{kind} {name}"] = float(column[places].double().sum())
        for name, value in own.items():
            sums[name] = sums.get(name, 0.0) + value
        edited_sums.append(own["influence kl"])
        unerased_sums.append(own["influence unerased"])
        influenced += int(own["influence tokens"])
        steered = {"suffix": 0, "compact": min(variant.settings.slots, len(case.span))}
        window = min(sum(variant.settings.widths(len(case.span))), len(case.suffix))
        tokens_run.append(window + steered.get(variant.settings.layout, len(case.span)))
    fidelity, low, high = fidelity_interval(edited_sums, unerased_sums, influenced)

    def mean(kind: str, name: str) -> float | None:
        tokens = sums[f"{kind} tokens"]
        return sums[f"{kind} {name}"] / tokens if tokens else None

    leak, leak_exact = mean("leak", "edited"), mean("leak", "exact")
    return VariantRow(
        variant=variant.name,
        layout=variant.settings.layout,
        repair=variant.settings.repair,
        repair_per_span=variant.settings.repair_per_span,
        echoes=variant.settings.echoes,
        slots=variant.settings.slots,
        objective=variant.objective,
        rank=variant.rank,
        trained_on=variant.trained_on,
        samples=samples,
        seconds=seconds,
        parameters=sum(parameter.numel() for parameter in backbone.require_eraser().parameters().values()),
        tokens=sum(tokens_run) / len(tokens_run),
        kl=mean("influence", "kl") or math.nan,
        fidelity=fidelity,
        fidelity_low=low,
        fidelity_high=high,
        leak=None if leak is None or leak_exact is None else leak - leak_exact,
        no_harm=mean("no_harm", "kl"),
        answers=mean("influence", "edited") or math.nan,
        answers_exact=mean("influence", "exact") or math.nan,
    )


def to_json(rows: Sequence[VariantRow], backbone: Backbone, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows with all that is needed to read them."""
    from kveraser.bench.environment import environment

    return {
        "command": "kveraser bench variants",
        "settings": settings,
        **environment(backbone),
        "rows": [asdict(row) for row in rows],
    }
