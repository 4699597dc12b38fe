"""`python -m evaluation report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli.console import emit, print_rows, say
from kveraser.cli.options import Json

SUMMARY = ["method", "recomputed", "kl", "fidelity", "em", "leak"]


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, run.json files and results of bench latency.")],
    output: Annotated[Path, typer.Option(help="Folder of the page and its figures.")] = Path("report"),
    cases_per_cell: Annotated[int, typer.Option(min=0, help="Most cases of a cell that the page shows.")] = 5,
    json_output: Json = False,
) -> None:
    """Make figures and a page of measured runs, to be read in a browser without a network."""
    from evaluation.report.read import read
    from evaluation.report.write import write

    results = read(runs)
    written = write(results, output, cases_per_cell)
    summary = [row for scope in results.scopes for row in results.select(suite=scope)]
    if json_output:
        figures = [str(figure) for figure in written.figures]
        emit({"page": str(written.page), "figures": figures, "cases": written.cases, "rows": summary})
        return
    if results.scopes:
        print_rows("Summary", results.select(suite=results.scopes[0]), SUMMARY)
    say(f"Page: {written.page}, {len(written.figures)} figures, {written.cases} cases")
