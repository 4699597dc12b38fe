"""Read passages from a hub dataset, a JSONL file or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kveraser.errors import InputError

DEFAULT_CORPUS = "wikimedia/wikipedia"
DEFAULT_SUBSET = "20231101.en"
SHORTEST_PASSAGE = 40
"""Fewest characters of a passage; shorter ones are skipped."""


def read_passages(source: str, limit: int | None = None, column: str = "text") -> list[str]:
    """Read the passages of a corpus, in order.

    Args:
        source: a `.jsonl` file with a text column, a plain text file (passages between blank lines), or the name of a
            hub dataset (`owner/name`, or `owner/name:subset`).
        limit: maximum number of passages.
        column: the text column of JSONL files and datasets.

    Raises:
        InputError: not found, not text, a malformed line (the message gives its number), or no passage long enough.
    """
    path = Path(source)
    if path.is_file():
        texts = _from_jsonl(path, column) if path.suffix == ".jsonl" else _from_text(path)
    else:
        texts = _from_hub(source, column)
    passages: list[str] = []
    for text in texts:
        plain = " ".join(text.split())
        if len(plain) >= SHORTEST_PASSAGE:
            passages.append(plain)
        if limit is not None and len(passages) >= limit:
            break
    if not passages:
        raise InputError(f"{source} has no passage of {SHORTEST_PASSAGE} characters or more: give a longer corpus")
    return passages


def _from_jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        try:
            row: Any = json.loads(line)
            text = row[column]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}, line {number} has no text column {column!r} ({error!r}): name it, or fix the line"
            ) from error
        if not isinstance(text, str):
            raise InputError(f"{path}, line {number}: column {column!r} holds {type(text).__name__}, not text")
        yield text


def _from_text(path: Path) -> Iterator[str]:
    yield from _text(path).split("\n\n")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror}): check the path") from error


def _from_hub(source: str, column: str) -> Iterator[str]:
    name, _, subset = source.partition(":")
    if name == DEFAULT_CORPUS and not subset:
        subset = DEFAULT_SUBSET
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} is not a file, and hub datasets need pip install 'kveraser[train]'") from error
    try:
        rows = datasets.load_dataset(name, subset or None, split="train", streaming=True)
        for row in rows:
            yield str(row[column])
    except KeyError as error:
        raise InputError(f"the dataset {source} has no column {column!r}: name its text column") from error
    except Exception as error:
        raise InputError(
            f"{source} is neither a file nor a loadable dataset ({type(error).__name__}): "
            "check the name and the connection, or give a local .jsonl or text file"
        ) from error
