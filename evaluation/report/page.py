"""The page of a report: one HTML file that holds everything it shows."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from evaluation.report.cases import embedded
from evaluation.report.figures import Drawn
from evaluation.report.read import Results
from evaluation.report.style import MethodStyle
from kveraser.measure.case import ALL
from kveraser.measure.quality import EXACT, UNERASED

PLACE = re.compile(r"\{\{(\w+)\}\}")
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
"""What a report's head says, and where a run has it."""
LEFT_OUT_KEYS = ("length", "span", "spans", "distance", "depth")


def make_page(
    results: Results,
    looks: Mapping[str, MethodStyle],
    figures: Sequence[Drawn],
    cases: Sequence[Mapping[str, Any]],
    per_cell: int,
) -> str:
    """The page's text; the same results give the same text.

    Args:
        looks: of `styles`.
        figures: of `draw`, which go into the page.
        cases: of `choose`, at most `per_cell` of a cell.
    """
    templates = resources.files("evaluation.report")
    page, style, script = ((templates / f"page.{ending}").read_text("utf-8") for ending in ("html", "css", "js"))
    data = browser_data(looks, cases)
    parts = {
        "subject": html.escape(str(results.runs[0].result["backbone"])),
        "style": style,
        "style_hash": _hash(style),
        "script": script,
        "script_hash": _hash(script),
        "data": embedded(data),
        "identity": _identity(results),
        "runs": _runs(results),
        "summaries": "".join(_summary(results, looks, scope) for scope in results.scopes) or _nothing("quality"),
        "figures": "".join(_figure(figure) for figure in figures),
        "notes": "".join(f"<p>{html.escape(note)}</p>" for note in _notes(results)),
        "left_out": _left_out(results.left_out),
        "per_cell": str(per_cell),
        "cases": str(len(cases)),
        "seed": str(results.seed),
    }
    # One pass: what is filled in is not read for places again.
    return PLACE.sub(lambda match: parts[match.group(1)], page)


