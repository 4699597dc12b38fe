"""`kveraser evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone
from kveraser.errors import BackboneError, EraserError

if TYPE_CHECKING:
    from kveraser.methods import Method
    from kveraser.model.backbone import Backbone

METHODS_COMPARED = (
    "mask;shift;zero_value;blank;erratum;repair(32);repair(32, per_span=1.0);selective;follow;kveraser;kveraser+repair"
)
SHOWN = [
    "suite", "task", "length", "span", "method", "cases", "em", "em_exact", "flipped", "recovered", "broken",
    "kl", "fidelity", "leak", "leak_rate",
    "no_harm", "recomputed",
]  # fmt: skip

Methods = Annotated[
    str | None, typer.Option(help="Separated by semicolons. Default: all that the backbone and its eraser can serve.")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same cases and intervals.")]


def evaluate(
    cases: Annotated[Path, typer.Argument(help="JSONL file, one case a line.")],
    methods: Methods = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results of the cases; a stopped run continues there.")
    ] = None,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure fidelity, leaks and harm of every method on your own cases, against exact recomputation."""
    from kveraser.measure.case_file import read_case_file
    from kveraser.measure.run import RunSettings, run, to_json, write_result

    own = read_case_file(cases)
    chosen = chosen_methods(methods)
    settings = RunSettings(seed, case_file=cases.name)
    backbone = load_backbone(model, eraser, device, dtype)
    served, unserved = serving(chosen, backbone, named=methods is not None)
    with bar(total=1.0) as advance:
        measured = run(backbone, served, settings, own, (), output, advance)
    result = to_json(measured, backbone, settings, served, "kveraser evaluate") | {"unserved": unserved}
    if output is not None:
        write_result(output, result)
    if json_output:
        emit(result)
        return
    print_run("Evaluation", result, SHOWN)
    if output is not None:
        say(f"Cases: {output}")


def print_run(title: str, result: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Print the rows of a quality run, and the cells and methods that were left out."""
    from kveraser.measure.case import Cell

    print_rows(title, result["rows"], columns)
    for one in result["left_out"]:
        cell = Cell(**{name: value for name, value in one.items() if name != "reason"})
        say(f"Left out: {cell}: {one['reason']}")
    for name, reason in result["unserved"].items():
        say(f"Left out: {name}: {reason}")


def chosen_methods(names: str | None) -> list[Method]:
    """Make the named methods; without names, `METHODS_COMPARED`."""
    from kveraser.methods import make_method

    return [make_method(name) for name in (METHODS_COMPARED if names is None else names).split(";") if name.strip()]


def serving(methods: Sequence[Method], backbone: Backbone, named: bool) -> tuple[list[Method], dict[str, str]]:
    """Resolve methods for a backbone; returns those that work, and the reasons of the others by name.

    Raises:
        EraserError, BackboneError: `named` is set and a method does not work.
    """
    if named:
        return [method.resolve(backbone) for method in methods], {}
    served, unserved = list["Method"](), dict[str, str]()
    for method in methods:
        try:
            served.append(method.resolve(backbone))
        except (EraserError, BackboneError) as error:
            unserved[str(method)] = str(error)
    return served, unserved


def sizes(option: str, text: str | None) -> tuple[int, ...] | None:
    """Parse the comma-separated numbers of an option."""
    if text is None:
        return None
    with suppress(ValueError):
        return tuple(int(size) for size in text.split(","))
    raise typer.BadParameter(f"{option} {text!r} is not a list of numbers: write it as in 512,1024")


def base(sources: str | None) -> str | None:
    """Returns comma-separated files and datasets without local folders, for result files."""
    if sources is None:
        return None
    return ",".join(Path(one).name if Path(one).is_file() else one for one in map(str.strip, sources.split(",")))
