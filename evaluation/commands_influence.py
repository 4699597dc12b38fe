"""`python -m evaluation influence`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kveraser.cli.console import bar, emit, say
from kveraser.cli.options import DEFAULT_MODEL, NO_ERASER, Device, Dtype, Json, Model, load_backbone
from kveraser.files import replacing


def influence(
    cases: Annotated[int, typer.Option(min=1, help="Generated conversations.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the first; each has the next.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
    model: Model = DEFAULT_MODEL,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Measure whether the messages that lean on a span have the greatest influence."""
    from evaluation.influence import run

    backbone = load_backbone(model, NO_ERASER, device, dtype)
    with bar() as advance:
        result = run(backbone, cases, seed, advance)
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if json_output:
        emit(result)
    say(f"The messages about the span come first in {result['first']:.0%} of {cases} conversations.")
