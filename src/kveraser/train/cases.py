"""Training cases: a context with a span to erase, and questions with the answers that are forced on both caches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kveraser import chat
from kveraser.backbone import Backbone
from kveraser.errors import InputError
from kveraser.spans import Span, Transcript

QueryKind = Literal["influence", "no_harm"]


@dataclass(frozen=True)
class Query:
    """One question and the text that is forced as its answer.

    Attributes:
        question: the user's words; None continues the context itself.
        answer: the text whose tokens are compared; with no question, what would follow the context.
        kind: `influence` (the span may steer it) or `no_harm` (the span never touched it).
    """

    question: str | None
    answer: str
    kind: QueryKind = "influence"


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

    `queries` are `(prompt, answer)` token ids; `weights` has one number a query.
    """

    id: str
    task: str
    prefix: tuple[int, ...]
    span: tuple[int, ...]
    suffix: tuple[int, ...]
    queries: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    kinds: tuple[QueryKind, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the context."""
        return len(self.prefix) + len(self.span) + len(self.suffix)


CONTINUED_TOKENS = 4
"""Tokens of a continuation that are given, since the first one is predicted by a token inside the cache."""


def tokenize(backbone: Backbone, case: Case) -> TokenizedCase:
    """Cut a case into tokens exactly as `Session` does: one tokenization, the span snapped outwards.

    Raises:
        InputError: the span lies outside the context, or is all of it.
    """
    tokenizer = backbone.tokenizer
    templated = chat.has_template(tokenizer)
    opening = chat.first_turn_frame(tokenizer).opening if templated else ""
    transcript = Transcript()
    transcript.append(opening + case.context, *backbone.tokenize(opening + case.context, special=not templated))
    span: Span = transcript.snap(len(opening) + case.span[0], len(opening) + case.span[1])
    queries = []
    for query in case.queries:
        answer = backbone.tokenize(query.answer)[0]
        if query.question is None:
            prompt, answer = answer[:CONTINUED_TOKENS], answer[CONTINUED_TOKENS:]
        else:
            prompt = backbone.tokenize(chat.question_text(tokenizer, query.question, templated))[0]
        if not answer:
            raise InputError(f"case {case.id}: the answer {query.answer!r} has no tokens to compare: make it longer")
        queries.append((tuple(prompt), tuple(answer)))
    tokens = transcript.tokens
    return TokenizedCase(
        id=case.id,
        task=case.task,
        prefix=tuple(tokens[: span.start]),
        span=tuple(tokens[span.start : span.end]),
        suffix=tuple(tokens[span.end :]),
        queries=tuple(queries),
        kinds=tuple(query.kind for query in case.queries),
    )


def write_cases(path: str | Path, cases: Iterable[Case]) -> int:
    """Write a case file, a JSON object a line, by temporary name and atomic rename. Returns the number of cases.

    Raises:
        InputError: it can't be written; an earlier file stays.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    written = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            for case in cases:
                file.write(case.to_json() + "\n")
                written += 1
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"can't write cases to {target} ({error}): free space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return written


def read_cases(path: str | Path) -> Iterator[Case]:
    """The cases of a file.

    Raises:
        InputError: the file is missing, or a line is malformed (its number is named).
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"no case file at {source}: build one with `kveraser data build`")
    with source.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _case(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{source}, line {number} is not a case ({error!r}): build the file again") from error


def _case(fields: dict[str, Any]) -> Case:
    start, end = fields["span"]
    if not 0 <= start < end <= len(fields["context"]):
        raise ValueError(f"the span [{start}, {end}) lies outside the context")
    return Case(
        id=fields["id"],
        task=fields["task"],
        context=fields["context"],
        span=(start, end),
        queries=tuple(Query(**query) for query in fields["queries"]),
    )
