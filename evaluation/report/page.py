"""The page of a report: one HTML file without external resources."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from evaluation.report.cases import embedded
from evaluation.report.figures import Drawn
from evaluation.report.read import Results
from evaluation.report.style import MethodStyle
from kveraser.measure.case import ALL
from kveraser.measure.quality import EXACT, UNERASED

FOLDER = Path(__file__).parent
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
COLUMNS = (
    ("KL to exact", "nats per answer token, with its 95% interval"),
    ("fidelity", "1 is exact, 0 is not erased, with its 95% interval"),
    ("EM", "share of questions answered right"),
    ("EM exact", "the same of the exact reference"),
    ("recovered", "share of the questions that the span flipped to wrong which are right again, with its 95% interval"),
    ("broken", "share of the questions that were right before the erase and are wrong after it, with its 95% interval"),
    ("leak", "nats per token of erased text above the exact reference"),
    ("leak rate", "how often a secret is given away, above the exact reference"),
    ("no-harm KL", "KL where the span has no influence, nats per answer token"),
    ("tokens recomputed", "mean of an erase"),
    ("seconds", "median of an erase"),
)
IDENTITY = {
    "Backbone": ("backbone",),
    "Eraser": ("eraser",),
    "Hardware": ("device", "dtype", "threads", "machine"),
    "Commit": ("commit",),
    "Versions": ("versions",),
    "Settings": ("settings",),
}
"""Titles in the head of a report, with keys of a run's result."""
LEFT_OUT_KEYS = ("length", "span", "spans", "distance", "depth")


def make_page(
    results: Results,
    looks: Mapping[str, MethodStyle],
    figures: Sequence[Drawn],
    cases: Sequence[Mapping[str, Any]],
    per_cell: int,
) -> str:
    """Render the page. The same results give the same text.

    Args:
        looks: of `styles`.
        figures: of `draw`, embedded in the page.
        cases: of `choose`, at most `per_cell` of each cell.
    """
    style, script = ((FOLDER / f"page.{ending}").read_text("utf-8") for ending in ("css", "js"))
    return TEMPLATES.get_template("page.html").render(
        subject=results.runs[0].result["backbone"],
        style=Markup(style),
        style_hash=_hash(style),
        script=Markup(script),
        script_hash=_hash(script),
        data=Markup(embedded(browser_data(looks, cases))),
        identity=_identity(results),
        runs=_runs(results),
        summaries=[_summary(results, looks, scope) for scope in results.scopes],
        figures=[(figure, base64.b64encode(figure.png).decode()) for figure in figures],
        notes=_notes(results),
        left_out=_left_out(results.left_out),
        per_cell=per_cell,
        cases=len(cases),
        seed=results.seed,
    )


