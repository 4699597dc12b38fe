"""Names right of the axes, each with its marker, placed so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.report.style import MethodStyle

FONT = 11
BESIDE = {"line": 13, "marker": 20, "text": 28}
"""Where names of lines stand, in points right of the axes."""


@dataclass(frozen=True)
class Named:
    """A place in data coordinates and the method drawn there."""

    x: float
    y: float
    label: str
    style: MethodStyle


def plain(text: str) -> str:
    """Text that matplotlib takes literally: no mathematics."""
    return text.replace("$", r"\$")


def write_names(figure: Any, axes: Any, ends: Sequence[Named], leaders: bool) -> None:
    """Write each marker and name right of the axes at the height of its point, moved apart where they would overlap.

    Args:
        ends: where the names' lines end, or their points.
        leaders: draw a line from there to the name.
    """
    from matplotlib.transforms import offset_copy

    figure.canvas.draw()
    frame = axes.get_window_extent()
    gap = FONT * 1.25 * figure.dpi / 72 / frame.height
    wanted = [(axes.transData.transform((end.x, end.y))[1] - frame.y0) / frame.height for end in ends]
    beside = {name: offset_copy(axes.transAxes, figure, x=x, units="points") for name, x in BESIDE.items()}
    for end, height in zip(ends, _apart(wanted, gap), strict=True):
        if leaders:
            axes.annotate(
                "",
                xy=(end.x, end.y),
                xytext=(1, height),
                textcoords=beside["line"],
                arrowprops={"arrowstyle": "-", "color": end.style.colour, "linewidth": 0.8, "alpha": 0.7, "shrinkB": 4},
                annotation_clip=False,
            )
        axes.plot(1, height, transform=beside["marker"], clip_on=False, linestyle="", markersize=7, **look(end.style))
        axes.text(1, height, plain(end.label), transform=beside["text"], fontsize=FONT, va="center")


def look(style: MethodStyle) -> dict[str, Any]:
    """A style as matplotlib's properties of a marker."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "fillstyle": style.fill,
        "markerfacecoloralt": "white",
        "markeredgewidth": 1.4,
    }


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in [0, 1] at least `gap` from each other, each near where it was wanted."""
    groups: list[list[int]] = []
    centres: list[float] = []
    for at in sorted(range(len(heights)), key=lambda at: (heights[at], at)):
        groups.append([at])
        centres.append(heights[at])
        # Groups that would overlap stand together, around the mean of what they wanted.
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            last = groups.pop()
            groups[-1] += last
            centres[-2:] = [sum(heights[one] for one in groups[-1]) / len(groups[-1])]
    placed = [0.0] * len(heights)
    floor = 0.0
    for group, centre in zip(groups, centres, strict=True):
        size = gap * (len(group) - 1)
        lowest = max(floor, min(centre - size / 2, 1 - size))
        for step, at in enumerate(group):
            placed[at] = lowest + gap * step
        floor = lowest + size + gap
    # Pushed over the top: everything above its room comes down again.
    ceiling = 1.0
    for at in sorted(range(len(placed)), key=lambda at: -placed[at]):
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - gap
    return placed
