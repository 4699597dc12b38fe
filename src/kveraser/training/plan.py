"""Estimate parameters, memory, steps and time of a recipe from the backbone's configuration and the cases.

The model is built on the meta device, so an 8B backbone can be planned on a laptop.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kveraser.errors import ContextLengthError, InputError
from kveraser.model.backbone import DEFAULT_BACKBONE, Backbone
from kveraser.steering.eraser import Eraser, EraserSettings
from kveraser.training.batches import trimmed
from kveraser.training.cases import Case, TokenizedCase, read_cases, tokenize
from kveraser.training.cost import CaseShape, ModelShape, Part, case_flops, case_shape, memory, model_shape
from kveraser.training.distill import case_losses, prepare
from kveraser.training.linear import COPIES, pack_linear_layers
from kveraser.training.recipe import Recipe

SAMPLED_CASES = 1000
"""Number of cases that are tokenized, evenly spread over the file; the longest one is added."""
TOKENS_PER_WORD = 1.35
"""For English text, if no tokenizer is available."""
GPU = "H100"
GPU_PEAK = {2: 989e12, 4: 67e12}
"""Peak FLOP/s of an H100 SXM (NVIDIA's data sheet, dense) by bytes per value: bfloat16 tensor cores and float32."""
GPU_UTILIZATION = 0.4
TIMED_PASSES = 3


@dataclass(frozen=True)
class Estimate:
    """Estimate for one device.

    Attributes:
        device: the device, and the source of its speed.
        precision: dtype of weights and states; adapter, optimizer and divergence are float32.
        memory: memory by part at the peak of the longest batch; the last row is the total.
        flops_per_second: measured on one case, or the data sheet's peak at a stated utilization, which small backbones
            and batches do not reach.
        seconds_per_step: mean time of a step.
        hours: time of the whole recipe on one device without evaluations, at most the recipe's limit.
    """

    device: str
    precision: str
    memory: list[Part]
    flops_per_second: float
    seconds_per_step: float
    hours: float


@dataclass(frozen=True)
class Plan:
    """Estimates for a recipe.

    Attributes:
        backbone: name in the recipe.
        parameters, trainable: number of parameters of the backbone and of the eraser.
        cases: number of training cases.
        steps: number of optimizer steps in all epochs.
        tokens_per_step, queries_per_step: means; tokens are those of contexts and queries.
        flops_per_step: mean FLOPs by phase of a step.
        longest: number of tokens of the longest case.
        exact_tokens: whether the backbone's tokenizer counted the tokens; else they are estimated from words.
        estimates: one per device.
    """

    backbone: str
    parameters: int
    trainable: int
    cases: int
    steps: int
    tokens_per_step: int
    queries_per_step: float
    flops_per_step: dict[str, float]
    longest: int
    exact_tokens: bool
    estimates: list[Estimate]


def plan(recipe: Recipe, config: str | None = None) -> Plan:
    """Plan a recipe without training.

    The weights are loaded to time one case on this machine, if they are local and take at most half of its memory.

    Args:
        config: folder with the backbone's `config.json` (and tokenizer), if the backbone itself is not available.

    Raises:
        InputError: no configuration, or cases that are missing, malformed or too few.
        UnsupportedModelError: the backbone's layers can't be edited exactly.
        ContextLengthError: a case is longer than the backbone allows.
    """
    source = config or recipe.backbone
    settings = recipe.settings
    shape = model_shape(load_config(source), recipe, settings)
    try:
        tokenizer = load_tokenizer(source)
    except InputError:
        # A folder with a configuration is enough for a plan.
        tokenizer = None
    count, sample = _sample(recipe.data)
    optimizer, held_out = recipe.optimizer, recipe.evaluation
    cut = [] if tokenizer is None else [tokenize(tokenizer, case) for case in sample]
    cut = [trimmed(case, optimizer.shape_multiple, 0) for case in cut]
    shapes = [case_shape(case) for case in cut] or [_estimated(case) for case in sample]
    longest = max(shapes, key=lambda one: one.tokens)
    if shape.positions is not None and longest.prefix + longest.span + longest.suffix > shape.positions:
        raise ContextLengthError(
            f"the longest case of {recipe.data} has {longest.tokens:.0f} tokens, but {recipe.backbone} has "
            f"{shape.positions} positions: build shorter cases"
        )
    per_step, per_batch = optimizer.cases_per_step, optimizer.cases_per_batch
    cases = count if held_out.data is not None else count - held_out.cases
    if cases < per_step:
        raise InputError(
            f"{recipe.data} has {count} cases: {count - cases} are held out and a step takes {per_step}, so build more"
        )
    steps = cases // per_step * recipe.epochs
    phases = [case_flops(shape, one, settings) for one in shapes]
    flops = {phase: per_step * sum(one[phase] for one in phases) / len(phases) for phase in phases[0]}
    width = 4 if recipe.precision == "float32" else 2
    rates = {f"{GPU} at {GPU_UTILIZATION:.0%}": (width, 1, GPU_PEAK[width] * GPU_UTILIZATION)}
    if cut and (backbone := _local_backbone(source, shape, recipe)) is not None:
        typical = sorted(zip(cut, shapes, strict=True), key=lambda pair: pair[1].tokens)[len(cut) // 2]
        width = backbone.model.dtype.itemsize
        copies = COPIES if pack_linear_layers(backbone.model) else 1
        speed = sum(case_flops(shape, typical[1], settings).values()) / _seconds(backbone, typical[0], recipe, settings)
        rates = {f"{backbone.device.type}, measured": (width, copies, speed), **rates}
    return Plan(
        backbone=recipe.backbone,
        parameters=shape.parameters,
        trainable=shape.trainable,
        cases=cases,
        steps=steps,
        tokens_per_step=round(per_step * sum(one.tokens for one in shapes) / len(shapes)),
        queries_per_step=per_step * sum(len(case.queries) for case in sample) / len(sample),
        flops_per_step=flops,
        longest=round(longest.tokens),
        exact_tokens=bool(cut),
        estimates=[
            Estimate(
                device=device,
                precision="bfloat16" if width == 2 else "float32",
                memory=memory(shape, longest, settings, width, min(per_batch, per_step), copies),
                flops_per_second=speed,
                seconds_per_step=sum(flops.values()) / speed,
                hours=min(steps * sum(flops.values()) / speed / 3600, (recipe.max_minutes or math.inf) / 60),
            )
            for device, (width, copies, speed) in rates.items()
        ],
    )


def load_config(source: str) -> Any:
    """Load the configuration of a backbone: bundled name, folder or hub id.

    Raises:
        InputError: it is not available.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(_place(source))
    except Exception as error:
        raise InputError(
            f"no configuration of the backbone {source} ({type(error).__name__}): check the name and the connection, "
            "or give a folder with its config.json, and its tokenizer for exact token counts, as --config FOLDER"
        ) from error


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a backbone without its weights: bundled name, folder or hub id.

    Raises:
        InputError: it is not available.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(source))
        # A folder without tokenizer files gives a tokenizer without vocabulary.
        if not tokenizer("word")["input_ids"]:
            raise InputError("no vocabulary")
    except Exception as error:
        raise InputError(
            f"no tokenizer of the backbone {source} ({type(error).__name__}: {error}): check the name and the "
            "connection, or give a folder that contains it"
        ) from error
    return tokenizer


def _place(source: str) -> str:
    if source != DEFAULT_BACKBONE:
        return source
    from kveraser.model.bundled import bundled_backbone_folder

    return str(bundled_backbone_folder())


def _sample(path: str) -> tuple[int, list[Case]]:
    """Return the number of cases of a file, and a sample: evenly spread cases and the longest."""
    sizes = [len(case.context) for case in read_cases(path)]
    if not sizes:
        raise InputError(f"{path} has no cases: build them with `kveraser data build`")
    stride = -(-len(sizes) // SAMPLED_CASES)
    longest = sizes.index(max(sizes))
    wanted = {*range(0, len(sizes), stride), longest}
    return len(sizes), [case for index, case in enumerate(read_cases(path)) if index in wanted]


def _estimated(case: Case) -> CaseShape:
    start, end = case.span
    prefix, span, suffix = (
        TOKENS_PER_WORD * len(part.split())
        for part in (case.context[:start], case.context[start:end], case.context[end:])
    )
    answers = TOKENS_PER_WORD * sum(len(query.answer.split()) for query in case.queries)
    questions = TOKENS_PER_WORD * sum(len((query.question or "").split()) for query in case.queries)
    return CaseShape(prefix, span, suffix, questions + answers, answers)


def _local_backbone(source: str, shape: ModelShape, recipe: Recipe) -> Backbone | None:
    """Load the backbone if its weights are local and take at most half of the memory."""
    weights = source == DEFAULT_BACKBONE or any(Path(source).glob("*.safetensors"))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not weights or shape.parameters * 4 * 2 > physical:
        return None
    return Backbone.load(source, dtype=None if recipe.precision == "auto" else recipe.precision, eraser=None)


def _seconds(backbone: Backbone, case: TokenizedCase, recipe: Recipe, settings: EraserSettings) -> float:
    """Time the forward and backward pass of one case: the least of a few, because the machine may be busy."""
    backbone.eraser = Eraser.untrained(backbone.model, recipe.adapter.rank, recipe.adapter.alpha, settings)
    for parameter in backbone.eraser.parameters().values():
        parameter.requires_grad_(True)
    seconds = []
    for _ in range(TIMED_PASSES):
        started = time.perf_counter()
        batch = prepare(backbone, [case])
        loss = case_losses(backbone, batch, settings, recipe.objective, recipe.no_harm_weight).sum()
        loss.backward()
        float(loss.detach())
        seconds.append(time.perf_counter() - started)
    return min(seconds)
