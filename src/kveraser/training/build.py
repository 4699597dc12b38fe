"""Build a case file: seeded, resumable, and counted when it is complete.

Cases are appended to a partial file beside the target, whose settings are in another. A case depends on seed and index
only, so an interrupted build continues after the last complete line.
"""

from __future__ import annotations

import hashlib
import json
import os
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
from kveraser.training.cases import Case, CaseSizes, arrow_from_jsonl, tokenize
from kveraser.training.span_neighbor import span_neighbor_cases
from kveraser.training.split import Split
from kveraser.training.tasks import TASKS, check_tasks, task_cases

Stage = Literal["1", "2", "both"]

Progress = Callable[[str, float], None]
"""Called with a description of the step and the fraction done."""


@dataclass(frozen=True)
class BuildSettings:
    """Settings that, with the passages, determine the cases.

    Attributes:
        stage: `1` inserts unrelated text, `2` cycles through the tasks, `both` alternates between the two.
        tasks: names in `TASKS`, for stage 2.
        split: split of passages, entities and phrasings.
        cases: number of cases.
        context: shortest and longest context without the span, in words.
        span: shortest and longest span, in words.
        seed: of all random choices.
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
    """Number of cases of one task, and of their queries by kind."""

    task: str
    cases: int
    influence: int
    leak: int
    no_harm: int


@dataclass(frozen=True)
class Sizes:
    """Distribution of a length over all cases: of contexts, spans, or all answers of a case.

    `nine_in_ten` is the 90th percentile.
    """

    what: str
    shortest: int
    median: int
    nine_in_ten: int
    longest: int


@dataclass(frozen=True)
class Statistics:
    """Statistics of a case file.

    Attributes:
        cases: number of cases.
        duplicates: cases with the context and span of an earlier one.
        tasks, sizes: one row per task and per length.
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
    """Build a case file: Arrow if its name ends in `.arrow`, else JSON Lines.

    Args:
        resume: continue the partial file of an interrupted build, if there is one.

    Returns:
        Number of cases that the interrupted build had written.

    Raises:
        InputError: impossible settings, a partial file of other settings, or a full disk. An earlier file and the
            partial file are kept.
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
            # These settings can't be met, so the partial file must not block a build with others.
            partial.unlink(missing_ok=True)
            _sidecar(partial).unlink(missing_ok=True)
            raise
        if target.suffix == ".arrow":
            with replacing(target) as arrow:
                arrow_from_jsonl(partial, arrow)
            partial.unlink()
        else:
            partial.replace(target)
    except OSError as error:
        raise InputError(
            f"can't write cases to {target} ({error}): free space and run the command again, or choose another path; "
            "it continues from the last case"
        ) from error
    with suppress(OSError):
        _sidecar(partial).unlink()
    return done


def check_settings(settings: BuildSettings) -> None:
    """Check the settings that do not depend on the corpus.

    Raises:
        InputError: the message names the invalid setting.
    """
    for name, (shortest, longest) in {"context": settings.context, "span": settings.span}.items():
        if not 1 <= shortest <= longest:
            raise InputError(f"{name} is {shortest} {longest}: give the shortest, then the longest, both at least 1")
    for name, value, known in (("stage", settings.stage, Stage), ("split", settings.split, Split)):
        if value not in get_args(known):
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(get_args(known))}")
    check_tasks(settings.tasks)
    if settings.cases < 1:
        raise InputError(f"cases is {settings.cases}: build at least 1")


def statistics_of(cases: Iterable[Case], tokenizer: Any = None) -> Statistics:
    """Count tasks, query kinds, duplicates, and lengths in words; with a tokenizer also in tokens.

    Raises:
        InputError: there are no cases.
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
            tokenized = tokenize(tokenizer, case)
            measured["context, tokens"] = tokenized.tokens
            measured["span, tokens"] = len(tokenized.span)
            measured["answers, tokens"] = sum(len(answer) for _, answer in tokenized.queries)
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
    """Generate cases from `first` on; with both stages, even ones are of stage 1 and odd ones of stage 2."""
    seed, split = settings.seed, settings.split
    sizes = CaseSizes(settings.context, settings.span)
    # With both stages, each generator has made half of the first cases.
    each = 2 if settings.stage == "both" else 1
    neighbors = span_neighbor_cases(passages, settings.cases, seed, sizes, split, first=-(-first // each))
    tasks = task_cases(settings.tasks, passages, settings.cases, seed, sizes, split, first=first // each)
    for number in range(first, settings.cases):
        yield next(tasks if settings.stage == "2" or (settings.stage == "both" and number % 2) else neighbors)


def _resumed(target: Path, partial: Path, made_of: dict[str, Any]) -> int:
    """Cut the partial file after its last complete line and return its number of cases."""
    if not partial.is_file():
        return 0
    whole, newline, _ = partial.read_bytes().rpartition(b"\n")
    if not newline:
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
            f"an interrupted build of {target} has other {name} ({found.get(name)!r}, not {wanted[name]!r}): "
            "start again with --no-resume, or give the same settings and corpus"
        )
    os.truncate(partial, len(whole) + 1)
    return whole.count(b"\n") + 1


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
