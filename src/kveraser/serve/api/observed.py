"""The outermost layer: every request gets an id, is counted and logged, and ends in a reply, whatever happens."""

from __future__ import annotations

import logging
import time
from secrets import token_hex

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kveraser.errors import KVEraserError
from kveraser.serve.api.generation import internal_error
from kveraser.serve.api.refusals import error_response
from kveraser.serve.logs import error_fields, log
from kveraser.serve.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that metrics tell apart; clients can write any word."""


class Observed:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, status = f"req_{token_hex(8)}", time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        scope["request_id"] = request_id
        self.metrics.began()
        try:
            try:
                await self.app(scope, receive, counted)
            except Exception as error:
                if not isinstance(error, KVEraserError):
                    log("failed", logging.ERROR, request_id=request_id, **error_fields(error))
                    error = internal_error()
                if status:
                    # Half a response is out: the connection is cut, which tells the client.
                    raise
                await error_response(error)(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.monotonic() - began
            self.metrics.ended(route, method, status, seconds)
            log(
                "request",
                request_id=request_id,
                route=route,
                method=method,
                status=status,
                seconds=round(seconds, 4),
                owner=str(scope.get("owner") or "-")[:12],
                **scope.get("refusal", {}),
            )
