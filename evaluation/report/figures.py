"""The figures of a report: which rows go into each, and how they are drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.report.labels import FONT, Named, look, plain, write_names
from evaluation.report.read import Results
from evaluation.report.style import MethodStyle, family, styles, widths
from kveraser.measure.case import ALL
from kveraser.measure.quality import EXACT, UNERASED

WIDTH, DOTS = 8.0, 144
"""Inches, and dots an inch: drawn to be read at a third of its width."""
AXES = {
    "span": "tokens erased",
    "distance": "tokens between the span and the question",
    "spans": "spans erased at once",
    "length": "tokens of context",
    "depth": "depth of the span (share of the context)",
}
LOWEST_FIDELITY = -1.0
"""Where the axis of fidelity ends: what lies below is drawn at the edge."""
LATENCIES = {"seconds": "seconds to erase", "first_token_seconds": "seconds to the answer's first token"}
FLOORS = {
    "seconds": ("floor_seconds", "forward pass of the span"),
    "first_token_seconds": ("prefill_first_token_seconds", "fresh prefill"),
}
"""What the times of a latency run are compared with."""
GREY = "#555555"
PEER_COLOURS = ("#333333", "#7A4F9A", "#3B7D3B", "#9A4F4F", "#4F6F9A")
PEER_MARKERS = "1234+"


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        name: of its file, without the ending.
        caption: one sentence on how to read it.
        description: what a reader who does not see it has to know.
        png: the picture.
    """

    name: str
    title: str
    caption: str
    description: str
    png: bytes


def draw(results: Results, looks: Mapping[str, MethodStyle]) -> list[Drawn]:
    """All figures that there are rows for, in the order of the page.

    Args:
        looks: of `styles`, for every method of `results`.
    """
    import matplotlib

    makers: list[Callable[[], Drawn | None]] = [
        lambda: _quality_cost(results, looks),
        *(lambda axis=axis: _fidelity(results, looks, axis) for axis in AXES),
        lambda: _latency(results, looks),
        lambda: _leakage(results, looks),
        lambda: _exact_match(results, looks),
    ]
    with matplotlib.rc_context({"font.size": FONT + 1, "axes.grid": True, "grid.color": "#E2E2E2"}):
        return [drawn for make in makers if (drawn := make()) is not None]


FIGURES = ("quality-cost", *(f"fidelity-{axis}" for axis in AXES), "latency", "leakage", "exact-match")
"""The names of all figures there can be."""


def _quality_cost(results: Results, looks: Mapping[str, MethodStyle]) -> Drawn | None:
    panels = {
        scope: rows
        for scope in ([ALL] if ALL in results.scopes else results.scopes)
        if (rows := [row for row in results.select(suite=scope) if None not in (row["kl"], row["recomputed"])])
    }
    if not panels:
        return None
    figure, all_axes = _panels(len(panels), 4.8)
    for axes, (scope, rows) in zip(all_axes, panels.items(), strict=True):
        axes.set_ylabel("KL to exact\n(nats per answer token)")
        _name_panel(axes, scope, len(panels))
        _draw_quality_cost(figure, axes, rows, looks)
    all_axes[-1].set_xlabel("mean tokens recomputed for an erase")
    return _drawn(
        figure,
        "quality-cost",
        "Quality against cost",
        "Lower is closer to exact and further left is cheaper: a method on the dotted frontier is beaten by no other "
        "in both; bars are 95% intervals, the dashed line is the cache with nothing erased, and exact methods stand at "
        "the lower edge, where KL is 0.",
    )


