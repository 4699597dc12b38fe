"""Writes a report: the figures, and the page that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from evaluation.report.cases import choose
from evaluation.report.figures import FIGURES, draw
from evaluation.report.page import make_page
from evaluation.report.read import Results
from evaluation.report.style import styles
from kveraser.errors import InputError
from kveraser.files import replacing

PAGE = "index.html"


@dataclass(frozen=True)
class Written:
    """What a report consists of: its page, the pictures, and how many cases the page shows."""

    page: Path
    figures: tuple[Path, ...]
    cases: int


def write(results: Results, folder: Path, cases_per_cell: int) -> Written:
    """Write `index.html` and a PNG a figure into `folder`; figures that an earlier report left there go.

    Raises:
        InputError: the folder can't be written, or a file of cases can't be read.
    """
    looks = styles(results.methods)
    cases = choose(results.cases, cases_per_cell, results.seed)
    figures = draw(results, looks)
    page = make_page(results, looks, figures, cases, cases_per_cell)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(FIGURES) - {figure.name for figure in figures}:
            (folder / f"{name}.png").unlink(missing_ok=True)
        pictures = tuple(_replace(folder / f"{figure.name}.png", figure.png) for figure in figures)
        return Written(_replace(folder / PAGE, page.encode("utf-8")), pictures, len(cases))
    except OSError as error:
        raise InputError(f"can't write the report to {folder} ({error}): choose another folder") from error


def replace_file(target: Path, content: bytes) -> Path:
    """Write a file whole or not at all.

    Raises:
        InputError: it can't be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return _replace(target, content)
    except OSError as error:
        raise InputError(f"can't write {target} ({error}): choose another place") from error


def _replace(target: Path, content: bytes) -> Path:
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return target
