"""`kveraser serve`."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kveraser.cli.console import say
from kveraser.cli.options import DEFAULT_MODEL, SHIPPED, Device, Dtype, EraserOption, Model, load_backbone
from kveraser.errors import InputError

if TYPE_CHECKING:
    from kveraser.serve.access import Keys

CONTEXTS, CLIENTS, TURNS = "Conversations and sessions", "Clients", "Sharing the model"
"""Option groups in the help."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
GIBIBYTE = 2**30
MEBIBYTE = 2**20
SHUTDOWN_SECONDS = 10
"""Time limit for running answers when the server stops."""


def serve(
    model: Model = DEFAULT_MODEL,
    eraser: EraserOption = SHIPPED,
    device: Device = None,
    dtype: Dtype = None,
    name: Annotated[str | None, typer.Option(help="Model name in the API. Default: its own name.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="Default method for erasing. Default: follow, or recompute without rotary positions."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 8000,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    sessions: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps sessions across restarts. Default: sessions end with the server.",
            rich_help_panel=CONTEXTS,
        ),
    ] = None,
    memory: Annotated[
        float, typer.Option(min=0.001, help="GiB of keys and values in memory.", rich_help_panel=CONTEXTS)
    ] = 4.0,
    disk: Annotated[
        float, typer.Option(min=0.001, help="GiB of snapshots in the folder.", rich_help_panel=CONTEXTS)
    ] = 64.0,
    ttl: Annotated[
        float, typer.Option(min=1, help="Seconds after which an unused session is deleted.", rich_help_panel=CONTEXTS)
    ] = 24 * 3600.0,
    undo_steps: Annotated[
        int, typer.Option(min=0, help="Operations of a session that can be undone.", rich_help_panel=CONTEXTS)
    ] = 16,
    undo_seconds: Annotated[
        float,
        typer.Option(min=0, help="Seconds until the old states are overwritten.", rich_help_panel=CONTEXTS),
    ] = 3600.0,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with API keys, one a line; also KVERASER_API_KEYS, separated by commas.", rich_help_panel=CLIENTS
        ),
    ] = None,
    without_keys: Annotated[
        bool,
        typer.Option("--without-keys", help="Allow a public address without API keys.", rich_help_panel=CLIENTS),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Accepted Host header; several allowed.", rich_help_panel=CLIENTS),
    ] = None,
    requests_per_minute: Annotated[
        float | None,
        typer.Option(min=0.1, help="Requests per minute and key. Default: no limit.", rich_help_panel=CLIENTS),
    ] = None,
    requests_at_once: Annotated[
        int, typer.Option(min=1, help="Concurrent requests per key.", rich_help_panel=CLIENTS)
    ] = 32,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Maximum size of a request body in MiB.", rich_help_panel=CLIENTS)
    ] = 16.0,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="Default maximum number of tokens of an answer.", rich_help_panel=TURNS)
    ] = 1024,
    streams: Annotated[int, typer.Option(min=1, help="Answers decoded concurrently.", rich_help_panel=TURNS)] = 32,
    waiting: Annotated[
        int, typer.Option(min=1, help="Length of the queue; further jobs are refused.", rich_help_panel=TURNS)
    ] = 64,
    chunk: Annotated[
        int,
        typer.Option(min=1, help="Prefill tokens between two decode steps of other answers.", rich_help_panel=TURNS),
    ] = 128,
) -> None:
    """Serve a model: OpenAI-compatible answers from caches whose history can be edited, sessions and a playground.

    See docs/serving.md.
    """
    try:
        import uvicorn

        from kveraser.serve import access, app, logs
    except ImportError as error:
        raise InputError(f"the server needs {error.name}: pip install 'kveraser[serve]'") from error
    from kveraser.methods import make_method

    if log_level not in ("debug", "info", "warning", "error"):
        raise typer.BadParameter(f"--log-level {log_level!r} is none of debug, info, warning, error")
    if method is not None and method != "auto":
        make_method(method)
    keys = access.read_keys(api_keys)
    _check_open(host, keys, without_keys)
    bound = _bind(host, port)
    with bound:
        logs.configure(log_level)
        from kveraser.serve.embedded import TransformersEngine
        from kveraser.serve.scheduler import Scheduler
        from kveraser.serve.service import Limits, Service

        backbone = load_backbone(model, eraser, device, dtype)
        engine = TransformersEngine(backbone, method)
        # Do not show clients the path of a local model.
        engine.name = name or (Path(engine.name).name if Path(engine.name).is_dir() else engine.name)
        limits = Limits(
            memory_bytes=int(memory * GIBIBYTE),
            disk_bytes=int(disk * GIBIBYTE),
            session_seconds=ttl,
            longest_session_seconds=max(ttl, Limits.longest_session_seconds),
            undo_steps=undo_steps,
            undo_seconds=undo_seconds,
        )
        scheduler = Scheduler(engine, chunk=chunk, most_streams=streams, most_waiting=waiting)
        service = Service(engine, scheduler, limits=limits, folder=sessions, method=method, answer_tokens=answer_tokens)
        settings = app.Settings(
            keys=keys,
            limits=access.Limits(requests_per_minute, requests_at_once),
            most_bytes=int(max_body * MEBIBYTE),
            hosts=_names(host, allowed_host),
        )
        address = bound.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = uvicorn.Server(
            uvicorn.Config(
                app.create_app(service, settings),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        logs.log("listening", url=f"http://{shown}:{address[1]}", model=engine.name, keys=len(keys))
        # Ctrl-C stops the server.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    if not server.started:
        raise InputError("the server did not start: its log says why")
    say("kveraser: stopped")


def _check_open(host: str, keys: Keys, without_keys: bool) -> None:
    if host not in LOOPBACK_HOSTS and not keys and not without_keys:
        raise typer.BadParameter(
            f"--host {host} can be reached by others, and there are no API keys: give --api-keys, or --without-keys"
        )


def _bind(host: str, port: int) -> socket.socket:
    """Bind the socket before the model is loaded, so that errors are reported early."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(f"can't listen on {host}:{port} ({error.strerror or error}): give another --port") from error


def _names(host: str, allowed: list[str] | None) -> frozenset[str] | None:
    """Accepted host names; None: any, on an address that others can reach."""
    from kveraser.serve.app import LOOPBACK

    if host not in LOOPBACK_HOSTS and not allowed:
        return None
    return LOOPBACK | {host.lower()} | {name.lower() for name in allowed or ()}
