"""Building a case file: seeded, resumable, and counted once it is whole.

While a file is built, its cases stand in a partial file beside it, one a line, and what they are made of in another. A
case hangs on the seed and its number alone, so an interrupted build goes on after the last whole line.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kveraser import __version__
from kveraser.errors import InputError
from kveraser.files import replacing
from kveraser.measure.questions import QueryKind
from kveraser.training.arrow import write_arrow
from kveraser.training.cases import Case, read_cases, tokenize_with
from kveraser.training.span_neighbor import SpanNeighborSettings, span_neighbor_cases
from kveraser.training.split import Split
from kveraser.training.tasks import TASKS, TaskSettings, task_cases

Stage = Literal["1", "2", "both"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""


@dataclass(frozen=True)
class BuildSettings:
    """What decides which cases are built, beside the passages.

    Attributes:
        stage: `1` inserts unrelated text, `2` are the tasks in turn, `both` takes one of each in turn.
        tasks: names in `TASKS`, for stage 2.
        split: whose passages, entities and phrasings are used.
        cases: how many.
        context: shortest and longest context without the span, in words.
        span: shortest and longest span, in words.
        seed: the same seed gives the same cases.
    """

    stage: Stage = "1"
    tasks: tuple[str, ...] = tuple(TASKS)
    split: Split = "train"
    cases: int = 1000
    context: tuple[int, int] = (120, 360)
    span: tuple[int, int] = (8, 760)
    seed: int = 42


@dataclass(frozen=True)
class TaskCount:
    """Cases of one task, and their queries by kind."""

    task: str
    cases: int
    influence: int
    leak: int
    no_harm: int


@dataclass(frozen=True)
class Sizes:
    """How long something is over all cases: context with span, span, answers of a case together.

    Nine in ten cases are no longer than `nine_in_ten`.
    """

    what: str
    shortest: int
    median: int
    nine_in_ten: int
    longest: int


@dataclass(frozen=True)
class Statistics:
    """What a case file holds.

    Attributes:
        cases: in all.
        duplicates: cases whose context and span an earlier one has.
        tasks, sizes: a row each.
    """

    cases: int
    duplicates: int
    tasks: list[TaskCount]
    sizes: list[Sizes]


def build_cases(
    target: Path,
    passages: Sequence[str],
    settings: BuildSettings,
    resume: bool = True,
    progress: Progress | None = None,
) -> int:
    """Build a case file: Arrow when its name ends in `.arrow`, else JSON lines.

    Args:
        resume: go on from the partial file of an interrupted build, if there is one.

    Returns:
        How many of the cases an earlier, interrupted build had made.

    Raises:
        InputError: settings that can't be met, a partial file of other settings, or a full disk. An earlier file stays,
            and so does the partial file.
    """
    check_settings(settings)
    progress = progress or (lambda step, fraction: None)
    partial = target.with_name(f".{target.name}.part")
    made_of = {"version": __version__, "passages": _digest(passages), **asdict(settings)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        done = _resumed(target, partial, made_of) if resume else 0
        if not done:
            partial.unlink(missing_ok=True)
            _sidecar(partial).write_text(json.dumps(made_of), encoding="utf-8")
        try:
            with partial.open("a", encoding="utf-8") as file:
                for number, case in enumerate(_generate(passages, settings, done), start=done + 1):
                    file.write(case.to_json() + "\n")
                    progress(f"{number} of {settings.cases} cases", number / settings.cases)
        except InputError:
            # What these settings can't make is never gone on with, and must not stand in the way of better ones.
            partial.unlink(missing_ok=True)
            _sidecar(partial).unlink(missing_ok=True)
            raise
        if target.suffix == ".arrow":
            with replacing(target) as arrow:
                write_arrow(arrow, map(asdict, read_cases(partial)))
            partial.unlink()
        else:
            partial.replace(target)
    except OSError as error:
        raise InputError(
            f"can't write cases to {target} ({error}): free space and run it again, or choose another place; "
            "it goes on where it stopped"
        ) from error
    with suppress(OSError):
        _sidecar(partial).unlink()
    return done


def check_settings(settings: BuildSettings) -> None:
    """Refuse settings that no corpus can meet.

    Raises:
        InputError: naming the setting.
    """
    for name, (shortest, longest) in {"context": settings.context, "span": settings.span}.items():
        if not 1 <= shortest <= longest:
            raise InputError(f"{name} is {shortest} {longest}: give the shortest, then the longest, from 1 on")
    for name, value, known in (("stage", settings.stage, Stage), ("split", settings.split, Split)):
        if value not in get_args(known):
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(get_args(known))}")
    unknown = [task for task in settings.tasks if task not in TASKS]
    if unknown or not settings.tasks:
        raise InputError(f"no task {', '.join(map(repr, unknown)) or 'is named'}: choose among {', '.join(TASKS)}")
    if settings.cases < 1:
        raise InputError(f"cases is {settings.cases}: build at least 1")


def statistics_of(cases: Iterable[Case], tokenizer: Any = None) -> Statistics:
    """Count cases: tasks, query kinds, sizes in words, with a tokenizer also in tokens, and duplicates.

    Raises:
        InputError: there are none.
    """
    tasks: Counter[str] = Counter()
    kinds: Counter[tuple[str, QueryKind]] = Counter()
    sizes: dict[str, list[int]] = {}
    seen: set[bytes] = set()
    count = 0
    for case in cases:
        count += 1
        tasks[case.task] += 1
        kinds.update((case.task, query.kind) for query in case.queries)
        seen.add(hashlib.sha256(f"{case.span} {case.context}".encode()).digest())
        measured = {
            "context, words": len(case.context.split()),
            "span, words": len(case.context[slice(*case.span)].split()),
            "answers, words": sum(len(query.answer.split()) for query in case.queries),
        }
        if tokenizer is not None:
            cut = tokenize_with(tokenizer, case)
            measured["context, tokens"] = cut.tokens
            measured["span, tokens"] = len(cut.span)
            measured["answers, tokens"] = sum(len(answer) for _, answer in cut.queries)
        for what, size in measured.items():
            sizes.setdefault(what, []).append(size)
    if not count:
        raise InputError("there is no case to count: build at least 1")
    return Statistics(
        cases=count,
        duplicates=count - len(seen),
        tasks=[TaskCount(task, tasks[task], *(kinds[task, kind] for kind in get_args(QueryKind))) for task in tasks],
        sizes=[_sizes(what, sorted(values)) for what, values in sizes.items()],
    )


def _generate(passages: Sequence[str], settings: BuildSettings, first: int = 0) -> Iterator[Case]:
    """Cases `first` to the last; of both stages, even ones are of stage 1, odd ones of stage 2."""
    seed, split = settings.seed, settings.split
    sizes = {"context": settings.context, "span": settings.span}
    # Two generators in turn have each made half of the cases.
    each = 2 if settings.stage == "both" else 1
    neighbors = span_neighbor_cases(
        passages, settings.cases, seed, SpanNeighborSettings(**sizes), split, first=-(-first // each)
    )
    tasks = task_cases(
        settings.tasks, passages, settings.cases, seed, TaskSettings(**sizes), split, first=first // each
    )
    for number in range(first, settings.cases):
        yield next(tasks if settings.stage == "2" or (settings.stage == "both" and number % 2) else neighbors)


def _resumed(target: Path, partial: Path, made_of: dict[str, Any]) -> int:
    """Cut the partial file after its last whole line and return how many it has."""
    if not partial.is_file():
        return 0
    with partial.open("rb") as file:
        if not file.readline().endswith(b"\n"):
            # Interrupted before its first case, it is a build of nothing.
            return 0
    try:
        found = json.loads(_sidecar(partial).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    wanted = json.loads(json.dumps(made_of))
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        name = differing[0]
        raise InputError(
            f"an interrupted build of {target} was of other {name} ({found.get(name)!r}, not {wanted[name]!r}): "
            "start anew with --no-resume, or give it the same settings and corpus"
        )
    lines = length = 0
    with partial.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, length = lines + 1, length + len(line)
        file.truncate(length)
    return lines


def _sidecar(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _digest(passages: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(passage.encode() + b"\n")
    return digest.hexdigest()


def _sizes(what: str, ordered: Sequence[int]) -> Sizes:
    last = len(ordered) - 1
    return Sizes(what, ordered[0], ordered[round(last * 0.5)], ordered[round(last * 0.9)], ordered[-1])