def _draw_quality_cost(
    figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, MethodStyle]
) -> None:
    edited = [row for row in rows if row["method"] != UNERASED]
    above = [row["kl"] for row in rows if row["method"] != EXACT and row["kl"] > 1e-6]
    # A KL of 0 has no place on a logarithmic axis: it gets the lower edge.
    edge = 10.0 ** math.floor(math.log10(min(above, default=1.0) / 3))
    points = []
    for row in edited:
        style, x, y = looks[row["method"]], row["recomputed"], max(row["kl"], edge)
        # A light edge keeps markers apart that cover each other.
        edge_colour = {"markeredgecolor": "white", "markeredgewidth": 0.8} if style.fill == "full" else {}
        axes.plot(x, y, linestyle="", markersize=11, zorder=3, clip_on=False, **look(style) | edge_colour)
        points.append(Named(x, y, f"{style.label} (exact)" if row["method"] == EXACT else style.label, style))
        if None not in (row["kl_low"], row["kl_high"]) and row["kl"] > edge:
            interval = [max(row["kl_low"], edge), max(row["kl_high"], edge)]
            axes.plot([x, x], interval, color=style.colour, linewidth=1.6, zorder=2)
    frontier: list[tuple[float, float]] = []
    for x, y in sorted((point.x, point.y) for point in points):
        if not frontier or y < frontier[-1][1]:
            frontier += [(x, frontier[-1][1]), (x, y)] if frontier else [(x, y)]
    axes.plot(*zip(*frontier, strict=True), color=GREY, linestyle=":", linewidth=1.8, zorder=1)
    axes.set_xscale("symlog", linthresh=10, linscale=0.5)
    axes.set_yscale("log")
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(-2.5, max((row["recomputed"] for row in edited), default=1) * 1.5 + 1)
    axes.set_ylim(edge * 0.8, max([*above, edge * 10]) * 2.5)
    for row in rows:
        if row["method"] == UNERASED:
            _reference(axes, max(row["kl"], edge), "not erased")
    write_names(figure, axes, points, leaders=False)


def draw_frontier(rows: Sequence[Mapping[str, Any]]) -> Drawn:
    """KL to exact against tokens run, a panel a context length; the widths of one method are joined by a line.

    Args:
        rows: a row a method and length, of `kveraser bench frontier`.
    """
    import matplotlib

    lengths = list(dict.fromkeys(row["length"] for row in rows))
    families = list(dict.fromkeys(family(row["method"]) for row in rows))
    looks = styles(families)
    with matplotlib.rc_context({"font.size": FONT + 1, "axes.grid": True, "grid.color": "#E2E2E2"}):
        figure, all_axes = _panels(len(lengths), 4.6)
        for axes, length in zip(all_axes, lengths, strict=True):
            axes.set_ylabel("KL to exact\n(nats per answer token)")
            _name_panel(axes, f"context of {length} tokens", 2)
            _draw_widths(figure, axes, [row for row in rows if row["length"] == length], looks)
        all_axes[-1].set_xlabel("mean tokens run for an erase")
        return _drawn(
            figure,
            "frontier",
            "KL against tokens run",
            "Lower is closer to exact and further left is cheaper; lines join the widths of a method, whose parameters "
            "stand at its points, bars are 95% intervals, the dashed line is the cache with nothing erased, and the "
            "exact method stands at the lower edge, where KL is 0.",
        )


def _draw_widths(figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, MethodStyle]) -> None:
    rows = [row for row in rows if row["kl"] is not None]
    above = [row["kl"] for row in rows if row["method"] != EXACT and row["kl"] > 1e-6]
    edge = 10.0 ** math.floor(math.log10(min(above, default=1.0) / 3))
    names = []
    for name, style in looks.items():
        own = sorted((row for row in rows if family(row["method"]) == name), key=lambda row: row["recomputed"])
        if name == UNERASED or not own:
            continue
        xs, ys = [row["recomputed"] for row in own], [max(row["kl"], edge) for row in own]
        axes.plot(xs, ys, linestyle="-", linewidth=1.2, markersize=8, zorder=3, clip_on=False, **look(style))
        for x, y, row, width in zip(xs, ys, own, widths([row["method"] for row in own]), strict=True):
            if None not in (row["kl_low"], row["kl_high"]) and row["kl"] > edge:
                interval = [max(row["kl_low"], edge), max(row["kl_high"], edge)]
                axes.plot([x, x], interval, color=style.colour, linewidth=1.1, alpha=0.7, zorder=2)
            axes.annotate(
                width, (x, y), xytext=(4, 5), textcoords="offset points", fontsize=FONT - 4, color=style.colour
            )
        names.append(Named(xs[-1], ys[-1], f"{name} (exact)" if name == EXACT else name, style))
    axes.set_xscale("symlog", linthresh=10, linscale=0.5)
    axes.set_yscale("log")
    for direction in (axes.xaxis, axes.yaxis):
        direction.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(-2.5, max((row["recomputed"] for row in rows), default=1) * 1.5 + 1)
    axes.set_ylim(edge * 0.8, max([*above, edge * 10]) * 2.5)
    for row in rows:
        if row["method"] == UNERASED:
            _reference(axes, max(row["kl"], edge), "not erased")
    write_names(figure, axes, names, leaders=False)


