"""What all routes share: how bodies are read, whose request it is, and which errors the OpenAPI document names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from kveraser.serve.fields import ErrorReply
from kveraser.serve.logs import log
from kveraser.serve.metrics import Metrics
from kveraser.serve.service import Service

ERRORS: dict[int, str] = {
    400: "The request has the wrong form, or asks for what can't be done.",
    401: "There is no valid API key.",
    404: "No such model, session or path; also a session of another key.",
    408: "The body did not come in time.",
    409: "The session is busy, or can't do this in its present state.",
    410: "The session's last acknowledged state can't be brought back.",
    413: "The body is larger than the server reads.",
    415: "The body is not declared as JSON.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "A fault of the server's.",
    507: "The disk, or the memory for contexts, is full.",
}
"""Statuses of error replies; every one has the same body."""

ANSWERING = (400, 401, 404, 408, 413, 415, 429, 500, 507)
EDITING = (*ANSWERING, 409, 410)
READING = (400, 401, 429, 500)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error replies of a route, for the OpenAPI document."""
    replies: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": ERRORS[status]} for status in sorted(statuses)
    }
    if 429 in replies:
        wait = {"description": "Seconds to wait.", "schema": {"type": "integer"}}
        replies[429] |= {"headers": {"Retry-After": wait}}
    return replies


class JsonRequest(Request):
    """A request whose body is read up to a limit, and as strict JSON: UTF-8, finite numbers, bounded nesting."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            most: int = self.app.state.most_bytes
            declared = self.headers.get("content-length", "")
            if declared.isdecimal() and (len(declared) > 18 or int(declared) > most):
                raise HTTPException(413, _too_large(most))
            pieces, size = [], 0
            try:
                async with asyncio.timeout(self.app.state.body_seconds):
                    async for piece in self.stream():
                        size += len(piece)
                        if size > most:
                            raise HTTPException(413, _too_large(most))
                        pieces.append(piece)
            except TimeoutError as error:
                raise HTTPException(408, "the body did not come in time: send it without pauses") from error
            self._body = b"".join(pieces)
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if self._body and kind != "application/json" and not kind.endswith("+json"):
                raise HTTPException(415, f"the body is declared as {kind!r}: send it as application/json")
        return self._body

    async def json(self) -> Any:
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON ({error}): send a JSON object in UTF-8") from error


def _too_large(most: int) -> str:
    return f"the body is larger than {most} bytes, the limit: send less, or start the server with a higher --max-body"


class JsonRoute(APIRoute):
    """A route that reads its body as `JsonRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return checked


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


def _owner(request: Request) -> str:
    owner: str = request.scope["owner"]
    return owner


def _starts(request: Request) -> None:
    """A request that hangs is found in the log by its id, before it ends."""
    log(
        "request started",
        request_id=request.scope.get("request_id"),
        route=getattr(request.scope.get("route"), "path", "unknown"),
        method=request.method,
        owner=str(request.scope.get("owner") or "-")[:12],
    )


Served = Annotated[Service, Depends(_service)]
Counted = Annotated[Metrics, Depends(_metrics)]
Owner = Annotated[str, Depends(_owner)]
"""A hash of the request's key."""


def router(tag: str) -> APIRouter:
    """A router for routes that need a key."""
    key = HTTPBearer(auto_error=False, scheme_name="API key", description="Only when the server was given keys.")
    return APIRouter(tags=[tag], route_class=JsonRoute, dependencies=[Depends(key), Depends(_starts)])


__all__ = [
    "ANSWERING", "EDITING", "ERRORS", "READING", "Counted", "JsonRequest", "JsonRoute", "Owner", "Served", "errors",
    "router",
]  # fmt: skip