def browser_data(looks: Mapping[str, MethodStyle], cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Data of the case browser."""
    measured = dict.fromkeys(method for case in cases for method in case["methods"])
    methods = [method for method in measured if method not in (UNERASED, EXACT)] or [EXACT] * (EXACT in measured)
    return {
        "unerased": UNERASED,
        "exact": EXACT,
        "methods": [
            {"name": method, "label": looks[method].label if method in looks else method} for method in methods
        ],
        "cases": list(cases),
    }


def _hash(text: str) -> str:
    """Hash of a script or style for the page's content security policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _identity(results: Results) -> list[tuple[str, list[Markup]]]:
    """Titles with the different values of all runs."""
    listed = []
    for title, names in IDENTITY.items():
        values: dict[Markup, None] = {}
        for run in results.runs:
            found = {name: run.result[name] for name in names if run.result.get(name) is not None}
            value = _value(found if len(names) > 1 else found.get(names[0], ""))
            values[Markup(value.replace("<br>", "; "))] = None
        listed.append((title, [value for value in values if value]))
    return listed


def _runs(results: Results) -> list[tuple[str, list[Markup]]]:
    """Properties with their values in every run."""
    hidden = ("rows", "left_out", "peers", "peers_skipped", "notes", "growth", "ratios")
    names = dict.fromkeys(name for run in results.runs for name in run.result if name not in hidden)
    return [(name, [_value(run.result.get(name)) for run in results.runs]) for name in names]


def _value(value: Any) -> Markup:
    """A property's value, with lists and mappings spelled out."""
    if isinstance(value, Mapping):
        return Markup("<br>").join(
            Markup('<span class="key">{}:</span> {}').format(name, _value(one)) for name, one in value.items()
        )
    if isinstance(value, list) and value:
        if all(isinstance(one, Mapping) for one in value):
            return Markup("<br>").join(Markup(_value(one).replace("<br>", ", ")) for one in value)
        joined = ", " if all(isinstance(one, int | float) for one in value) else "; "
        return Markup(joined).join(_value(one) for one in value)
    if isinstance(value, float):
        return Markup(f"{value:g}")
    return escape("none" if value is None or value == [] else value)


def _summary(results: Results, looks: Mapping[str, MethodStyle], scope: str) -> dict[str, Any]:
    """The table of a scope, one row for every method, the unerased cache first and the exact reference last."""
    rows = {row["method"]: row for row in results.select(suite=scope)}
    order = sorted(rows, key=lambda method: (method == EXACT) - (method == UNERASED))
    cells = {method: _measures(rows[method]) for method in order}
    # A column without any value is left out.
    kept = [at for at in range(len(COLUMNS)) if any(line[at] for line in cells.values())]
    first = next(iter(rows.values()))
    return {
        "title": "All suites" if scope == ALL else scope,
        "counted": f"{first['cases']:,} cases and {first['questions']:,} questions",
        "columns": [COLUMNS[at] for at in kept],
        "rows": [
            (
                "reference" if method in (UNERASED, EXACT) else "",
                looks[method].colour,
                {UNERASED: "not erased", EXACT: f"{method} (exact)"}.get(method, method),
                [cells[method][at] or "-" for at in kept],
            )
            for method in order
        ],
    }


def _measures(row: Mapping[str, Any]) -> list[str]:
    """A row's values as text, in the order of `COLUMNS`; empty where not measured."""
    return [
        _interval(row, "kl", 4),
        _interval(row, "fidelity", 2),
        _number(row["em"], ".2f"),
        _number(row["em_exact"], ".2f"),
        _interval(row, "recovered", 2),
        _interval(row, "broken", 2),
        _number(row["leak"], "+.3f"),
        _number(row["leak_rate"], "+.2f"),
        _number(row["no_harm"], ".4f"),
        _number(row["recomputed"], ",.0f"),
        _number(row["seconds"], ".3f"),
    ]


def _number(value: float | None, form: str) -> str:
    # No minus before a rounded zero.
    return "" if value is None else re.sub(r"^[-+](?=0\.?0*$)", "", f"{value:{form}}")


def _interval(row: Mapping[str, Any], name: str, digits: int) -> str:
    value, low, high = (_number(row.get(key), f".{digits}f") for key in (name, f"{name}_low", f"{name}_high"))
    if not (value and low and high) or low == high:
        return value
    return Markup('{} <span class="interval">{} to {}</span>').format(value, low, high)


def _notes(results: Results) -> list[str]:
    """Notes on the latency figure, and what is missing from it."""
    notes = []
    for run in results.runs:
        notes += [str(note) for note in run.result.get("notes") or ()]
        if run.kind == "latency":
            notes += [f"Not timed at {one['length']} tokens: {one['reason']}" for one in run.result.get("left_out", ())]
            notes += [f"{one['peer']} did not run: {one['reason']}" for one in run.result.get("peers_skipped", ())]
    return notes


def _left_out(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Suite, task, sizes and reason of the cells that were left out, grouped by all but the sizes."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        named = [f"{name} {cell[name]:g}" for name in LEFT_OUT_KEYS if isinstance(cell[name], int | float)]
        groups.setdefault((cell["suite"], cell["task"], str(cell["reason"])), []).append(", ".join(named) or "all")
    return [(suite, task, "; ".join(sizes), reason) for (suite, task, reason), sizes in groups.items()]