def _fidelity(results: Results, looks: Mapping[str, MethodStyle], axis: str) -> Drawn | None:
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for suite in results.suites:
        values = {row[axis] for row in results.rows if row["suite"] == suite and row[axis] not in (ALL, None)}
        rows = [row for value in sorted(values) for row in results.select(suite=suite, **{axis: value})]
        rows = [row for row in rows if row["fidelity"] is not None and row["method"] not in (UNERASED, EXACT)]
        # A single value shows no course.
        if len({row[axis] for row in rows}) > 1:
            panels[suite] = rows
    if not panels:
        return None
    count = max(len({row["method"] for row in rows}) for rows in panels.values())
    figure, all_axes = _panels(len(panels), max(2.8, 0.24 * count + 0.8))
    for axes, (suite, rows) in zip(all_axes, panels.items(), strict=True):
        _name_panel(axes, suite, len(panels))
        _draw_fidelity(figure, axes, rows, looks, axis)
    all_axes[-1].set_xlabel(AXES[axis])
    subject = {"spans": "number of spans", "length": "context length", "span": "span length"}.get(axis, axis)
    return _drawn(
        figure,
        f"fidelity-{axis}",
        f"Fidelity against {subject}",
        "1 is the exact reference, 0 no better than not erasing and below 0 harm: a flat line holds whatever the "
        f"{subject}; bars are 95% intervals, and values under {LOWEST_FIDELITY:.0f} are drawn at the lower edge.",
    )


def _draw_fidelity(
    figure: Any, axes: Any, rows: Sequence[Mapping[str, Any]], looks: Mapping[str, MethodStyle], axis: str
) -> None:
    ticks = sorted({row[axis] for row in rows})
    methods = [method for method in looks if any(row["method"] == method for row in rows)]
    ends = []
    for index, method in enumerate(methods):
        style, own = looks[method], [row for row in rows if row["method"] == method]
        # Values stand at equal steps, and methods beside each other, so that their bars don't cover one another.
        beside = (index - (len(methods) - 1) / 2) * 0.5 / len(methods)
        xs = [ticks.index(row[axis]) + beside for row in own]
        ys = [max(row["fidelity"], LOWEST_FIDELITY) for row in own]
        axes.plot(xs, ys, linestyle=style.dash, linewidth=1.6, markersize=7, clip_on=False, **look(style))
        for x, row in zip(xs, own, strict=True):
            if None not in (row["fidelity_low"], row["fidelity_high"]) and row["fidelity_high"] > LOWEST_FIDELITY:
                low = max(row["fidelity_low"], LOWEST_FIDELITY)
                axes.plot([x, x], [low, row["fidelity_high"]], color=style.colour, linewidth=1.1, alpha=0.7)
        ends.append(Named(xs[-1], ys[-1], style.label, style))
    lowest = min(row["fidelity"] for row in rows)
    axes.set_ylim(LOWEST_FIDELITY if lowest < LOWEST_FIDELITY else min(-0.05, lowest - 0.1), 1.05)
    if lowest < LOWEST_FIDELITY:
        axes.yaxis.set_major_formatter(lambda value, _: f"{'≤ ' if value == LOWEST_FIDELITY else ''}{value:g}")
    axes.set_xlim(-0.4, len(ticks) - 0.6)
    axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
    axes.grid(visible=False, axis="x")
    for value in (0, 1):
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.set_ylabel("fidelity")
    write_names(figure, axes, ends, leaders=True)


