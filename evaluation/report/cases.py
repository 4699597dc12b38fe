"""Selects the cases that a page shows: in every cell those where methods differ most, and some at random."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.report.read import KEYS, parse
from kveraser.errors import InputError
from kveraser.measure.quality import EXACT, UNERASED
from kveraser.measure.results import CaseResult

SPREAD, RANDOM = "largest KL spread", "drawn at random"
SHOWN = ("id", *KEYS, "context_tokens", "erased_tokens", "distance_tokens", "before", "erased", "after")
ASKED = ("question", "kind", "expected", "tokens", "adversarial")
ANSWERED = ("kl", "answer", "correct", "leaked")


@dataclass(frozen=True)
class _Kept:
    """A case in its file: the offset of its line, and the spread of the methods' KL."""

    id: str
    file: Path
    line: int
    offset: int
    spread: float


def choose(files: Sequence[Path], per_cell: int, seed: int) -> list[dict[str, Any]]:
    """Choose the cases to show, as plain values, in the order of their cells.

    Args:
        files: of cases, one on each line.
        per_cell: maximum cases of a cell. The larger half are those with the largest KL spread, the difference between
            the methods' highest and lowest KL per answer token. The others are drawn at random.
        seed: of the draw.

    Raises:
        InputError: a file that can't be read or contains anything else than cases.
    """
    cells: dict[tuple[Any, ...], list[_Kept]] = {}
    for file in files:
        try:
            with file.open("rb") as lines:
                offset = 0
                for number, line in enumerate(lines, start=1):
                    if not line.endswith(b"\n"):
                        # A killed run left an incomplete line, and measures that case again.
                        break
                    case = _read_case(file, number, line)
                    kept = _Kept(case["id"], file, number, offset, _spread(case))
                    cells.setdefault(tuple(case[key] for key in KEYS), []).append(kept)
                    offset += len(line)
        except OSError as error:
            raise InputError(f"can't read {file} ({error}): give the folder of a run") from error
    chosen: list[tuple[_Kept, str]] = []
    for cell, kept_cases in cells.items():
        ordered = sorted(kept_cases, key=lambda kept: (-kept.spread, kept.id))
        widest = ordered[: (per_cell + 1) // 2]
        others = sorted(ordered[len(widest) :], key=lambda kept: kept.id)
        drawn = random.Random(f"{seed}/{cell}").sample(others, min(per_cell - len(widest), len(others)))
        chosen += [(kept, SPREAD) for kept in widest] + [(kept, RANDOM) for kept in drawn]
    shown = []
    for kept, reason in chosen:
        with kept.file.open("rb") as lines:
            lines.seek(kept.offset)
            case = _read_case(kept.file, kept.line, lines.readline())
        shown.append(_shown(case, reason))
    return shown


def _read_case(file: Path, number: int, line: bytes) -> dict[str, Any]:
    """Read and check a line."""
    place = f"line {number} of {file}"
    case = parse(line.decode("utf-8", "replace"), place)
    try:
        result = CaseResult.from_json(case)
        answered = {len(result.methods[method].answers) for method in (UNERASED, EXACT, *result.methods)}
    except (KeyError, ValueError) as error:
        raise InputError(f"{place} is not a case ({error!r}): measure the run again with this version") from error
    if answered != {len(result.questions)} or not result.questions:
        raise InputError(f"{place} does not have an answer for every question: measure the run again")
    return dict(case)


def _spread(case: Mapping[str, Any]) -> float:
    """Highest minus lowest KL per answer token of the methods, on influence questions, or else on all."""
    influence = [at for at, question in enumerate(case["questions"]) if question["kind"] == "influence"]
    kls = []
    for method, measured in case["methods"].items():
        compared = [
            (measured["answers"][at]["kl"], case["questions"][at]["tokens"])
            for at in influence or range(len(case["questions"]))
            if measured["answers"][at]["kl"] is not None
        ]
        if method not in (UNERASED, EXACT) and compared:
            kls.append(sum(kl for kl, _ in compared) / max(1, sum(tokens for _, tokens in compared)))
    return float(max(kls, default=0.0) - min(kls, default=0.0))


def _shown(case: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {
        **{name: case[name] for name in SHOWN},
        "chosen": reason,
        "questions": [{name: question[name] for name in ASKED} for question in case["questions"]],
        "methods": {
            method: {
                "seconds": measured.get("seconds"),
                "recomputed": measured.get("recomputed"),
                "answers": [
                    {name: answer.get(name) for name in (*ANSWERED, "prompt")} for answer in measured["answers"]
                ],
            }
            for method, measured in case["methods"].items()
        },
    }


def embedded(payload: Any) -> str:
    """JSON for a page's script element, with `<`, `>` and `&` escaped."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
