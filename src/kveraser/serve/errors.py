"""Every error that the server answers with: its HTTP status, and the type, code and field of OpenAI's error object."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from kveraser.errors import (
    BackboneError,
    ContextLengthError,
    EraserError,
    InputError,
    KVEraserError,
    MethodError,
    SessionError,
    SpanError,
)

Kind = Literal[
    "invalid_request_error",
    "authentication_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
]


class ServeError(KVEraserError):
    """A request can't be served.

    Args:
        message: what was wrong, with the value, and what to do.
        param: the request's field that was wrong.
        code: what went wrong, for programs; None: the class's own.
        retry_after: seconds after which the same request may be served.

    Attributes:
        status: of the HTTP response.
        kind: OpenAI's error type.
    """

    status: ClassVar[int] = 500
    kind: ClassVar[Kind] = "server_error"
    usual_code: ClassVar[str | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.retry_after = param, retry_after
        self.code = self.usual_code if code is None else code

    def to_json(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class InvalidRequest(ServeError):
    """The request has the wrong form, or asks for what can't be done."""

    status, kind = 400, "invalid_request_error"


class ContextOverflow(InvalidRequest):
    """The context and its answer need more positions than the model has."""

    usual_code = "context_length_exceeded"


class Unauthorized(ServeError):
    """There is no valid API key."""

    status, kind, usual_code = 401, "authentication_error", "invalid_api_key"


class NotFound(ServeError):
    """There is nothing at this path."""

    status, kind, usual_code = 404, "not_found_error", "not_found"


class WrongMethod(ServeError):
    """There is something at this path, but not for this method."""

    status, kind, usual_code = 405, "invalid_request_error", "method_not_allowed"


class TooSlow(ServeError):
    """The request's body did not come in time."""

    status, kind, usual_code = 408, "invalid_request_error", "request_timeout"


class UnknownModel(ServeError):
    """The server has no model of this name."""

    status, kind, usual_code = 404, "not_found_error", "model_not_found"


class UnknownSession(ServeError):
    """The key has no session of this id; whether another key has one is not told."""

    status, kind, usual_code = 404, "not_found_error", "session_not_found"


class SessionBusy(ServeError):
    """The session does something else just now, or can't do this in its present state."""

    status, kind, usual_code = 409, "conflict_error", "session_conflict"


class SessionGone(ServeError):
    """The session was there, but its last acknowledged state can't be brought back."""

    status, kind, usual_code = 410, "not_found_error", "session_gone"


class TooLarge(ServeError):
    """The request's body is larger than the server reads."""

    status, kind, usual_code = 413, "invalid_request_error", "request_too_large"


class NotJson(ServeError):
    """The request's body is not declared as JSON."""

    status, kind, usual_code = 415, "invalid_request_error", "unsupported_media_type"


class Overloaded(ServeError):
    """Too many requests, of this key or in all; `retry_after` says when to come back."""

    status, kind, usual_code = 429, "rate_limit_error", "rate_limit_exceeded"


class OutOfSpace(ServeError):
    """The disk, or the memory for contexts, is full."""

    status, kind, usual_code = 507, "server_error", "out_of_space"


def as_serve_error(error: KVEraserError) -> ServeError:
    """What a library error means to a client; errors that no input should cause are the server's own, status 500."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, ContextLengthError):
        return ContextOverflow(str(error))
    if isinstance(error, SpanError | MethodError | InputError | EraserError | BackboneError):
        return InvalidRequest(str(error))
    if isinstance(error, SessionError):
        return SessionBusy(str(error))
    return ServeError(str(error), code="internal_error")