def _latency(results: Results, looks: Mapping[str, MethodStyle]) -> Drawn | None:
    rows = [*results.latency, *results.peers]
    panels = [
        (span, measure)
        for span in sorted({row["span"] for row in rows})
        for measure in LATENCIES
        if any(row["span"] == span and row.get(measure) is not None for row in rows)
    ]
    if not panels:
        return None
    count = len({row["method"] for row in results.latency}) + len(
        {(row["peer"], row["operation"]) for row in results.peers}
    )
    figure, all_axes = _panels(len(panels), max(3.6, 0.24 * count + 1))
    for axes, (span, measure) in zip(all_axes, panels, strict=True):
        axes.set_ylabel(LATENCIES[measure])
        _name_panel(axes, f"span of {span} tokens", 2)
        _draw_latency(figure, axes, results, looks, span, measure)
    all_axes[-1].set_xlabel("tokens of context")
    return _drawn(
        figure,
        "latency",
        "Latency against context length",
        "Both axes are logarithmic, lower is faster and a flat line costs the same whatever the context; dotted is "
        "what to compare with, the bare forward pass of the erased tokens or a fresh prefill of the rest; an extended "
        "length is beyond the model's positions and timed on random states.",
    )


def _draw_latency(
    figure: Any, axes: Any, results: Results, looks: Mapping[str, MethodStyle], span: int, measure: str
) -> None:
    series: dict[str, tuple[MethodStyle, dict[int, float]]] = {}
    floor, floor_name = FLOORS[measure]
    for row in results.latency:
        for name, label, style in (
            (measure, looks[row["method"]].label, looks[row["method"]]),
            (floor, floor_name, MethodStyle(floor_name, GREY, "_", "full", ":", "")),
        ):
            if row["span"] == span and row.get(name) is not None:
                series.setdefault(label, (style, {}))[1][row["context"]] = row[name]
    peers = list(dict.fromkeys((row["peer"], row["operation"]) for row in results.peers))
    for row in results.peers:
        if row["span"] == span and row.get(measure) is not None:
            at = peers.index((row["peer"], row["operation"]))
            label = f"{row['peer']}: {row['operation']}"
            style = MethodStyle(label, PEER_COLOURS[at % 5], PEER_MARKERS[at % 5], "full", "--", "")
            series.setdefault(label, (style, {}))[1][row["context"]] = row[measure]
    ends = []
    for label, (style, points) in series.items():
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], linestyle=style.dash, linewidth=1.6, markersize=7, **look(style))
        ends.append(Named(xs[-1], points[xs[-1]], label, style))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    contexts = sorted({context for _, points in series.values() for context in points})
    extended = {row["context"] for row in results.latency if row.get("extended")}
    axes.set_xticks(contexts, [f"{context}\nextended" if context in extended else str(context) for context in contexts])
    axes.minorticks_off()
    write_names(figure, axes, ends, leaders=True)


def _leakage(results: Results, looks: Mapping[str, MethodStyle]) -> Drawn | None:
    rows = [row for row in _by_task(results) if row["method"] != EXACT]
    rows = [row for row in rows if row["leak"] is not None or row["leak_rate"] is not None]
    tasks = list(dict.fromkeys((row["suite"], row["task"]) for row in rows))
    if not rows:
        return None
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.transforms import offset_copy

    methods = [method for method in looks if any(row["method"] == method for row in rows)]
    height = 0.14 * (len(methods) + 1.5) * len(tasks)
    figure: Any = Figure(figsize=(WIDTH, height + 1.2 + 0.26 * math.ceil(len(methods) / 3)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, measure, title in zip(both, ("leak", "leak_rate"), ("leak (nats per token)", "leak rate"), strict=True):
        for row in rows:
            if row[measure] is not None:
                style = looks[row["method"]]
                thickness = 1 / (len(methods) + 1.5)
                place = (methods.index(row["method"]) - (len(methods) - 1) / 2) * thickness
                place += tasks.index((row["suite"], row["task"]))
                axes.barh(
                    place, row[measure], 0.8 * thickness, color=style.colour, hatch=style.hatch, edgecolor="white"
                )
                tip = offset_copy(axes.transData, figure, x=math.copysign(6, row[measure]), units="points")
                axes.plot(row[measure], place, linestyle="", markersize=6, transform=tip, clip_on=False, **look(style))
        axes.axvline(0, color="black", linewidth=1)
        # Where nothing leaks, rounding must not fill the axis.
        axes.update_datalim([(-0.02, 0), (0.1, 0)])
        axes.autoscale_view()
        axes.set_xlabel(title)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.08)
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_yticks(range(len(tasks)), [plain(_task_name(results, *task)) for task in tasks])
    both[0].set_ylim(len(tasks) - 0.5, -0.5)
    handles = [Line2D([], [], linestyle="", markersize=8, **look(looks[method])) for method in methods]
    names = [plain(looks[method].label) for method in methods]
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=FONT, frameon=False)
    return _drawn(
        figure,
        "leakage",
        "Leakage",
        "Above 0 the erased text is more likely (left), or more often given away (right), than under the exact "
        "reference, which never read it: shorter bars leak less, in every kind of secret.",
    )


