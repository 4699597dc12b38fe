"""Which cases a page shows: of every cell those where the methods differ most, and some drawn at random."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.report.read import EXACT, KEYS, UNERASED, parse
from kveraser.errors import InputError

SPREAD, RANDOM = "largest KL spread", "drawn at random"
SHOWN = ("id", *KEYS, "context_tokens", "erased_tokens", "distance_tokens", "before", "erased", "after")
ASKED = ("question", "kind", "expected", "tokens", "adversarial")
ANSWERED = ("kl", "answer", "correct", "leaked")


@dataclass(frozen=True)
class _Kept:
    """A case in its file: where its line begins, and how far the methods are apart."""

    id: str
    file: Path
    line: int
    offset: int
    spread: float


def choose(files: Sequence[Path], per_cell: int, seed: int) -> list[dict[str, Any]]:
    """The cases to show, as plain values, in the order of their cells.

    Args:
        files: of cases, a line each.
        per_cell: most cases of a cell. The larger half are those with the largest KL spread: the difference between the
            methods' highest and lowest KL per answer token. The others are drawn at random.
        seed: of the draw.

    Raises:
        InputError: a file that can't be read or holds anything else than cases.
    """
    cells: dict[tuple[Any, ...], list[_Kept]] = {}
    for file in files:
        try:
            with file.open("rb") as lines:
                offset = 0
                for number, line in enumerate(lines, start=1):
                    if not line.endswith(b"\n"):
                        # A run that was killed wrote half of it, and will measure that case again.
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
    """A line of cases, with everything that the page shows."""
    place = f"line {number} of {file}"
    case = parse(line.decode("utf-8", "replace"), place)
    try:
        questions, methods = case["questions"], case["methods"]
        texts = [case[name] for name in ("id", "suite", "task", "before", "after")] + list(case["erased"])
        answers = [
            answer[name]
            for method in (UNERASED, EXACT, *methods)
            for answer, _ in zip(methods[method]["answers"], questions, strict=True)
            for name in ANSWERED
        ]
        asked = [question[name] for question in questions for name in ASKED]
        # An adversary asks each cache in other words, so that there is no KL.
        kls = [kl for kl in answers[:: len(ANSWERED)] if kl is not None]
        numbers = [question["tokens"] for question in questions] + kls
        complete = all(name in case for name in SHOWN) and len(asked) > 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{place} is not a case ({error!r}): measure the run again with this version") from error
    if not complete or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place} is not a case: measure the run again with this version")
    if not all(isinstance(number, int | float) for number in numbers):
        raise InputError(f"{place} has a KL or a number of tokens that is none: measure the run again")
    return dict(case)


def _spread(case: Mapping[str, Any]) -> float:
    """The methods' highest KL per answer token less their lowest, on questions that feel the span, or else on all."""
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
    """JSON that may stand in a page's script element whatever its texts hold: no `<`, `>` or `&` is left in it."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
