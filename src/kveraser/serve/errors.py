"""Errors of the server, with their HTTP status and the fields of OpenAI's error object."""

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
        message: the problem, with the wrong value, and how to fix it.
        param: the wrong field of the request.
        code: machine-readable name of the error; None: the default of the class.
        retry_after: seconds after which the client should retry.

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
    """The request is malformed or asks for something impossible."""

    status, kind = 400, "invalid_request_error"


class ContextOverflow(InvalidRequest):
    """The context and its answer need more positions than the model has."""

    usual_code = "context_length_exceeded"


class Unauthorized(ServeError):
    """The API key is missing or invalid."""

    status, kind, usual_code = 401, "authentication_error", "invalid_api_key"


class NotFound(ServeError):
    """The path does not exist."""

    status, kind, usual_code = 404, "not_found_error", "not_found"


class WrongMethod(ServeError):
    """The path does not support this HTTP method."""

    status, kind, usual_code = 405, "invalid_request_error", "method_not_allowed"


class TooSlow(ServeError):
    """The request body was not received in time."""

    status, kind, usual_code = 408, "invalid_request_error", "request_timeout"


class UnknownModel(ServeError):
    """The server has no model of this name."""

    status, kind, usual_code = 404, "not_found_error", "model_not_found"


class UnknownSession(ServeError):
    """The API key has no session with this id. A session of another key is reported in the same way."""

    status, kind, usual_code = 404, "not_found_error", "session_not_found"


class SessionBusy(ServeError):
    """The session is in use, or the operation is not possible in its current state."""

    status, kind, usual_code = 409, "conflict_error", "session_conflict"


class SessionGone(ServeError):
    """The session existed, but its last acknowledged state can't be restored."""

    status, kind, usual_code = 410, "not_found_error", "session_gone"


class TooLarge(ServeError):
    """The request body exceeds the size limit."""

    status, kind, usual_code = 413, "invalid_request_error", "request_too_large"


class NotJson(ServeError):
    """The request's body is not declared as JSON."""

    status, kind, usual_code = 415, "invalid_request_error", "unsupported_media_type"


class Overloaded(ServeError):
    """Too many requests, from this key or in total."""

    status, kind, usual_code = 429, "rate_limit_error", "rate_limit_exceeded"


class OutOfSpace(ServeError):
    """The disk, or the memory for contexts, is full."""

    status, kind, usual_code = 507, "server_error", "out_of_space"


def as_serve_error(error: KVEraserError) -> ServeError:
    """Convert a library error to an HTTP error; errors that no input should cause get status 500."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, ContextLengthError):
        return ContextOverflow(str(error))
    if isinstance(error, SpanError | MethodError | InputError | EraserError | BackboneError):
        return InvalidRequest(str(error))
    if isinstance(error, SessionError):
        return SessionBusy(str(error))
    return ServeError(str(error), code="internal_error")
