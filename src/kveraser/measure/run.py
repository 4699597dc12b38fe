"""Quality runs: contexts are measured one by one and saved as they finish, so that a stopped run resumes."""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kveraser.errors import InputError
from kveraser.measure.case import (
    BenchCase,
    Cell,
    LeftOut,
    TokenizedCase,
    TokenizedContext,
    tokenize_case,
    tokenize_context,
)
from kveraser.measure.environment import commit, environment
from kveraser.measure.quality import EXACT, UNERASED, measure_context, positions_needed
from kveraser.measure.results import CaseResult
from kveraser.measure.rows import check_references, rows_of
from kveraser.methods import Method
from kveraser.model.backbone import Backbone
from kveraser.model.linear import packed_weights

CASES, SETTINGS, RESULT = "cases.jsonl", "settings.json", "run.json"


@dataclass(frozen=True)
class RunSettings:
    """The sources of a run's cases, for the result file.

    Attributes:
        seed: of cases and bootstrap.
        corpus: source of the text that fills contexts. None: the suites generate it.
        dataset: source of a suite's questions.
        case_file: the user's own cases.
    """

    seed: int = 0
    corpus: str | None = None
    dataset: str | None = None
    case_file: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class QualityRun:
    """The results of a run, and the cells that it could not measure.

    Attributes:
        resumed: cases that were measured before the run was resumed.
        commits: of the checkouts used, in order; empty for an installed package.
        seconds: total time of measuring, earlier parts of the run included.
    """

    results: tuple[CaseResult, ...]
    left_out: tuple[LeftOut, ...]
    resumed: int = 0
    commits: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class _Group:
    """The cases of one context.

    Attributes:
        order: place of the context among those of its cell, as a share of their number.
        checked: cases whose exact reference is compared with a fresh prefill.
    """

    context: TokenizedContext
    cases: tuple[TokenizedCase, ...]
    order: float
    checked: tuple[TokenizedCase, ...] = ()


