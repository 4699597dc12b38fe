"""Training cases: a context with a span to erase, and questions with the answers that are forced on both caches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kveraser.errors import InputError
from kveraser.files import replacing
from kveraser.measure.questions import Query, QueryKind
from kveraser.model.backbone import Backbone
from kveraser.text import chat
from kveraser.text.spans import Span, Transcript
from kveraser.training.arrow import read_arrow


@dataclass(frozen=True)
class Case:
    """A context, the span to erase (in characters of the context), and its queries."""

    id: str
    task: str
    context: str
    span: tuple[int, int]
    queries: tuple[Query, ...]

    def to_json(self) -> str:
        """One line of a case file."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True)
class TokenizedCase:
    """A case as tokens: prefix, span and suffix are cut out of one tokenization, as an erase sees them.

    `queries` are `(prompt, answer)` token ids; `kinds`, and `accepted` and `wrong` unless empty, are one a query.
    """

    id: str
    task: str
    prefix: tuple[int, ...]
    span: tuple[int, ...]
    suffix: tuple[int, ...]
    queries: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    kinds: tuple[QueryKind, ...]
    accepted: tuple[tuple[str, ...], ...] = ()
    wrong: tuple[tuple[str, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return len(self.prefix) + len(self.span) + len(self.suffix)


def tokenize(backbone: Backbone, case: Case) -> TokenizedCase:
    """Cut a case into tokens exactly as `Session` does: see `tokenize_with`."""
    return tokenize_with(backbone.tokenizer, case)


def tokenize_with(tokenizer: Any, case: Case) -> TokenizedCase:
    """Cut a case into tokens, without a model: one tokenization, the span snapped outwards.

    Raises:
        InputError: an answer without tokens.
        SpanError: the span lies outside the context, or is all of it.
    """
    templated = chat.has_template(tokenizer)
    read = chat.document(tokenizer, case.context)
    transcript = Transcript()
    transcript.append(read.text, read.tokens, read.offsets)
    span: Span = transcript.snap(read.body_start + case.span[0], read.body_start + case.span[1])
    tokens = transcript.tokens
    return TokenizedCase(
        id=case.id,
        task=case.task,
        prefix=tuple(tokens[: span.start]),
        span=tuple(tokens[span.start : span.end]),
        suffix=tuple(tokens[span.end :]),
        queries=tuple(query.tokens(tokenizer, templated, case.id) for query in case.queries),
        kinds=tuple(query.kind for query in case.queries),
        accepted=tuple(query.accepted for query in case.queries),
        wrong=tuple(query.wrong for query in case.queries),
    )


def write_cases(path: str | Path, cases: Iterable[Case]) -> int:
    """Write a case file, a JSON object a line, by temporary name and atomic rename. Returns the number of cases.

    Raises:
        InputError: it can't be written; an earlier file stays.
    """
    target = Path(path)
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
            for case in cases:
                file.write(case.to_json() + "\n")
                written += 1
    except OSError as error:
        raise InputError(f"can't write cases to {target} ({error}): free space or choose another place") from error
    return written


def read_cases(path: str | Path) -> Iterator[Case]:
    """The cases of a file: JSON lines, or Arrow (`.arrow`, or a folder of such files, as `datasets` writes it).

    Raises:
        InputError: the file is missing, or a line is malformed (its number is named).
    """
    source = Path(path)
    arrow = source.suffix == ".arrow" or source.is_dir()
    rows: Iterator[Any] = read_arrow(source) if arrow else _lines(source)
    for number, row in enumerate(rows, start=1):
        try:
            case = _case(row if arrow else json.loads(row))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source}, line {number} is not a case ({error!r}): build the file again") from error
        yield case


def _lines(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(
            f"no case file at {source} ({error.strerror}): build one with `kveraser data build`"
        ) from error


def _case(fields: dict[str, Any]) -> Case:
    start, end = fields["span"]
    if not 0 <= start < end <= len(fields["context"]):
        raise ValueError(f"the span [{start}, {end}) lies outside the context")
    return Case(
        id=fields["id"],
        task=fields["task"],
        context=fields["context"],
        span=(start, end),
        queries=tuple(_query(query) for query in fields["queries"]),
    )


def _query(fields: dict[str, Any]) -> Query:
    # JSON has lists only.
    listed: dict[str, Any] = {name: tuple(fields[name]) for name in ("accepted", "wrong") if name in fields}
    return Query(**{**fields, **listed})
