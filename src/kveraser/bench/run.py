"""One run of a quality suite: its cases measured one by one, each kept as soon as it is done, so that a run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from kveraser.backbone import Backbone
from kveraser.bench.cells import ALL, Cell, cells
from kveraser.bench.environment import environment
from kveraser.bench.heldout import HELDOUT_TASKS, SHARE_OF_CONTEXT, fits, heldout_cases
from kveraser.bench.quality import UNERASED, CaseResult, measure_case, room
from kveraser.errors import InputError
from kveraser.methods import Method
from kveraser.training.cases import Case, tokenize

CASES, SETTINGS = "cases.jsonl", "settings.json"


@dataclass(frozen=True)
class QualitySettings:
    """What a run of the held-out suite measures.

    Attributes:
        tasks: names in `HELDOUT_TASKS`.
        lengths, spans: tokens.
        cases: of every cell of a task, a length and a span.
        seed: of the cases and the bootstrap.
        corpus: where the passages come from, for the record.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    spans: tuple[int, ...]
    cases: int
    seed: int
    corpus: str

    def check(self) -> None:
        """Refuse what can't be measured.

        Raises:
            InputError: an unknown task, sizes below 1, a value given twice, or no pair of length and span that fits.
        """
        unknown = [task for task in self.tasks if task not in HELDOUT_TASKS]
        if unknown or not self.tasks:
            named = repr(unknown[0]) if unknown else "given"
            raise InputError(f"no held-out task {named}: there are {', '.join(HELDOUT_TASKS)}")
        for name, sizes in (("lengths", self.lengths), ("spans", self.spans), ("cases", (self.cases,))):
            if not sizes or min(sizes) < 1:
                raise InputError(f"{name} is {sizes}: give numbers from 1 on")
        for name, values in (("tasks", self.tasks), ("lengths", self.lengths), ("spans", self.spans)):
            if len(set(values)) < len(values):
                raise InputError(f"{name} is {values}: give each once")
        if not any(fits(length, span) for length in self.lengths for span in self.spans):
            raise InputError(f"no span of {self.spans} fits into a context of {self.lengths}: give shorter spans")


@dataclass(frozen=True)
class LeftOut:
    """Cells that a run does not measure, and why; `all` where that hangs on no task."""

    task: str
    length: int
    span: int
    reason: str


