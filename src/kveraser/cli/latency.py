"""`kveraser bench latency`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kveraser.cli.console import bar, emit, print_rows, say
from kveraser.cli.evaluate import sizes
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Json, Model, load_backbone
from kveraser.errors import BackboneError, EraserError

if TYPE_CHECKING:
    from kveraser.measure.peer import Peer

SHOWN = ["method", "context", "extended", "seconds", "floor_ratio", "first token", "extra / span", "recomputed"]

Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")]
SpanTokens = Annotated[int, typer.Option(min=1, help="Tokens to erase.")]
Depth = Annotated[float, typer.Option(help="Where the span begins, as a fraction of the context.")]
Named = Annotated[list[str] | None, typer.Option(help="Default: every method.")]
Repeats = Annotated[
    int, typer.Option(min=1, help="Timed rounds after one of warm-up; slow methods have the warm-up alone.")
]


def latency(
    lengths: Lengths = "512,1024,2048",
    span: SpanTokens = 100,
    depth: Depth = 0.1,
    method: Named = None,
    repeats: Repeats = 3,
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    json_output: Json = False,
) -> None:
    """Time every method against the bare forward pass of the same span."""
    loading = {"model": model, "eraser": eraser, "device": device, "dtype": dtype}
    settings = {"span": span, "depth": depth, "repeats": repeats}
    time_methods(lengths, settings, method, loading, {}, "kveraser bench latency", json_output)


def time_methods(
    lengths: str,
    settings: Mapping[str, Any],
    names: Sequence[str] | None,
    loading: Mapping[str, Any],
    peers: Mapping[str, type[Peer]],
    command: str,
    json_output: bool,
) -> None:
    """Time methods and peers for a command, and print the result.

    Args:
        lengths: context lengths, separated by commas.
        settings: `span`, `depth` and `repeats` of `kveraser.measure.latency.run`.
        names: methods; None: every method that the backbone and its eraser can serve.
        loading: arguments of `load_backbone`.
        peers: other engines by name.
        command: its name, for the result.
    """
    from kveraser.measure.latency import run, to_json
    from kveraser.methods import METHODS, make_method
    from kveraser.steering.eraser import Eraser

    contexts = sizes("--lengths", lengths) or ()
    chosen = [make_method(name) for name in names or METHODS]
    backbone = load_backbone(**loading)
    notes = []
    if backbone.eraser is None and any(one.needs_eraser for one in chosen):
        # The cost of an adapter does not depend on what it has learned.
        backbone.eraser = Eraser.untrained(backbone.model)
        notes.append("timed with an untrained eraser of the paper's shape (rank 16, seven projections)")
    resolved = []
    for one in chosen:
        try:
            resolved.append(one.resolve(backbone))
        except (EraserError, BackboneError) as error:
            if names:
                raise
            notes.append(f"left out: {error}")
    with bar() as advance:
        measured = run(backbone, resolved, contexts, **settings, progress=advance, peers=list(peers.values()))
    result = to_json(measured, backbone, {"lengths": list(contexts), **settings, "peers": list(peers)}, notes, command)
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
