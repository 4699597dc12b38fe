"""Reads results of quality and latency runs, and checks that they belong together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kveraser.errors import InputError
from kveraser.measure.case import ALL
from kveraser.measure.rows import AXES

KEYS = AXES
RUN, LATENCY, CASES = "run.json", "latency.json", "cases.jsonl"
QUALITY_MEASURES = (
    "em", "em_exact", "em_unerased", "kl", "kl_low", "kl_high", "kl_unerased", "fidelity", "fidelity_low",
    "fidelity_high", "leak", "leak_rate", "no_harm", "seconds", "recomputed",
)  # fmt: skip
FINGERPRINT = "backbone_fingerprint"
COUNTS = ("cases", "questions")
LATENCY_MEASURES = ("context", "span", "seconds", "floor_seconds")
PEER_MEASURES = ("context", "span", "seconds")

KINDS = {
    "kveraser evaluate": "quality",
    "python -m evaluation quality": "quality",
    "kveraser bench latency": "latency",
    "python -m evaluation latency": "latency",
}
"""The form of a result, by the command that wrote it."""


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        kind: quality or latency.
        result: the contents of the file.
        cases: the file of a quality run's cases, if it exists.
    """

    source: Path
    kind: str
    result: Mapping[str, Any]
    cases: Path | None


@dataclass(frozen=True)
class Results:
    """Runs that belong together.

    Attributes:
        rows: of the quality runs; of several runs, without the rows over all suites.
        methods: of all rows, in the order of the runs, the exact reference and the unerased cache included.
        latency, peers: rows of methods and of other engines.
    """

    runs: tuple[Run, ...]
    methods: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]
    left_out: tuple[Mapping[str, Any], ...]
    latency: tuple[Mapping[str, Any], ...]
    peers: tuple[Mapping[str, Any], ...]

    @property
    def cases(self) -> list[Path]:
        """The files of cases."""
        return [run.cases for run in self.runs if run.cases is not None]

    @property
    def seed(self) -> int:
        """Of the quality runs; 0 without one."""
        return next((int(run.result["settings"]["seed"]) for run in self.runs if run.kind == "quality"), 0)

    def select(self, **wanted: Any) -> list[Mapping[str, Any]]:
        """Rows with these keys. Keys that are not given must be `all`."""
        keys = dict.fromkeys(KEYS, ALL) | wanted
        return [row for row in self.rows if all(row[key] == value for key, value in keys.items())]

    @property
    def suites(self) -> list[str]:
        """Suites with rows, in their order."""
        return list(dict.fromkeys(row["suite"] for row in self.rows if row["suite"] != ALL))

    @property
    def scopes(self) -> list[str]:
        """Scopes of summaries: all suites together where one run measured several, then each suite."""
        return [ALL] * (len(self.suites) > 1 and bool(self.select())) + self.suites


def read(paths: Sequence[Path]) -> Results:
    """Read run folders, `run.json` files and latency results, and combine them.

    Raises:
        InputError: no file, a file that can't be read or is not a result, runs of different backbones, erasers or
            settings, or a cell that was measured twice.
    """
    if not paths:
        raise InputError("no run is given: name a run's folder, a run.json or a latency.json")
    runs = tuple(_read_run(path) for path in paths)
    quality = [run for run in runs if run.kind == "quality"]
    latency = [run for run in runs if run.kind == "latency"]
    for one, other in pairwise(runs):
        _check_same(one, other, ("backbone", "eraser"))
    for one, other in pairwise(quality):
        _check_same(one, other, ("dtype", FINGERPRINT, "seed", "methods", "versions"))
    # Seconds compare only on one machine.
    for one, other in pairwise(latency):
        _check_same(one, other, ("dtype", FINGERPRINT, "device", "threads", "machine", "versions"))
    rows = [(run, row) for run in quality for row in run.result["rows"]]
    if len(quality) > 1:
        rows = [(run, row) for run, row in rows if row["suite"] != ALL]
    timed = [(run, row) for run in latency for row in run.result["rows"]]
    peers = [(run, row) for run in latency for row in run.result.get("peers", ())]
    _check_once(rows, (*KEYS, "method"))
    _check_once(timed, ("method", "context", "span"))
    _check_once(peers, ("peer", "operation", "context", "span"))
    return Results(
        runs=runs,
        methods=tuple(dict.fromkeys(row["method"] for _, row in [*rows, *timed])),
        rows=tuple(row for _, row in rows),
        left_out=tuple(cell for run in quality for cell in run.result.get("left_out", ())),
        latency=tuple(row for _, row in timed),
        peers=tuple(row for _, row in peers),
    )


