"""Error replies: what a client did wrong, as OpenAI-style error objects."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from kveraser.errors import KVEraserError
from kveraser.serve.errors import (
    InvalidRequest,
    NotFound,
    NotJson,
    ServeError,
    TooLarge,
    TooSlow,
    WrongMethod,
    as_serve_error,
)

SHOWN_VALUE = 80
"""Most characters of a wrong value in a message."""

SHOWN_FIELDS = 8


class Refusal(JSONResponse):
    """An error reply; the request's log line says which it was."""

    def __init__(self, error: ServeError, headers: Mapping[str, str]) -> None:
        super().__init__(_printable(error.to_json()), error.status, headers)
        self.error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Field names that clients made up may be anything: only what can be one of ours is logged.
        field = self.error.param if re.fullmatch(r"[a-z0-9_.]{1,80}", self.error.param or "") else None
        scope["refusal"] = {"code": self.error.code, "field": field}
        await super().__call__(scope, receive, send)


def error_response(error: KVEraserError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The reply that an error becomes."""
    serve = as_serve_error(error)
    sent = dict(headers or {})
    if serve.retry_after is not None:
        sent["Retry-After"] = str(max(1, math.ceil(serve.retry_after)))
    if serve.status == 401:
        sent["WWW-Authenticate"] = "Bearer"
    return Refusal(serve, sent)


def _printable(body: dict[str, Any]) -> dict[str, Any]:
    """The body with what can't be encoded replaced: a message may quote what a client wrote in a path."""
    message = body["error"]["message"].encode("utf-8", "replace").decode()
    return {"error": {**body["error"], "message": message}}


def of_http(error: HTTPException, method: str, path: str) -> ServeError:
    """What the framework refuses."""
    match error.status_code:
        case 404:
            return NotFound(f"there is nothing at {path[:SHOWN_VALUE]!r}: see /openapi.json")
        case 405:
            return WrongMethod(f"{path[:SHOWN_VALUE]!r} takes no {method[:SHOWN_VALUE]}: see /openapi.json")
        case 408:
            return TooSlow(error.detail)
        case 413:
            return TooLarge(error.detail)
        case 415:
            return NotJson(error.detail)
    return InvalidRequest(error.detail)


def of_validation(error: RequestValidationError) -> InvalidRequest:
    """What is wrong with a body or a path: the most telling of pydantic's complaints, and how many more there are."""
    found: Sequence[Mapping[str, Any]] = error.errors()
    # Of a field's alternatives the one that was meant fails furthest inside, and not by its type.
    same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]
    first = max(same, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    param, message = _field(first, error.body), _told(first)
    fields = [_field(one, error.body) for one in found]
    others = {field for field in fields if not (param.startswith(field) or field.startswith(param))}
    more = f"; wrong as well: {', '.join(sorted(others)[:SHOWN_FIELDS])}" if others else ""
    return InvalidRequest(f"{param or 'the body'}: {message}{more}", param=param or None)


def _field(one: Mapping[str, Any], body: Any) -> str:
    """A field's path as clients know it: pydantic also names the alternative of a field's type that it tried."""
    where, *path = one["loc"]
    if where != "body":
        return ".".join(map(str, path))
    known = []
    for part in path:
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
        elif one["type"] != "missing" or part != path[-1]:
            continue
        known.append(str(part)[:SHOWN_VALUE])
    return ".".join(known)


def _told(one: Mapping[str, Any]) -> str:
    match one["type"]:
        case "value_error":
            return str(one["ctx"]["error"])
        case "missing":
            return "it is missing"
        case "extra_forbidden":
            return "this server knows no such field: leave it out"
    said = str(one["msg"])
    said = said[:1].lower() + said[1:]
    value = one.get("input")
    if isinstance(value, str | int | float | bool | None):
        shown = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return f"{said}, but it is {shown if len(shown) <= SHOWN_VALUE else shown[:SHOWN_VALUE] + '...'}"
    return said
