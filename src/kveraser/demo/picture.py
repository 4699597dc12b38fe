"""The demo's picture: quality against cost, a point per method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kveraser.errors import InputError, extras
from kveraser.files import replacing

# Okabe and Ito's colours, told apart by colour-blind readers; a method has the same one everywhere.
COLOURS = {
    "recompute": "#000000",
    "mask": "#E69F00",
    "shift": "#56B4E9",
    "zero_value": "#CC79A7",
    "blank": "#999999",
    "repair": "#0072B2",
    "follow": "#332288",
    "selective": "#009E73",
    "erratum": "#8C5A2B",
    "kveraser": "#D55E00",
    "kveraser+repair": "#B22222",
}
MARKERS = "osD^vpP*Xhd"
LOWEST_KL = 1e-4
"""Where exact methods are drawn on the logarithmic axis, whose KL is zero but for rounding."""

SIDES = (
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (8, 8, "left", "bottom"),
    (8, -8, "left", "top"),
    (-8, 8, "right", "bottom"),
    (-8, -8, "right", "top"),
)
"""Where a name may stand beside its point: offsets in points, and alignment."""


def draw(rows: Sequence[Mapping[str, Any]], path: str | Path, title: str) -> Path:
    """Write a PNG of KL against erase time, both logarithmic.

    Args:
        rows: of `summarize`: method, seconds, kl, kl_unerased; rows of methods that were not run are left out.
        path: where to write; replaced atomically.

    Raises:
        InputError: it can't be written there.
    """
    with extras():
        from matplotlib.figure import Figure

    run = [row for row in rows if not row.get("missing")]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes: Any = figure.subplots()
    unerased = run[0]["kl_unerased"]
    axes.axhline(unerased, color="#555555", linestyle="--", linewidth=1)
    axes.annotate(
        "not erased",
        (0.995, unerased),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=10,
        color="#555555",
    )
    points = []
    for index, row in enumerate(run):
        point = max(row["seconds"], 1e-4), max(row["kl"], LOWEST_KL)
        colour = COLOURS.get(row["method"].partition("(")[0], "#444444")
        axes.scatter(*point, s=90, color=colour, marker=MARKERS[index % len(MARKERS)], zorder=3)
        points.append((*point, f"{row['method']} (exact)" if row["exact"] else row["method"]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("seconds to erase, all documents together")
    axes.set_ylabel("KL to exact recomputation\n(nats per answer token, lower is better)")
    axes.set_title(title, fontsize=12)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _label(figure, axes, points)
    target = Path(path)
    try:
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    except OSError as error:
        raise InputError(
            f"can't write the picture to {target} ({error}): choose another place with --picture"
        ) from error
    return target


def _label(figure: Any, axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point, on the first side where it covers no other name and no other point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    centres = [axes.transData.transform(point[:2]) for point in points]
    taken: list[Any] = []
    for (x, y, name), centre in zip(points, centres, strict=True):
        others = [other for other in centres if other is not centre]
        for x_offset, y_offset, horizontal, vertical in SIDES:
            text = axes.annotate(
                name,
                (x, y),
                xytext=(x_offset, y_offset),
                textcoords="offset points",
                ha=horizontal,
                va=vertical,
                fontsize=10,
            )
            box = text.get_window_extent(renderer)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            covers = any(box.overlaps(other) for other in taken) or any(
                box.padded(8).contains(*other) for other in others
            )
            # The last side stands whatever it covers: a name must not vanish.
            if (inside and not covers) or (x_offset, y_offset) == SIDES[-1][:2]:
                break
            text.remove()
        taken.append(box)