def parse(text: str, source: str) -> Any:
    """Parse JSON without NaN and infinity, which browsers can't read.

    Raises:
        InputError: it is not such JSON. The message names `source`.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        raise InputError(f"{source} is not a result ({error}): give one that kveraser or evaluation wrote") from error


def read_text(source: Path) -> str:
    """A result file's text.

    Raises:
        InputError: it can't be read.
    """
    try:
        return source.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read {source} ({error}): give a run's folder or its run.json") from error


def _read_run(path: Path) -> Run:
    source = path
    if path.is_dir():
        source = next((path / name for name in (RUN, LATENCY) if (path / name).is_file()), path)
        if source is path:
            raise InputError(f"{path} holds no {RUN} and no {LATENCY}: give the folder of a run that has ended")
    result = parse(read_text(source), str(source))
    if not isinstance(result, dict):
        raise InputError(f"{source} holds a {type(result).__name__}, not a result: give one that kveraser wrote")
    command = str(result.get("command"))
    if command not in KINDS:
        raise InputError(f"{source} is of {command!r}: give a result of {', '.join(KINDS)}")
    kind = KINDS[command]
    _check_form(source, kind, result)
    cases = source.with_name(CASES)
    return Run(source, kind, result, cases if kind == "quality" and cases.is_file() else None)


def _check_form(source: Path, kind: str, result: Mapping[str, Any]) -> None:
    """Check that a result has all keys that the figures and the page read."""
    for name, form in (("backbone", str), ("eraser", object), ("settings", dict), ("rows", list), ("versions", dict)):
        if not isinstance(result.get(name, ...), form) or result.get(name, ...) is ...:
            raise InputError(f"{source} has no {name!r}: measure it again with this version")
    for name in ("rows", "left_out", "peers", "peers_skipped"):
        if not isinstance(result.get(name, []), list) or not all(isinstance(row, dict) for row in result.get(name, [])):
            raise InputError(f"{source}: {name!r} is no list of rows: measure it again with this version")
    if kind == "latency":
        _check_rows(source, "row", result["rows"], ("method",), LATENCY_MEASURES, missing=())
        _check_rows(source, "peer", result.get("peers", []), ("peer", "operation"), PEER_MEASURES, missing=("seconds",))
        _check_rows(source, "left-out length", result.get("left_out", []), ("length", "reason"), (), missing=())
        _check_rows(source, "skipped peer", result.get("peers_skipped", []), ("peer", "reason"), (), missing=())
        return
    settings = result["settings"]
    if not isinstance(settings.get("seed"), int) or not isinstance(settings.get("methods"), list):
        raise InputError(f"{source}: its settings have no seed or no methods: measure it again with this version")
    _check_rows(
        source, "row", result["rows"], (*KEYS, "method"), (*QUALITY_MEASURES, *COUNTS), missing=QUALITY_MEASURES
    )
    _check_rows(source, "left-out cell", result.get("left_out", []), (*KEYS, "reason"), (), missing=())


def _check_rows(
    source: Path,
    what: str,
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    measures: Sequence[str],
    missing: Sequence[str],
) -> None:
    """Check that rows have their keys and numbers for their measures; measures in `missing` may be None."""
    for number, row in enumerate(rows):
        absent = [name for name in (*keys, *measures) if name not in row]
        if absent:
            raise InputError(f"{source}: {what} {number} has no {absent[0]!r}: measure it again with this version")
        texts = [name for name in ("suite", "task", "method", "peer", "operation") if name in keys]
        numbers = [name for name in ("length", "span", "spans", "distance", "depth") if name in keys]
        for name in (*texts, *numbers, *measures):
            value = row[name]
            number_fits = isinstance(value, int | float) or (value is None and name in (*missing, *numbers))
            if not (isinstance(value, str) if name in texts else number_fits or (name in numbers and value == ALL)):
                raise InputError(f"{source}: {what} {number} has {name} {value!r}: measure it again with this version")


def _check_same(one: Run, other: Run, names: Sequence[str]) -> None:
    """Check that two runs have equal values of these keys of the result or of its settings."""
    for name in names:
        first, second = (run.result.get(name, run.result["settings"].get(name)) for run in (one, other))
        if name == FINGERPRINT and None in (first, second):
            # Results of earlier versions identify models by name.
            continue
        if name == "methods":
            first, second = sorted(first), sorted(second)
        for key, value, differing in _differences(name, first, second):
            raise InputError(
                f"{one.source} and {other.source} don't belong together: {key} is {value!r} in one and {differing!r} "
                "in the other. Report them apart, or measure one again"
            )


def _differences(key: str, first: Any, second: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for name in dict.fromkeys([*first, *second]):
            yield from _differences(f"{key}.{name}", first.get(name), second.get(name))
    elif first != second:
        yield key, first, second


def _check_once(rows: Sequence[tuple[Run, Mapping[str, Any]]], keys: Sequence[str]) -> None:
    seen: dict[tuple[Any, ...], Run] = {}
    for run, row in rows:
        cell = tuple(row[key] for key in keys)
        if cell in seen:
            named = ", ".join(f"{key} {value}" for key, value in zip(keys, cell, strict=True) if value is not None)
            raise InputError(
                f"{seen[cell].source} and {run.source} both measure the same cell ({named}): give one of them"
            )
        seen[cell] = run
