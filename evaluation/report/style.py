"""How a method looks in every figure: a colour and a marker a family, a fill and a dash a variant, and a short name."""

from __future__ import annotations

import ast
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from kveraser.demo.picture import COLOURS, MARKERS
from kveraser.measure.quality import UNERASED

FAMILY_MARKERS = dict(zip(COLOURS, MARKERS, strict=True))
UNERASED_COLOUR, UNERASED_MARKER = "#767676", "x"
OTHER_COLOURS = ("#AA4499", "#117733", "#6A3D9A", "#4477AA", "#7A7A00", "#882255")
OTHER_MARKERS = "<>8pHv"
FILLS = ("full", "none", "left", "bottom", "right", "top")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
HATCHES = ("", "////", "....", "xxxx", "||||", "----")


@dataclass(frozen=True)
class MethodStyle:
    """One method's look.

    Attributes:
        label: the family, with the parameters in which its variants of the report differ.
        colour, marker: of the family.
        fill, dash, hatch: of the variant.
    """

    label: str
    colour: str
    marker: str
    fill: str
    dash: str | tuple[int, tuple[int, ...]]
    hatch: str


def styles(methods: Sequence[str]) -> dict[str, MethodStyle]:
    """The look of every method of a report. A family has the same colour and marker in every report."""
    families: dict[str, list[str]] = {}
    for method in methods:
        families.setdefault(family(method), []).append(method)
    labels = {method: _label(method, variants) for variants in families.values() for method in variants}
    found: dict[str, MethodStyle] = {}
    for name, variants in families.items():
        # Python's own hash differs between processes.
        number = zlib.crc32(name.encode())
        colour, marker = OTHER_COLOURS[number % len(OTHER_COLOURS)], OTHER_MARKERS[number // 7 % len(OTHER_MARKERS)]
        colour, marker = COLOURS.get(name, colour), FAMILY_MARKERS.get(name, marker)
        if name == UNERASED:
            colour, marker = UNERASED_COLOUR, UNERASED_MARKER
        for index, method in enumerate(variants):
            place = index % len(FILLS)
            label = labels[method] if list(labels.values()).count(labels[method]) == 1 else method
            found[method] = MethodStyle(label, colour, marker, FILLS[place], DASHES[place], HATCHES[place])
    return found


def family(method: str) -> str:
    """A method's name without its parameters."""
    return method.partition("(")[0].strip()


def widths(methods: Sequence[str]) -> list[str]:
    """Of the variants of one family, the values of the parameters in which they differ, as short as they can be."""
    parameters = [_parameters(method) for method in methods]
    names = list(dict.fromkeys(name for one in parameters for name in one))
    differing = [name for name in names if len({one.get(name) for one in parameters}) > 1]
    shown = [[one.get(name, "") for name in differing] for one in parameters]
    for values in shown:
        while len(values) > 1 and values[-1] in ("", "0", "0.0"):
            values.pop()
    return ["/".join(values) for values in shown]


def _label(method: str, variants: Sequence[str]) -> str:
    if method == UNERASED:
        return "not erased"
    parameters = {variant: _parameters(variant) for variant in variants}
    names = list(dict.fromkeys(name for one in parameters.values() for name in one))
    # The fewest parameters that tell the variants apart.
    for names_shown in (chosen for size in range(len(names) + 1) for chosen in combinations(names, size)):
        if len({tuple(one.get(name) for name in names_shown) for one in parameters.values()}) == len(variants):
            break
    own = parameters[method]
    shown = [own[name] if name.isdigit() else f"{name}={own[name]}" for name in names_shown if name in own]
    return f"{family(method)}({', '.join(shown)})" if shown else family(method)


def _parameters(method: str) -> dict[str, str]:
    """Parameters by name or place, texts without quotes."""
    inner = method.partition("(")[2].rpartition(")")[0]
    try:
        call = ast.parse(f"f({inner})", mode="eval").body
    except SyntaxError:
        return {"0": inner}
    if not isinstance(call, ast.Call):
        return {"0": inner}
    values = [(str(place), value) for place, value in enumerate(call.args)]
    values += [(str(keyword.arg), keyword.value) for keyword in call.keywords]
    return {name: ast.unparse(value).strip("'\"") for name, value in values}
