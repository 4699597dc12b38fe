"""`python -m evaluation latency`."""

from __future__ import annotations

from typing import Annotated

import typer

from kveraser.cli.latency import Depth, Lengths, Named, Repeats, SpanTokens, time_methods
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model

NO_PEERS = "none"


def latency(
    lengths: Lengths = "512,1024,2048",
    span: SpanTokens = 100,
    depth: Depth = 0.1,
    method: Named = None,
    repeats: Repeats = 3,
    peers: Annotated[
        str, typer.Option(help="Other engines, separated by commas, or none. Those not installed are skipped.")
    ] = "llama.cpp,vllm",
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Time every method against the bare forward pass of the same span, and against other engines."""
    from evaluation.peers import PEERS

    named = [] if peers == NO_PEERS else [name.strip() for name in peers.split(",")]
    unknown = [name for name in named if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"--peers: no {unknown[0]!r}; there are {', '.join(PEERS)}, or {NO_PEERS}")
    loading = {"model": model, "eraser": eraser, "device": device, "dtype": dtype}
    settings = {"span": span, "depth": depth, "repeats": repeats}
    chosen = {name: PEERS[name] for name in named}
    time_methods(lengths, settings, method, loading, chosen, "python -m evaluation latency", json_output)
