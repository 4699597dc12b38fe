"""What the command line prints: results on stdout, messages and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from kveraser.demo.run import DocumentResult

RECEIPT_COLUMNS = ["method", "exact", "seconds", "erased", "recomputed", "kl", "fidelity", "leak", "no_harm"]


def say(message: str) -> None:
    """A message, on stderr."""
    print(message, file=sys.stderr)


def emit(payload: Mapping[str, Any]) -> None:
    """One JSON object, on stdout."""
    print(json.dumps(payload, ensure_ascii=False))


@contextmanager
def bar(total: float | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; call it with what is being done, and how far (default: one step further)."""
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
    """An empty table."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={one!r}" for key, one in value.items() if one is not None and len(repr(one)) < 24)
    return escape(str(value))


def print_rows(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Rows as a table; below it, of rows that could not be measured, the reasons."""
    measured = [row for row in rows if not row.get("missing")]
    table = Table(title=title, title_justify="left")
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in measured)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold")
    for row in measured:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console = Console()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.get("missing"):
            reasons.setdefault(row["missing"], []).append(row["method"])
    for reason, methods in reasons.items():
        console.print(escape(f"{', '.join(methods)}: {reason}"))


def receipt_row(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt with its audit's figures beside its own."""
    audited = receipt["audit"] or {}
    return {**receipt} | {name: audited.get(name) for name in ("kl", "fidelity", "leak", "no_harm")}


def print_answers(
    questions: Sequence[str],
    before: Sequence[Mapping[str, str]],
    after: Sequence[Mapping[str, Any]],
    exact: Sequence[Mapping[str, str]],
) -> None:
    """The answers to each question, before, after by every method, and exact."""
    for index, question in enumerate(questions):
        table = table_of(escape(question), ["", "answer"])
        table.add_row("before", escape(before[index]["answer"]))
        for result in after:
            table.add_row(result["method"], escape(result["answers"][index]["answer"]))
        table.add_row("exact", escape(exact[index]["answer"]))
        Console().print(table)


def print_document(result: DocumentResult) -> None:
    """One document of the demo: its story, the answers by every method, and what each cost."""
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
