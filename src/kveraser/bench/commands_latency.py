"""`kveraser bench latency`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kveraser.console import bar, emit, print_rows, say
from kveraser.errors import BackboneError, EraserError
from kveraser.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone

NO_PEERS = "none"
SHOWN = ["method", "context", "extended", "seconds", "floor_ratio", "first token", "extra / span", "recomputed"]


def latency(
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")] = "512,1024,2048",
    span: Annotated[int, typer.Option(min=1, help="Tokens to erase.")] = 100,
    depth: Annotated[float, typer.Option(help="Where the span begins, as a fraction of the context.")] = 0.1,
    method: Annotated[list[str] | None, typer.Option(help="Default: every method.")] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="Timed rounds after one of warm-up; slow methods have the warm-up alone.")
    ] = 3,
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
    from kveraser.bench.latency import run, to_json
    from kveraser.bench.peers import PEERS
    from kveraser.eraser import Eraser
    from kveraser.methods import METHODS, make_method

    try:
        sizes = [int(size) for size in lengths.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--lengths {lengths!r} is not a list of numbers, such as 512,1024") from error
    named = [] if peers == NO_PEERS else [name.strip() for name in peers.split(",")]
    unknown = [name for name in named if name not in PEERS]
    if unknown:
        raise typer.BadParameter(f"--peers: no {unknown[0]!r}; there are {', '.join(PEERS)}, or {NO_PEERS}")
    chosen = [make_method(name) for name in method or METHODS]
    backbone = load_backbone(model, eraser, device, dtype)
    notes = []
    if backbone.eraser is None and any(one.needs_eraser for one in chosen):
        # The cost of an adapter does not depend on what it has learnt.
        backbone.eraser = Eraser.untrained(backbone.model)
        notes.append("timed with an untrained eraser of the paper's shape (rank 16, seven projections)")
    settled = []
    for one in chosen:
        try:
            settled.append(one.settled(backbone))
        except (EraserError, BackboneError) as error:
            if method:
                raise
            notes.append(f"left out: {error}")
    with bar() as advance:
        measured = run(backbone, settled, sizes, span, depth, repeats, advance, [PEERS[name] for name in named])
    settings = {"lengths": sizes, "span": span, "depth": depth, "repeats": repeats, "peers": named}
    result = to_json(measured, backbone, settings, notes)
    if json_output:
        emit(result)
        return
    print_rows("Latency", [_shown(row) for row in result["rows"]], SHOWN)
    print_rows("Growth", result["growth"], ["method", "shortest", "longest", "growth", "floor_growth", "paper"])
    if result["peers"]:
        columns = ["peer", "operation", "context", "seconds", "first_token_seconds", "answer"]
        print_rows("Peers", result["peers"], columns)
        columns = ["method", "peer", "operation", "context", "ratio"]
        print_rows("Times sooner to the first token", result["ratios"], columns)
    for note in result["notes"]:
        say(note)
    for left in result["left_out"]:
        say(f"Left out: {left['length']} tokens: {left['reason']}")
    for skipped in result["peers_skipped"]:
        say(f"Skipped: {skipped['peer']}: {skipped['reason']}")


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "first token": row["first_token_seconds"],
        "extra / span": row["extra_bytes"] / row["span_bytes"],
    }
