"""Case files in Arrow's stream format, which `datasets.Dataset.from_file` maps into memory as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kveraser.errors import InputError

ROWS_A_BATCH = 256


def write_arrow(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write cases, as `Case` names their fields, to an `.arrow` file.

    Raises:
        InputError: pyarrow is not installed.
        OSError: it can't be written.
    """
    pa = _pyarrow(path)
    texts = pa.list_(pa.string())
    query = [("question", pa.string()), ("answer", pa.string()), ("kind", pa.string())]
    query += [("accepted", texts), ("wrong", texts)]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("task", pa.string()),
            ("context", pa.string()),
            ("span", pa.list_(pa.int64())),
            ("queries", pa.list_(pa.struct(query))),
        ]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        left = iter(rows)
        while batch := [dict(row) for row in islice(left, ROWS_A_BATCH)]:
            stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of an `.arrow` file, or of all of them in a folder, in the order of their names.

    Raises:
        InputError: missing, not in Arrow's stream format, or pyarrow is not installed.
    """
    pa = _pyarrow(path)
    files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"the folder {path} has no .arrow file: give a case file or a folder written by datasets")
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
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise InputError(f"{path} is an Arrow file, which needs `pip install kveraser[train]`") from error
    return pyarrow