def browser_data(looks: Mapping[str, MethodStyle], cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the case browser reads."""
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
    """What the page's policy lets run: this very text."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _nothing(what: str) -> str:
    return f"<p>No {what} run is part of this report.</p>"


def _identity(results: Results) -> str:
    """What was measured, on what: each value once, though several runs have it."""
    lines = []
    for title, names in IDENTITY.items():
        values: dict[str, None] = {}
        for run in results.runs:
            found = {name: run.result[name] for name in names if run.result.get(name) is not None}
            values[_value(found if len(names) > 1 else found.get(names[0], "")).replace("<br>", "; ")] = None
        lines.append(f"<dt>{title}</dt><dd>{'<br>'.join(value for value in values if value) or 'none'}</dd>")
    return "".join(lines)


def _runs(results: Results) -> str:
    """A row a property, a column a run."""
    hidden = ("rows", "left_out", "peers", "peers_skipped", "notes", "growth", "ratios")
    names = dict.fromkeys(name for run in results.runs for name in run.result if name not in hidden)
    rows = []
    for name in names:
        cells = "".join(f"<td>{_value(run.result.get(name))}</td>" for run in results.runs)
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>')
    return f"<tbody>{''.join(rows)}</tbody>"


def _value(value: Any) -> str:
    """A property's value: lists and mappings spelled out."""
    if isinstance(value, Mapping):
        return "<br>".join(
            f'<span class="key">{html.escape(str(name))}:</span> {_value(one)}' for name, one in value.items()
        )
    if isinstance(value, list) and value:
        if all(isinstance(one, Mapping) for one in value):
            return "<br>".join(_value(one).replace("<br>", ", ") for one in value)
        joined = ", " if all(isinstance(one, int | float) for one in value) else "; "
        return joined.join(_value(one) for one in value)
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None or value == [] else html.escape(str(value))


def _summary(results: Results, looks: Mapping[str, MethodStyle], scope: str) -> str:
    """A scope's table, a row a method, the references first and last."""
    rows = {row["method"]: row for row in results.select(suite=scope)}
    order = sorted(rows, key=lambda method: (method == EXACT) - (method == UNERASED))
    # A measure that no method has is no column.
    cells = {method: _measures(rows[method]) for method in order}
    kept = [at for at in range(len(COLUMNS)) if any(line[at] != "" for line in cells.values())]
    heads = "".join(
        f'<th scope="col" title="{html.escape(COLUMNS[at][1])}">{html.escape(COLUMNS[at][0])}</th>' for at in kept
    )
    lines = []
    for method in order:
        kind = ' class="reference"' if method in (UNERASED, EXACT) else ""
        name = {UNERASED: "not erased", EXACT: f"{method} (exact)"}.get(method, method)
        values = "".join(f"<td>{cells[method][at] or '-'}</td>" for at in kept)
        swatch = (
            f'<svg class="swatch" aria-hidden="true"><rect width="10" height="10" fill="{looks[method].colour}"/></svg>'
        )
        lines.append(
            f'<tr{kind}><th scope="row" class="method">{swatch}<code>{html.escape(name)}</code></th>{values}</tr>'
        )
    first = next(iter(rows.values()))
    title = "All suites" if scope == ALL else html.escape(scope)
    counted = f"{first['cases']:,} cases and {first['questions']:,} questions"
    table = (
        f'<table><caption>{title}: {counted}</caption><thead><tr><th scope="col">method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
    scrolled = f'<div class="scroll" role="region" tabindex="0" aria-label="Summary: {title}">{table}</div>'
    return scrolled if scope == results.scopes[0] else f"<details><summary>{title}</summary>{scrolled}</details>"


def _measures(row: Mapping[str, Any]) -> list[str]:
    """A row's figures as text, in the order of `COLUMNS`; empty where it was not measured."""
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
    # Rounding leaves a minus on what is shown as zero.
    return "" if value is None else re.sub(r"^[-+](?=0\.?0*$)", "", f"{value:{form}}")


def _interval(row: Mapping[str, Any], name: str, digits: int) -> str:
    value, low, high = (_number(row.get(key), f".{digits}f") for key in (name, f"{name}_low", f"{name}_high"))
    return f'{value} <span class="interval">{low} to {high}</span>' if value and low and high and low != high else value


def _figure(figure: Drawn) -> str:
    picture = base64.b64encode(figure.png).decode()
    return (
        f'<figure id="{figure.name}"><h3>{html.escape(figure.title)}</h3>'
        f'<img src="data:image/png;base64,{picture}" alt="{html.escape(figure.description)}">'
        f"<figcaption>{html.escape(figure.caption)}</figcaption></figure>"
    )


def _notes(results: Results) -> list[str]:
    """What a reader of the latency figure has to know, and what is missing from it."""
    notes = []
    for run in results.runs:
        notes += [str(note) for note in run.result.get("notes") or ()]
        if run.kind == "latency":
            notes += [f"Not timed at {one['length']} tokens: {one['reason']}" for one in run.result.get("left_out", ())]
            notes += [f"{one['peer']} did not run: {one['reason']}" for one in run.result.get("peers_skipped", ())]
    return notes


def _left_out(cells: Sequence[Mapping[str, Any]]) -> str:
    """Cells grouped by suite, task and reason."""
    if not cells:
        return "<p>Nothing was left out.</p>"
    groups: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        named = [f"{name} {cell[name]:g}" for name in LEFT_OUT_KEYS if isinstance(cell[name], int | float)]
        groups.setdefault((cell["suite"], cell["task"], str(cell["reason"])), []).append(", ".join(named) or "all")
    lines = "".join(
        f'<tr><th scope="row">{html.escape(suite)}</th><td>{html.escape(task)}</td>'
        f"<td>{html.escape('; '.join(sizes))}</td><td>{html.escape(reason)}</td></tr>"
        for (suite, task, reason), sizes in groups.items()
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("suite", "task", "cells", "why"))
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Cells left out">'
        f'<table class="text"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )
