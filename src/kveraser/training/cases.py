"""Training cases: a context with a span to erase, and questions with reference answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from kveraser.errors import InputError
from kveraser.measure.case import tokenize_context
from kveraser.measure.questions import Query, QueryKind

ROWS_PER_BATCH = 256


@dataclass(frozen=True)
class Case:
    """A context, the span to erase (in characters of the context), and its queries."""

    id: str
    task: str
    context: str
    span: tuple[int, int]
    queries: tuple[Query, ...]

    def to_json(self) -> str:
        """The case as one line of a case file."""
        return json.dumps(asdict(self), ensure_ascii=False)


def _with_span_inside(case: Case) -> Case:
    if not 0 <= case.span[0] < case.span[1] <= len(case.context):
        raise ValueError(f"the span {list(case.span)} is outside the context")
    return case


_CASE = TypeAdapter(Annotated[Case, AfterValidator(_with_span_inside)])


@dataclass(frozen=True)
class CaseSizes:
    """Sizes of generated cases in words; a word of English is about 1.3 tokens.

    Attributes:
        context: shortest and longest context without the span.
        span: shortest and longest span. Lengths are log-uniform; a span is never shorter than the statement it holds.
    """

    context: tuple[int, int] = (120, 360)
    span: tuple[int, int] = (8, 760)


@dataclass(frozen=True)
class TokenizedCase:
    """A case as token ids: prefix, span and suffix are slices of one tokenization of the context.

    `queries` are pairs of prompt and answer; `kinds` holds the kind of each.
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
        """Number of tokens of the context."""
        return len(self.prefix) + len(self.span) + len(self.suffix)


def tokenize(tokenizer: Any, case: Case) -> TokenizedCase:
    """Tokenize a case as `Session` does; the span is widened to whole tokens.

    Raises:
        InputError: an answer without tokens.
        SpanError: the span is outside the context, or covers all of it.
    """
    context = tokenize_context(tokenizer, case.context)
    tokens, start = context.tokens, context.transcript.body_start
    span = context.transcript.snap(start + case.span[0], start + case.span[1])
    return TokenizedCase(
        id=case.id,
        task=case.task,
        prefix=tuple(tokens[: span.start]),
        span=tuple(tokens[span.start : span.end]),
        suffix=tuple(tokens[span.end :]),
        queries=tuple(query.tokens(tokenizer, context.turn_open, case.id) for query in case.queries),
        kinds=tuple(query.kind for query in case.queries),
    )


def read_cases(path: str | Path) -> Iterator[Case]:
    """Read the cases of a JSON Lines file, an `.arrow` file, or a folder of `.arrow` files as `datasets` writes them.

    Raises:
        InputError: the file is missing or unreadable, or a row is malformed; the message gives its number.
    """
    source = Path(path)
    arrow = source.suffix == ".arrow" or source.is_dir()
    rows: Iterator[Any] = _arrow_rows(source) if arrow else _lines(source)
    validate: Callable[[Any], Case] = _CASE.validate_python if arrow else _CASE.validate_json
    for number, row in enumerate(rows, start=1):
        try:
            case = validate(row)
        except ValidationError as error:
            raise InputError(
                f"{source}, line {number} is not a case ({error.errors()[0]['msg']}): build the file again"
            ) from error
        yield case


def arrow_from_jsonl(source: Path, target: Path) -> None:
    """Convert a JSON Lines case file to Arrow's stream format, which `datasets.Dataset.from_file` memory-maps.

    Raises:
        InputError: pyarrow is not installed.
        OSError: the target can't be written.
    """
    pa = _pyarrow(target)
    # A line must fit into a block.
    table = pa.json.read_json(str(source), pa.json.ReadOptions(block_size=1 << 26))
    with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=ROWS_PER_BATCH)


def _lines(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(
            f"no case file at {source} ({error.strerror}): build one with `kveraser data build`"
        ) from error


def _arrow_rows(source: Path) -> Iterator[dict[str, Any]]:
    pa = _pyarrow(source)
    files = sorted(source.glob("*.arrow")) if source.is_dir() else [source]
    if not files:
        raise InputError(f"the folder {source} has no .arrow file: give a case file or a folder written by datasets")
    for file in files:
        try:
            with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
                for batch in stream:
                    yield from batch.to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(
                f"can't read cases from {file} ({error}): build it again with `kveraser data build`"
            ) from error


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.json
    except ImportError as error:
        raise InputError(f"{path} is an Arrow file, which needs pyarrow: pip install 'kveraser[train]'") from error
    return pyarrow
