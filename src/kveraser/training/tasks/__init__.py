"""Stage 2 and the held-out suite: contexts whose later text builds on a span that turns out to be wrong.

Each task makes a `Story`, which `layout` turns into a case.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from kveraser.errors import InputError
from kveraser.training.cases import Case, CaseSizes
from kveraser.training.split import Split, sufficient_passages
from kveraser.training.tasks.facts import facts
from kveraser.training.tasks.layout import is_sound, lay_out
from kveraser.training.tasks.passages import Passages, Reader
from kveraser.training.tasks.scenes import injection, needle, observation, preference, stale
from kveraser.training.tasks.story import Story
from kveraser.training.tasks.tables import Tables, load_tables

TASKS: dict[str, Callable[[random.Random, Tables, Passages], Story]] = {
    "needle": needle,
    "facts": facts,
    "stale": stale,
    "observation": observation,
    "preference": preference,
    "injection": injection,
}

FEWEST_PASSAGES = 8
LEAST_CONTEXT = 150
"""Smallest allowed maximum of context words: the parts of a story take up to 110."""
LEAST_SPAN = 24
"""Smallest allowed maximum of span words: the length of a long statement."""
TRIES = 200
"""Most draws for a sound case; usually the first one is sound."""


def task_cases(
    tasks: Sequence[str],
    passages: Sequence[str],
    count: int,
    seed: int,
    sizes: CaseSizes | None = None,
    split: Split = "train",
    first: int = 0,
) -> Iterator[Case]:
    """Generate cases `first` to `count` of `tasks` in turn, from the passages, names and phrasings of `split`.

    A case depends on seed and index.

    Raises:
        InputError: an unknown task, sizes too small for a story, or a corpus too short for the sizes or without facts.
    """
    sizes = sizes or CaseSizes()
    check_tasks(tasks)
    for name, (shortest, longest), least in (
        ("context", sizes.context, LEAST_CONTEXT),
        ("span", sizes.span, LEAST_SPAN),
    ):
        if not 1 <= shortest <= longest or longest < least:
            raise InputError(
                f"the {name} is {shortest} to {longest} words: give the shortest, then the longest, at least {least}"
            )
    corpus = Passages(sufficient_passages(passages, split, sizes, FEWEST_PASSAGES))
    tables = load_tables(split)
    for index in range(first, count):
        task = tasks[index % len(tasks)]
        yield _case(random.Random(f"{seed}/{index}"), task, tables, corpus, sizes, f"{task}/{split}/{seed}/{index}")


def check_tasks(tasks: Sequence[str]) -> None:
    """Check that at least one task is given and that all are known.

    Raises:
        InputError: naming the unknown ones.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"no task {', '.join(map(repr, unknown)) or 'is named'}: choose among {', '.join(TASKS)}")


def _case(rng: random.Random, task: str, tables: Tables, passages: Passages, sizes: CaseSizes, name: str) -> Case:
    for _ in range(TRIES):
        case = lay_out(rng, TASKS[task](rng, tables, passages), Reader(rng, passages), tables, sizes, task, name)
        if is_sound(case, sizes):
            return case
    raise InputError(
        f"no sound case of the task {task} in {TRIES} draws (context of {sizes.context} words): allow longer contexts, "
        "or give a larger corpus"
    )
