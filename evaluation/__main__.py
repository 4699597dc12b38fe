"""`python -m evaluation`: measure this repository's suites, peers, training and server, and render the results."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from evaluation import tables as documents
from evaluation.commands_frontier import frontier
from evaluation.commands_influence import influence
from evaluation.commands_latency import latency
from evaluation.commands_quality import quality
from evaluation.commands_report import report
from evaluation.commands_serving import serve
from evaluation.commands_training import train
from kveraser.cli.main import run_app

app = typer.Typer(
    help="Measure methods on the suites of this repository, and render its figures and tables.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (quality, latency, frontier, influence, report, train, serve):
    app.command()(command)


@app.command()
def tables(check: Annotated[bool, typer.Option("--check", help="Only say which differ.")] = False) -> None:
    """Render the tables of README and docs from docs/results."""
    sys.exit(documents.main(["--check"] if check else []))


def main() -> None:
    """Entry point."""
    run_app(app)


if __name__ == "__main__":
    main()
