"""Stage 2 and the held-out suite: contexts in which later text builds on a span that turns out to be wrong.

A page a task. Each tells a `Story`; `layout` makes a case of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from kveraser.errors import InputError
from kveraser.training.cases import Case
from kveraser.training.split import Split, split_passages
from kveraser.training.tasks.facts import facts
from kveraser.training.tasks.injection import injection
from kveraser.training.tasks.layout import TaskSettings, is_sound, lay_out
from kveraser.training.tasks.needle import needle
from kveraser.training.tasks.observation import observation
from kveraser.training.tasks.passages import Passages, Reader
from kveraser.training.tasks.preference import preference
from kveraser.training.tasks.stale import stale
from kveraser.training.tasks.story import Story
from kveraser.training.tasks.tables import Tables, load_tables

__all__ = ["TASKS", "TaskSettings", "task_cases"]

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
"""Words that the longest context must allow: the parts of a story take up to 110."""
LEAST_SPAN = 24
"""Words that the longest span must allow: a long statement has as many."""
TRIES = 200
"""Draws until a case is sound; most are at once."""


def task_cases(
    tasks: Sequence[str],
    passages: Sequence[str],
    count: int,
    seed: int,
    settings: TaskSettings | None = None,
    split: Split = "train",
    first: int = 0,
) -> Iterator[Case]:
    """Generate cases `first` to `count` of `tasks` in turn, from the passages, names and phrasings of `split`.

    The same seed gives the same cases, and case 7 is the same whether or not case 6 was built.

    Raises:
        InputError: an unknown task, sizes too small for a story, or a corpus too short for the sizes or without facts.
    """
    settings = settings or TaskSettings()
    own = split_passages(passages, split)
    _check(tasks, own, len(passages), settings, split)
    tables, corpus = load_tables(split), Passages(own)
    for index in range(first, count):
        task = tasks[index % len(tasks)]
        yield _case(random.Random(f"{seed}/{index}"), task, tables, corpus, settings, f"{task}/{split}/{seed}/{index}")


def _case(rng: random.Random, task: str, tables: Tables, passages: Passages, settings: TaskSettings, name: str) -> Case:
    for _ in range(TRIES):
        story = TASKS[task](rng, tables, passages)
        case = lay_out(rng, story, Reader(rng, passages), tables, settings, task, name)
        if is_sound(case, settings):
            return case
    raise InputError(
        f"no sound case of the task {task} in {TRIES} draws (context of {settings.context} words): allow longer "
        "contexts, or give a larger corpus"
    )


def _check(tasks: Sequence[str], own: Sequence[str], given: int, settings: TaskSettings, split: Split) -> None:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise InputError(f"no task {', '.join(unknown) or 'given'}: choose from {', '.join(TASKS)}")
    for name, (shortest, longest), least in (
        ("context", settings.context, LEAST_CONTEXT),
        ("span", settings.span, LEAST_SPAN),
    ):
        if not 1 <= shortest <= longest or longest < least:
            raise InputError(
                f"the {name} is {shortest} to {longest} words: give the shortest, then the longest, at least {least}"
            )
    if len(own) < FEWEST_PASSAGES:
        raise InputError(
            f"the corpus has {len(own)} passages in the {split} split (of {given}): give enough for "
            f"{FEWEST_PASSAGES} there (one in ten passages is held out)"
        )
    available, wanted = sum(len(passage.split()) for passage in own), settings.context[1] + settings.span[1]
    if available < wanted:
        raise InputError(
            f"the {split} split of the corpus has {available} words, a case takes up to {wanted}: give a longer corpus"
        )
