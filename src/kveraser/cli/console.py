"""Output of the command line: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from kveraser.demo.run import DocumentResult

RECEIPT_COLUMNS = ["method", "exact", "seconds", "erased", "recomputed", "kl", "fidelity", "leak", "no_harm"]

EDGES, CLOSE_EDGES = 3, 2
"""Padding and border characters per column, in a table with lines and without."""
TEXT_WIDTH, LONGEST_WORD = 16, 24
"""Minimum width of a text column, and the maximum to which long words can raise it."""


def say(message: str) -> None:
    """Print a message to stderr."""
    print(message, file=sys.stderr)


def emit(payload: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print(json.dumps(payload, ensure_ascii=False))


@contextmanager
def bar(total: float | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; call it with a description and the progress so far (default: one more step)."""
    columns = [TextColumn("{task.description}"), *([BarColumn(), TimeRemainingColumn()] if total else [])]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        started = False

        def advance(step: str, fraction: float | None = None) -> None:
            nonlocal started
            if fraction is None:
                # A step is done when the next one begins.
                progress.update(task, description=escape(step), advance=1 if started else 0)
                started = True
            else:
                progress.update(task, description=escape(step), completed=fraction)

        yield advance


def table_of(title: str, columns: Sequence[str]) -> Table:
    """Returns an empty table whose first column, the row names, is never wrapped."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for place, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=place == 0)
    return table


def cell(value: Any) -> str:
    """Format a value for a table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        shown = f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
        return shown.removeprefix("-") if not shown.strip("-0.") else shown
    if isinstance(value, dict):
        return ", ".join(f"{key}={one!r}" for key, one in value.items() if one is not None and len(repr(one)) < 24)
    return escape(str(value))


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print rows as a table, followed by the reasons why rows could not be measured.

    Empty columns are left out. A table wider than the terminal is printed without borders, and then split into parts
    that each begin with the naming columns.
    """
    measured = [row for row in rows if not row.get("missing")]
    console = Console()
    shown = [column for column in columns if not measured or any(row.get(column) is not None for row in measured)]
    for number, part in enumerate(_parts(measured, shown, console.width)):
        _print_part(console, f"{title} (continued)" if number else title, measured, part)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.get("missing"):
            reasons.setdefault(row["missing"], []).append(row["method"])
    for reason, methods in reasons.items():
        console.print(escape(f"{', '.join(methods)}: {reason}"))


def _print_part(console: Console, title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    widths = [_least(rows, column) for column in columns]
    close = sum(widths) + EDGES * len(widths) + 1 > console.width
    table = Table(title=title, title_justify="left")
    if close:
        table = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
        )
    for column, width in zip(columns, widths, strict=True):
        numbers = _numbers(rows, column)
        table.add_column(
            column, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold", min_width=width
        )
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console.print(table)


def _parts(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], width: int) -> list[list[str]]:
    """Split the columns into parts that fit into `width` without borders."""
    naming = list(takewhile(lambda column: not rows or not _numbers(rows, column), columns))[:1] or list(columns[:1])
    if "method" in columns:
        naming = list(columns[: columns.index("method") + 1])
    parts: list[list[str]] = [list(naming)]
    for column in columns[len(naming) :]:
        if (
            len(parts[-1]) > len(naming)
            and sum(_least(rows, one) + CLOSE_EDGES for one in [*parts[-1], column]) > width
        ):
            parts.append(list(naming))
        parts[-1].append(column)
    return parts


def _numbers(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(isinstance(row.get(column), int | float | None) for row in rows)


def _least(rows: Sequence[Mapping[str, Any]], column: str) -> int:
    """Minimum width of a column: the longest cell for numbers and names, a few words for text."""
    cells = [cell(row.get(column)) for row in rows]
    longest = max(map(cell_len, cells), default=0)
    if not _numbers(rows, column):
        words = max((cell_len(word) for text in cells for word in text.split()), default=0)
        longest = min(longest, max(words, TEXT_WIDTH), LONGEST_WORD)
    return max(longest, cell_len(column))


def receipt_row(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a receipt as a row with its audit's figures."""
    audited = receipt["audit"] or {}
    return {**receipt} | {name: audited.get(name) for name in ("kl", "fidelity", "leak", "no_harm")}


def print_answers(
    questions: Sequence[str],
    before: Sequence[Mapping[str, str]],
    after: Sequence[Mapping[str, Any]],
    exact: Sequence[Mapping[str, str]],
) -> None:
    """Print the answers to each question: before, after each method, and by exact recomputation."""
    for index, question in enumerate(questions):
        table = table_of(escape(question), ["", "answer"])
        table.add_row("before", escape(before[index]["answer"]))
        for result in after:
            table.add_row(result["method"], escape(result["answers"][index]["answer"]))
        table.add_row("exact", escape(exact[index]["answer"]))
        Console().print(table)


def print_document(result: DocumentResult) -> None:
    """Print one document of the demo: its story, and each method's answers and cost."""
    console = Console()
    document = result.document
    console.print(f"\n[bold]{escape(document.title)}[/bold]  {result.tokens} tokens, {result.erased} erased")
    console.print(escape(document.story))
    for index, asked in enumerate([*document.questions, *document.unrelated]):
        table = table_of(escape(asked.question), ["", "answer"])
        table.add_row("before", escape(result.before[index]))
        for one in result.results:
            if one.receipt is not None:
                probes = [probe for probe in one.audit.probes if probe.kind != "leak"]
                table.add_row(one.method, escape(probes[index].edited_answer))
        console.print(table)
    print_rows(
        "Cost and forgetting",
        [one.to_json() for one in result.results],
        ["method", "exact", "seconds", "recomputed", "kl", "fidelity", "no_harm", "leak"],
    )
