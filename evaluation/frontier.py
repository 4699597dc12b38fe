"""`python -m evaluation frontier`: KL to exact against tokens run, methods at several widths and lengths."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from evaluation.plan import SuitePlan
from evaluation.suites.base import from_training_case
from evaluation.suites.heldout import HELDOUT_TASKS, SHARE_OF_CONTEXT, heldout_cases
from evaluation.suites.text import generated_passages
from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError
from kveraser.measure.case import ALL, BenchCase, Cell, tokenize_context
from kveraser.measure.rows import AXES
from kveraser.methods import Method, make_method
from kveraser.methods.base import recompute_window
from kveraser.methods.mask import Mask
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import PREFILL_CHUNK, Backbone
from kveraser.text.spans import Span

SUITE = "heldout"
LENGTHS, SPANS = (512, 2048, 7680), (64,)
"""Of contexts and spans, in tokens. The bundled backbone has 8,192 positions, some of which the questions need."""
METHODS = (
    "mask;zero_value;blank;shift;repair(8);repair(16);repair(32);repair(64);repair(128);repair(32, per_span=1.0);"
    "follow(8, 0.0, 0.25);follow(16, 0.0, 0.75);follow(32, 0.25, 0.75);follow(64, 0.5, 1.0);follow(128, 1.0, 1.0);"
    "selective(0.05);selective(0.15);selective(0.3);selective(0.5);"
    "kveraser;kveraser+repair(16);kveraser+repair(32);kveraser+repair(64);erratum;position_gap"
)
PASSAGES = 2000
"""Paragraphs that are generated without a corpus: one in ten is held out."""
PROBES, FITS = 4, 2
"""Cases that are drawn to find how many words make a context of a length, and how often."""
NEED_CORPUS = ("facts",)
"""Tasks that read relations out of real text."""


@dataclass(frozen=True)
class PositionGap(Method):
    """Recompute the suffix at its old positions, which leaves a position gap: the bound of all methods that keep
    positions, at the cost of `recompute`."""

    name = "position_gap"
    summary = "drop the span's states, recompute the suffix at its old positions"
    cost = "suffix tokens"
    source = "reference of methods that keep positions"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        Mask()(backbone, cache, tokens, span)
        ids = slot_tokens(cache, tokens)
        return sum(
            recompute_window(backbone, cache, ids, start, PREFILL_CHUNK)
            for start in range(span.start, cache.length, PREFILL_CHUNK)
        )

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return suffix


def methods_of(names: str) -> list[Method]:
    """The methods of a list separated by semicolons; `position_gap` exists only here.

    Raises:
        MethodError: see `make_method`.
    """
    listed = [name.strip() for name in names.split(";") if name.strip()]
    return [PositionGap() if name == PositionGap.name else make_method(name) for name in listed]


def tasks_of(corpus: str | None) -> tuple[str, ...]:
    """The tasks that can be made of a corpus, or of generated text."""
    return tuple(task for task in HELDOUT_TASKS if corpus is not None or task not in NEED_CORPUS)


def passages_of(seed: int) -> list[str]:
    """Generated text to fill contexts with, in place of a corpus; the same seed gives the same."""
    return generated_passages(random.Random(f"frontier/{seed}"), PASSAGES)


def make_cases(tokenizer: Any, plan: SuitePlan, passages: Sequence[str], seed: int) -> list[BenchCase]:
    """The cases of all tasks, lengths and spans, in contexts of about the lengths asked for, chat template included.

    Raises:
        InputError: sizes too small for a task, a span that leaves too little context, or too short a corpus.
    """
    cases = []
    for task, length, span in product(plan.tasks, plan.lengths, plan.spans):
        if span > SHARE_OF_CONTEXT * length:
            raise InputError(f"a span of {span} tokens is over {SHARE_OF_CONTEXT:.0%} of a context of {length}")
        drawn = partial(heldout_cases, tokenizer, passages, task)
        aim = length
        for _ in range(FITS):
            # The suite counts words: what a template adds, and words of more tokens than most, show in the result.
            tried = drawn(aim, span, PROBES, seed)
            tokens = [len(tokenize_context(tokenizer, case.context).tokens) for case in tried]
            aim += length - round(fmean(tokens))
        made = drawn(max(aim, 1), span, plan.cases, seed)
        cell = Cell(SUITE, task, length, span)
        cases += [replace(from_training_case(case, cell), id=f"{case.id}/{length}/{span}") for case in made]
    return cases


def frontier_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the rows of a quality run, those over all cases of one context length: a row a method and length."""
    fixed = [axis for axis in AXES if axis not in ("suite", "length")]
    return [
        row
        for row in rows
        if row["suite"] == SUITE and row["length"] not in (ALL, None) and all(row[axis] == ALL for axis in fixed)
    ]