def _exact_match(results: Results, looks: Mapping[str, MethodStyle]) -> Drawn | None:
    rows = [row for row in _by_task(results) if row["em"] is not None]
    tasks = list(dict.fromkeys((row["suite"], row["task"]) for row in rows))
    if not rows:
        return None
    from matplotlib.figure import Figure

    # The references stand first and last, with the methods between them.
    measured = [method for method in looks if any(row["method"] == method for row in rows)]
    methods = [method for method in measured if method not in (UNERASED, EXACT)]
    methods = [UNERASED] * (UNERASED in measured) + methods + [EXACT] * (EXACT in measured)
    cells = {(row["suite"], row["task"], row["method"]): row["em"] for row in rows}
    figure: Any = Figure(figsize=(WIDTH, 0.36 * len(tasks) + 2.2), layout="constrained")
    axes: Any = figure.subplots()
    matrix = [[cells.get((*task, method), math.nan) for method in methods] for task in tasks]
    axes.imshow(matrix, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for at, line in enumerate(matrix):
        for place, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value < 0.55 else "black"
                axes.text(place, at, f"{value:.2f}", ha="center", va="center", fontsize=FONT, color=colour)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    names = [looks[method].label + (" (exact)" if method == EXACT else "") for method in methods]
    axes.set_xticks(range(len(methods)), [plain(name) for name in names], rotation=40, ha="left", fontsize=FONT)
    axes.tick_params(axis="x", pad=17)
    for place, method in enumerate(methods):
        axes.plot(
            place, 1.0 + 0.16 / (0.36 * len(tasks)), linestyle="", markersize=8, clip_on=False,
            transform=axes.get_xaxis_transform(), **look(looks[method]),
        )  # fmt: skip
    axes.set_yticks(range(len(tasks)), [plain(_task_name(results, *task)) for task in tasks])
    return _drawn(
        figure,
        "exact-match",
        "Exact match by task",
        "The share of questions that are answered right: a good method reads like the exact reference on the right, "
        "not like the unerased cache on the left.",
    )


def _by_task(results: Results) -> list[Mapping[str, Any]]:
    tasks = dict.fromkeys((row["suite"], row["task"]) for row in results.rows if ALL not in (row["suite"], row["task"]))
    return [row for suite, task in tasks for row in results.select(suite=suite, task=task)]


def _task_name(results: Results, suite: str, task: str) -> str:
    return f"{suite}: {task}" if len(results.suites) > 1 else task


def _panels(count: int, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels one below another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH, height * count + 0.4), layout="constrained", dpi=DOTS)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, list(all_axes)


def _name_panel(axes: Any, name: str, panels: int) -> None:
    """A panel's name, where there are several."""
    if panels > 1:
        axes.set_title(plain(name), loc="left", fontsize=FONT + 1, fontweight="bold")


def _reference(axes: Any, height: float, name: str) -> None:
    axes.axhline(height, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.annotate(
        name, (0.995, height), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=FONT, color=GREY,
    )  # fmt: skip


def _drawn(figure: Any, name: str, title: str, caption: str) -> Drawn:
    buffer = io.BytesIO()
    # The version of matplotlib would make equal pictures differ.
    figure.savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
    return Drawn(name, title, caption, f"{title}. {caption}", buffer.getvalue())
