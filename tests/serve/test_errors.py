"""What each error means to a client."""

from __future__ import annotations

import pytest

from kveraser import errors as library
from kveraser.serve import errors
from kveraser.serve.errors import ServeError, as_serve_error


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (library.SpanError("a"), 400, "invalid_request_error", None),
        (library.AmbiguousSpanError("a", [(0, 1), (2, 3)], ["a", "a"]), 400, "invalid_request_error", None),
        (library.MethodError("a"), 400, "invalid_request_error", None),
        (library.InputError("a"), 400, "invalid_request_error", None),
        (library.EraserError("a"), 400, "invalid_request_error", None),
        (library.RotationError("a"), 400, "invalid_request_error", None),
        (library.ContextLengthError("a"), 400, "invalid_request_error", "context_length_exceeded"),
        (library.SessionError("a"), 409, "conflict_error", "session_conflict"),
        (library.CacheError("a"), 500, "server_error", "internal_error"),
        (errors.Unauthorized("a"), 401, "authentication_error", "invalid_api_key"),
        (errors.UnknownModel("a"), 404, "not_found_error", "model_not_found"),
        (errors.UnknownSession("a"), 404, "not_found_error", "session_not_found"),
        (errors.SessionGone("a"), 410, "not_found_error", "session_gone"),
        (errors.Overloaded("a", code="queue_full"), 429, "rate_limit_error", "queue_full"),
        (errors.OutOfSpace("a"), 507, "server_error", "out_of_space"),
    ],
)
def test_an_error_has_its_status_and_the_form_that_clients_read(
    error: library.KVEraserError, status: int, kind: str, code: str | None
) -> None:
    serve = as_serve_error(error)
    assert isinstance(serve, ServeError) and serve.status == status
    assert serve.to_json() == {"error": {"message": str(error), "type": kind, "param": None, "code": code}}


def test_an_error_keeps_its_field_and_when_to_come_back() -> None:
    error = errors.Overloaded("busy", param="messages", retry_after=2.5)
    assert as_serve_error(error) is error
    assert (error.param, error.retry_after, error.to_json()["error"]["param"]) == ("messages", 2.5, "messages")