def run(
    backbone: Backbone,
    methods: Sequence[Method],
    settings: RunSettings,
    cases: Sequence[BenchCase],
    left_out: Sequence[LeftOut] = (),
    folder: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> QualityRun:
    """Measure all cases.

    All are tokenized before the first is measured, so that cases that can't be measured are known at once. Cells take
    turns: a run that is stopped has measured about the same share of each.

    Args:
        methods: resolved methods; `none` and `recompute` are always measured.
        cases, left_out: of `make_cases`.
        folder: where each finished case is appended to `cases.jsonl`; a run with the same settings resumes there.
        progress: called with the name of the step and the share that is done.

    Raises:
        InputError: a case whose span is not in its context, no cell that fits into the backbone, a method given twice,
            or `folder` can't be written or contains anything else than such a run.
    """
    names = list(dict.fromkeys([UNERASED, EXACT, *(str(method) for method in methods if not method.is_reference)]))
    if len(set(map(str, methods))) < len(methods):
        raise InputError(f"the methods are {', '.join(map(str, methods))}: give each once")
    report = progress or (lambda _step, _share: None)
    report("making cases", 0.0)
    groups, too_long = _groups(backbone, cases)
    done: dict[str, CaseResult] = {}
    checkout = commit()
    commits: tuple[str, ...] = (checkout,) if checkout else ()
    identity, seconds = _identity(backbone, methods, settings), 0.0
    if folder is not None:
        done, commits, seconds = _resume(folder, identity, names, cases, commits)
    resumed = len(done)
    work = [group for group in groups if any(one.case.id not in done for one in group.cases)]
    size = sum(_cost(group, names) for group in groups)
    finished = size - sum(_cost(group, names) for group in work)
    with packed_weights(backbone.model):
        for group in work:
            started = time.perf_counter()
            results = measure_context(backbone, group.context, group.cases, methods, group.checked)
            seconds += time.perf_counter() - started
            finished += _cost(group, names)
            fresh = [result for result in results if result.id not in done]
            done |= {result.id: result for result in fresh}
            if folder is not None:
                _append(folder / CASES, fresh)
                _write_header(folder, identity, commits, seconds)
            report(f"{results[-1].cell}", finished / size)
    measured = tuple(done[one.case.id] for group in groups for one in group.cases)
    return QualityRun(measured, tuple([*left_out, *too_long]), min(resumed, len(measured)), commits, seconds)


def _cost(group: _Group, methods: Sequence[str]) -> int:
    """Estimated cost of a group in tokens: a prefill, and for every case a suffix and its questions."""
    asked = sum(len(one.prompt) + len(one.answer) for case in group.cases for one in case.asked)
    suffixes = sum(len(group.context.tokens) - case.spans[0].end for case in group.cases)
    return len(group.context.tokens) + suffixes + 2 * asked * len(methods)


def _groups(backbone: Backbone, cases: Sequence[BenchCase]) -> tuple[list[_Group], list[LeftOut]]:
    """Cases by context, in the order in which they are measured, and the cells that are too long for the backbone."""
    contexts: dict[tuple[str, str], list[BenchCase]] = defaultdict(list)
    for case in cases:
        contexts[case.cell.suite, repr(case.context)].append(case)
    groups: dict[Cell, list[_Group]] = defaultdict(list)
    needed: dict[Cell, int] = defaultdict(int)
    for together in contexts.values():
        try:
            context = tokenize_context(backbone.tokenizer, together[0].context)
        except InputError as error:
            raise InputError(f"case {together[0].id}: {error}") from error
        tokenized = tuple(tokenize_case(backbone.tokenizer, context, case) for case in together)
        for one in tokenized:
            needed[one.case.cell] = max(needed[one.case.cell], positions_needed(context, one))
        groups[together[0].cell].append(_Group(context, tokenized, 0.0))
    limit = backbone.max_positions
    long = {cell: size for cell, size in needed.items() if limit is not None and size > limit}
    kept = []
    for of_cell in groups.values():
        for place, group in enumerate(of_cell):
            # A cell without its longest cases is not comparable, so it is left out whole.
            fitting = tuple(one for one in group.cases if one.case.cell not in long)
            if fitting:
                kept.append(replace(group, cases=fitting, order=place / len(of_cell)))
    left_out = [
        LeftOut(cell, f"its cases take up to {size} positions, {backbone.name} has {limit}")
        for cell, size in sorted(long.items(), key=lambda one: str(one[0]))
    ]
    if not kept:
        reasons = "; ".join(f"{one.cell}: {one.reason}" for one in left_out)
        raise InputError(f"there is nothing to measure ({reasons or 'no cases'}): give shorter lengths")
    return _with_checks(sorted(kept, key=lambda group: group.order)), left_out


def _with_checks(groups: Sequence[_Group]) -> list[_Group]:
    """Check a case of every cell in the first and in the last group with the cell: a fault may come with time."""
    places: dict[Cell, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        for case in group.cases:
            places[case.case.cell].append(place)
    ends = {(cell, place) for cell, found in places.items() for place in (found[0], found[-1])}
    checked = [
        {case.case.cell: case for case in group.cases if (case.case.cell, place) in ends}
        for place, group in enumerate(groups)
    ]
    return [replace(group, checked=tuple(of.values())) for group, of in zip(groups, checked, strict=True)]


def _identity(backbone: Backbone, methods: Sequence[Method], settings: RunSettings) -> dict[str, Any]:
    """The settings that must be equal for a run to resume. Cases are compared separately."""
    eraser = hashlib.sha256()
    for parameter in backbone.eraser.parameters().values() if backbone.eraser else ():
        eraser.update(parameter.detach().float().cpu().numpy().tobytes())
    identity = {
        "seed": settings.seed,
        "corpus": settings.corpus,
        "dataset": settings.dataset,
        "case_file": settings.case_file,
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "eraser": backbone.eraser.name if backbone.eraser else None,
        "eraser_fingerprint": eraser.hexdigest() if backbone.eraser else None,
        "methods": [repr(method) for method in methods],
        "device": backbone.device.type,
    }
    # Compared with JSON, which has lists for tuples.
    read: dict[str, Any] = json.loads(json.dumps(identity))
    return read


def _resume(
    folder: Path,
    identity: dict[str, Any],
    names: Sequence[str],
    cases: Sequence[BenchCase],
    commits: tuple[str, ...],
) -> tuple[dict[str, CaseResult], tuple[str, ...], float]:
    """Prepare `folder`, and return the finished cases by id of an earlier run, its commits and its seconds.

    Args:
        names: methods that a finished case must have results of.
        commits: of this run, appended to the earlier ones.
    """
    header, lines = folder / SETTINGS, folder / CASES
    wanted, seconds = {case.id: case.fingerprint for case in cases}, 0.0
    try:
        if lines.exists() and not header.exists():
            raise InputError(f"{lines} is of no quality run ({SETTINGS} is not beside it): choose another folder")
        if header.exists():
            found = _check_same(folder, header.read_bytes(), identity)
            commits = tuple(dict.fromkeys([*found.get("commits", ()), *commits]))
            seconds = float(found.get("seconds", 0.0))
        folder.mkdir(parents=True, exist_ok=True)
        _write_header(folder, identity, commits, seconds)
        # It does not include the cases that follow.
        (folder / RESULT).unlink(missing_ok=True)
        # The last line of a killed process may be incomplete: it has no line break.
        finished = lines.read_bytes().split(b"\n")[:-1] if lines.exists() else []
        done: dict[str, CaseResult] = {}
        for number, line in enumerate(finished, start=1):
            try:
                result = CaseResult.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{lines}, line {number} is no result ({error!r}): remove it, or choose another folder"
                ) from error
            if wanted.get(result.id, result.fingerprint) != result.fingerprint:
                raise InputError(
                    f"{folder} holds another run: its case {result.id} is not the one that is to be measured: "
                    "choose another folder, or the same settings"
                )
            if {*result.methods, *result.refused} == set(names):
                done[result.id] = result
        _replace(lines, "".join(map(_line, done.values())))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return done, commits, seconds


def _write_header(folder: Path, identity: Mapping[str, Any], commits: Sequence[str], seconds: float) -> None:
    """Save the settings of a run, its commits, and its seconds so far."""
    header = {**identity, "commits": list(commits), "seconds": seconds}
    try:
        _replace(folder / SETTINGS, json.dumps(header, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _check_same(folder: Path, header: bytes, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        found = dict(json.loads(header))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / SETTINGS} can't be read ({error}): choose another folder") from error
    for key in identity:
        if found.get(key) != identity[key]:
            raise InputError(
                f"{folder} holds another run: its {key} is {found.get(key)!r}, now {identity[key]!r}: "
                "choose another folder, or the same settings"
            )
    return found


def _append(lines: Path, results: Iterable[CaseResult]) -> None:
    try:
        with lines.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, results)))
    except OSError as error:
        raise _unwritable(lines, error) from error


def _line(result: CaseResult) -> str:
    return json.dumps(result.to_json(), ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"can't keep the run in {path} ({error}): free space or choose another folder, then run again")


def to_json(
    measured: QualityRun, backbone: Backbone, settings: RunSettings, methods: Sequence[Method], command: str
) -> dict[str, Any]:
    """Rows with settings, eraser, versions and hardware.

    Raises:
        MeasurementError: see `check_references`.
    """
    rows = rows_of(measured.results, settings.seed)
    check_references(measured.results, rows, precise=backbone.model.dtype == torch.float32)
    return {
        "command": command,
        "settings": settings.to_json() | {"methods": [str(method) for method in methods]},
        **environment(backbone),
        "commits": list(measured.commits),
        "workers": 1,
        "threads": torch.get_num_threads(),
        "seconds": measured.seconds,
        "resumed_cases": measured.resumed,
        "rows": [row.to_json() for row in rows],
        "left_out": [{**asdict(one.cell), "reason": one.reason} for one in measured.left_out],
    }


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Save the run's result beside its cases.

    Raises:
        InputError: it can't be written.
    """
    try:
        _replace(folder / RESULT, json.dumps(result, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error