@dataclass(frozen=True)
class QualityRun:
    """What a run measured, a result a case and method, and the cells that it could not measure."""

    results: tuple[CaseResult, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class _Scheduled:
    case: Case
    length: int
    span: int


def run(
    backbone: Backbone,
    passages: Sequence[str],
    methods: Sequence[Method],
    settings: QualitySettings,
    folder: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> QualityRun:
    """Measure every case of the suite.

    All cases are made before the first is measured, so that what can't be made is known at once. The first case of
    every cell comes first, then the second of each: a run that is stopped has measured all cells about equally.

    Args:
        methods: settled methods; `none` and `recompute` are measured in any case.
        folder: where each finished case is appended to `cases.jsonl`; a run of the same settings goes on from there.
        progress: called with what is being done, and the share that is done.

    Raises:
        InputError: bad settings, a corpus that does not give the cases, no cell that fits into the backbone, a method
            given twice, or `folder` can't be written or holds anything else than such a run.
    """
    settings.check()
    names = [UNERASED, *dict.fromkeys(["recompute", *map(str, methods)])]
    if len(set(map(str, methods))) < len(methods):
        raise InputError(f"the methods are {', '.join(map(str, methods))}: give each once")
    report = progress or (lambda _step, _share: None)
    report("making cases", 0.0)
    scheduled, left_out = _schedule(backbone, passages, settings)
    done: dict[str, list[CaseResult]] = {}
    if folder is not None:
        done = _resume(folder, _identity(backbone, passages, methods, settings, scheduled), names)
    for place, one in enumerate(scheduled):
        report(f"{one.case.task}, span {one.span} of {one.length} tokens", place / len(scheduled))
        if one.case.id in done:
            continue
        case = tokenize(backbone, one.case)
        done[one.case.id] = measure_case(backbone, case, methods, one.length, one.span)
        if folder is not None:
            _append(folder / CASES, done[one.case.id])
    return QualityRun(tuple(result for one in scheduled for result in done[one.case.id]), left_out)


def _schedule(
    backbone: Backbone, passages: Sequence[str], settings: QualitySettings
) -> tuple[list[_Scheduled], tuple[LeftOut, ...]]:
    """The cases in the order in which they are measured, and the cells that are not."""
    columns: list[list[_Scheduled]] = []
    left_out: list[LeftOut] = []
    for length, span in product(settings.lengths, settings.spans):
        if not fits(length, span):
            left_out.append(LeftOut(ALL, length, span, f"the span is over {SHARE_OF_CONTEXT:.0%} of the context"))
            continue
        # A cell of its own seed: its cases do not hang on which other cells a run has.
        seed = int.from_bytes(hashlib.sha256(f"{settings.seed}/{length}/{span}".encode()).digest()[:4])
        for task in settings.tasks:
            cases = heldout_cases(backbone, passages, task, length, span, settings.cases, seed)
            needed = max(room(tokenize(backbone, case)) for case in cases)
            if backbone.max_positions is not None and needed > backbone.max_positions:
                # Without its longest cases it would be another cell.
                reason = f"its cases take up to {needed} positions, {backbone.name} has {backbone.max_positions}"
                left_out.append(LeftOut(task, length, span, reason))
            else:
                columns.append([_Scheduled(case, length, span) for case in cases])
    if not columns:
        reasons = "; ".join(f"span {one.span} of {one.length} tokens: {one.reason}" for one in left_out)
        raise InputError(f"there is nothing to measure ({reasons}): give shorter lengths")
    return [one for row in zip(*columns, strict=True) for one in row], tuple(left_out)


def _identity(
    backbone: Backbone,
    passages: Sequence[str],
    methods: Sequence[Method],
    settings: QualitySettings,
    scheduled: Sequence[_Scheduled],
) -> dict[str, Any]:
    """What the results of two runs must agree in to be results of one."""
    eraser, corpus = hashlib.sha256(), hashlib.sha256()
    for parameter in backbone.eraser.parameters().values() if backbone.eraser else ():
        eraser.update(parameter.detach().float().cpu().numpy().tobytes())
    for passage in passages:
        corpus.update(hashlib.sha256(passage.encode()).digest())
    # The first case of every cell tells whether cases are made as they were; more of them go on in the same folder.
    first = {(one.case.task, one.length, one.span): one.case.to_json() for one in reversed(scheduled)}
    identity = asdict(settings) | {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "eraser": backbone.eraser.name if backbone.eraser else None,
        "eraser_fingerprint": eraser.hexdigest() if backbone.eraser else None,
        "methods": [repr(method) for method in methods],
        "corpus_fingerprint": corpus.hexdigest(),
        "cases_fingerprint": hashlib.sha256(repr(sorted(first.items())).encode()).hexdigest(),
        "device": backbone.device.type,
    }
    # As JSON reads it back: lists, not tuples.
    read: dict[str, Any] = json.loads(json.dumps(identity))
    return read


def _resume(folder: Path, identity: dict[str, Any], names: Sequence[str]) -> dict[str, list[CaseResult]]:
    """The complete cases by id that an earlier run left in `folder`, which is made ready for more.

    Args:
        names: of the methods that a complete case has results of.
    """
    header, lines = folder / SETTINGS, folder / CASES
    try:
        if lines.exists() and not header.exists():
            raise InputError(f"{lines} is of no quality run ({SETTINGS} is not beside it): choose another folder")
        if header.exists():
            _check_same(folder, header.read_bytes(), identity)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(header, json.dumps(identity, indent=2) + "\n")
        # What a killed process wrote of its last line ends without a line break.
        finished = lines.read_bytes().split(b"\n")[:-1] if lines.exists() else []
        done: dict[str, list[CaseResult]] = {}
        for number, line in enumerate(finished, start=1):
            try:
                result = CaseResult.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{lines}, line {number} is no result ({error!r}): remove it, or choose another folder"
                ) from error
            done.setdefault(result.case, []).append(result)
        complete = {case: results for case, results in done.items() if [one.method for one in results] == names}
        _replace(lines, "".join(_line(result) for results in complete.values() for result in results))
    except OSError as error:
        raise _unwritable(folder, error) from error
    return complete


def _check_same(folder: Path, header: bytes, identity: dict[str, Any]) -> None:
    try:
        found = dict(json.loads(header))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder / SETTINGS} can't be read ({error}): choose another folder") from error
    for key in identity:
        if key != "cases" and found.get(key) != identity[key]:
            raise InputError(
                f"{folder} holds another run: its {key} is {found.get(key)!r}, now {identity[key]!r}: "
                "choose another folder, or the same settings"
            )


def _append(lines: Path, results: Sequence[CaseResult]) -> None:
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
    measured: QualityRun, backbone: Backbone, settings: QualitySettings, methods: Sequence[Method]
) -> dict[str, Any]:
    """Rows with all that is needed to read them: settings, eraser, versions, hardware.

    Raises:
        AssertionError: the reference is not at KL 0, or the unerased cache not at fidelity 0.
    """
    rows: list[Cell] = cells(measured.results, settings.seed)
    for row in rows:
        assert row.method != "recompute" or row.kl is None or abs(row.kl) < 1e-5, row
        assert row.method != "none" or row.fidelity is None or abs(row.fidelity) < 1e-9, row
    return {
        "command": "kveraser bench quality --suite heldout",
        "settings": asdict(settings) | {"methods": [str(method) for method in methods]},
        **environment(backbone),
        "rows": [row.to_json() for row in rows],
        "left_out": [asdict(cell) for cell in measured.left_out],
    }
