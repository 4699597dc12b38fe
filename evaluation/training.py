"""`python -m evaluation train`: queries trained on a second, against a naive loop over the same cases.

The naive loop takes one query at a time, as if every query came with a context of its own: in every epoch it prefills
the contaminated context, prefills the exact reference, lets it answer, and takes a gradient through the edited cache.
The engine does all but the gradient once a case, for all its queries and all epochs, and runs cases of one shape
together. Both end with the same gradients. Rounds alternate, so that a machine that slows down slows both.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kveraser.errors import InputError
from kveraser.measure.environment import environment
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import EraserSettings
from kveraser.training.batches import batches, tokenized
from kveraser.training.cases import CaseSizes, TokenizedCase
from kveraser.training.distill import case_losses, exact_reference, prepare
from kveraser.training.span_neighbor import span_neighbor_cases

SUBJECTS = "The harbour clerk", "A ferry captain", "The night porter", "One of the masons", "The keeper of the orchard"
VERBS = "writes down", "counts", "looks after", "asks about", "carries away", "mends", "forgets", "sells"
OBJECTS = "the lamps", "nine barrels", "a torn sail", "the ledger", "two ladders", "the western gate", "all the maps"
TIMES = "before noon", "in the first week of May", "when the rain stops", "after the bell", "every third day"
PASSAGES, SENTENCES = 40, 30


@dataclass(frozen=True)
class TrainingRow:
    """One way to train, over all rounds.

    Attributes:
        loop: `engine` or `naive`.
        queries: trained on in a round.
        seconds: median of a round: forward and backward passes of all cases.
        queries_per_second: at that median.
    """

    loop: str
    queries: int
    seconds: float
    queries_per_second: float


@dataclass(frozen=True)
class BenchSettings:
    """What is measured. The eraser's layout and repair are those of the backbone's eraser.

    Attributes:
        cases: of stage 1, from generated text.
        cases_per_batch: most cases of one shape that run at once.
        shape_multiple: cases are cut so that more share a shape, as a recipe says; both loops train on the cut ones.
        context, span: shortest and longest, in words.
        epochs: passes over the cases in a round.
        repeats: timed rounds, after one of warm-up.
        seed: of the text and the cases.
    """

    cases: int = 8
    cases_per_batch: int = 4
    shape_multiple: int = 32
    context: tuple[int, int] = (120, 180)
    span: tuple[int, int] = (30, 60)
    epochs: int = 2
    repeats: int = 3
    seed: int = 0


def run(
    backbone: Backbone, settings: BenchSettings, progress: Callable[[str], None] | None = None
) -> tuple[list[TrainingRow], float]:
    """Time both loops with the backbone's eraser.

    Returns:
        A row each, and how many times the naive loop's queries a second the engine's are: the median over rounds, each
        of which times one after the other.

    Raises:
        InputError: too few cases or rounds.
        EraserError: no eraser is loaded.
    """
    if min(settings.cases, settings.epochs, settings.repeats) < 1:
        raise InputError(
            f"cases is {settings.cases}, epochs {settings.epochs} and repeats {settings.repeats}: "
            "measure at least 1 of each"
        )
    say = progress or (lambda _: None)
    eraser = backbone.require_eraser()
    sizes = CaseSizes(settings.context, settings.span)
    made = span_neighbor_cases(passages(settings.seed), settings.cases, settings.seed, sizes)
    cases = list(tokenized(backbone, made, settings.shape_multiple))
    queries = settings.epochs * sum(len(case.queries) for case in cases)
    for parameter in eraser.parameters().values():
        parameter.requires_grad_(True)
    loops: dict[str, Callable[[], None]] = {
        "engine": lambda: engine(backbone, cases, eraser.settings, settings.cases_per_batch, settings.epochs),
        "naive": lambda: naive(backbone, cases, eraser.settings, settings.epochs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(settings.repeats + 1):
        for name, loop in loops.items():
            say(f"{name}: {f'round {repeat} of {settings.repeats}' if repeat else 'warm-up'}")
            started = time.perf_counter()
            loop()
            if backbone.device.type == "cuda":
                torch.cuda.synchronize(backbone.device)
            spent = time.perf_counter() - started
            if repeat:
                seconds[name].append(spent)
            for parameter in eraser.parameters().values():
                parameter.grad = None
    rows = [
        TrainingRow(name, queries, statistics.median(spent), queries / statistics.median(spent))
        for name, spent in seconds.items()
    ]
    ratios = [slow / fast for slow, fast in zip(seconds["naive"], seconds["engine"], strict=True)]
    return rows, statistics.median(ratios)


def engine(
    backbone: Backbone, cases: Sequence[TokenizedCase], settings: EraserSettings, per_batch: int, epochs: int
) -> None:
    """Gradients of all queries as training takes them: those of a case weigh as one."""
    for places in batches(cases, per_batch):
        prepared = prepare(backbone, [cases[place] for place in places])
        for _ in range(epochs):
            (case_losses(backbone, prepared, settings, "kl", 1.0).sum() / len(cases)).backward()


def naive(backbone: Backbone, cases: Sequence[TokenizedCase], settings: EraserSettings, epochs: int) -> None:
    """The same gradients query by query: every token of a case weighs alike."""
    for case in [*cases] * epochs:
        compared = sum(len(answer) for _, answer in case.queries)
        for query, kind in zip(case.queries, case.kinds, strict=True):
            alone = replace(case, queries=(query,), kinds=(kind,))
            share = len(query[1]) / compared / len(cases)
            prepared = prepare(backbone, [alone], reference=exact_reference(backbone, [alone]))
            (case_losses(backbone, prepared, settings, "kl", 1.0).sum() * share).backward()


def passages(seed: int) -> list[str]:
    """Generated text: sentences that say different things, in no order."""
    rng = random.Random(seed)
    return [
        " ".join(
            f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(TIMES)}."
            for _ in range(SENTENCES)
        )
        for _ in range(PASSAGES)
    ]


def to_json(
    rows: Sequence[TrainingRow], ratio: float, backbone: Backbone, settings: BenchSettings, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Rows with all that is needed to read them: settings, eraser, versions, hardware."""
    return {
        "command": "python -m evaluation train",
        "settings": asdict(settings),
        **environment(backbone),
        "notes": list(notes),
        "ratio": ratio,
        "rows": [asdict(row) for row in rows],
    }
