"""`kveraser bench sharing`: how much faster cases are measured on one prefill than each on its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kveraser.backbone import Backbone
from kveraser.bench.case import BenchCase, tokenize_case, tokenize_context
from kveraser.bench.environment import environment
from kveraser.bench.quality import measure_contexts
from kveraser.bench.together import Memory
from kveraser.errors import InputError
from kveraser.methods import Method


@dataclass(frozen=True)
class SharingRow:
    """One way to measure the same cases.

    Attributes:
        way: `shared`: all cases of a context and all methods on one prefill; `alone`: a prefill and an exact reference
            for every case and method.
        prefills: of contexts.
        seconds: in all.
    """

    way: str
    cases: int
    methods: int
    prefills: int
    seconds: float


def run(
    backbone: Backbone,
    methods: Sequence[Method],
    cases: Sequence[BenchCase],
    progress: Callable[[str, float], None] | None = None,
) -> tuple[list[SharingRow], float]:
    """Measure `cases` both ways, context by context in turn, so that a machine that slows down slows both.

    The shared way also asks all edited caches together.

    Returns:
        A row a way, and how many times faster the shared one is.

    Raises:
        InputError: no cases.
    """
    if not cases:
        raise InputError("there are no cases to measure: give longer contexts, or a suite that needs no text of yours")
    report = progress or (lambda _step, _share: None)
    contexts: dict[str, list[BenchCase]] = {}
    for case in cases:
        contexts.setdefault(repr(case.context), []).append(case)
    shared, alone, memory = 0.0, 0.0, Memory()
    for place, together in enumerate(contexts.values()):
        report(f"context {place + 1} of {len(contexts)}", place / len(contexts))
        context = tokenize_context(backbone.tokenizer, together[0].context)
        tokenized = [tokenize_case(backbone.tokenizer, context, case) for case in together]
        started = time.perf_counter()
        measure_contexts(backbone, [(context, tokenized)], methods, memory=memory)
        shared += time.perf_counter() - started
        started = time.perf_counter()
        for one in tokenized:
            for method in methods:
                measure_contexts(backbone, [(context, [one])], [method], memory=memory)
        alone += time.perf_counter() - started
    pairs = len(cases) * len(methods)
    rows = [
        SharingRow("shared", len(cases), len(methods), len(contexts), shared),
        SharingRow("alone", len(cases), len(methods), pairs, alone),
    ]
    return rows, alone / shared


def to_json(rows: Sequence[SharingRow], ratio: float, backbone: Backbone, settings: dict[str, Any]) -> dict[str, Any]:
    """Rows with all that is needed to read them: settings, versions, hardware."""
    return {
        "command": "kveraser bench sharing",
        "settings": settings,
        **environment(backbone),
        "rows": [asdict(row) for row in rows],
        "ratio": ratio,
    }
