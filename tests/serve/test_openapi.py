"""The OpenAPI document is true: requests made from it, good and bad ones, get replies that it names."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from kveraser.serve.access import Keys
from kveraser.serve.app import Settings, create_app
from kveraser.serve.schemas import ChatRequest, CompletionRequest
from kveraser.serve.session_schemas import AskRequest, AuditRequest, EraseRequest, NewMessages, NewSession, UndoRequest
from tests.serve_fake import MODEL, FakeService

EXAMPLES = int(os.environ.get("KVERASER_SCHEMA_EXAMPLES", "10"))
"""Requests a route, good ones and as many bad ones."""

KEY = "alice-0123456789"
SETTINGS = Settings(keys=Keys([KEY]), hosts=None)

# What the schemas can't say (one of two fields, a method's parameters) is refused with 400 as well.
load_all_checks()
UNTOLD = CHECKS.get_by_names(["positive_data_acceptance"])


class Lasting(FakeService):
    """Has one session that nothing deletes."""

    def __init__(self) -> None:
        super().__init__()
        owner = SETTINGS.keys.owner(f"Bearer {KEY}")
        self.first = asyncio.run(self.create(owner, text="a"))
        self.key = (owner, self.first.id)

    def _session(self, key: str, id: str) -> Any:
        self.sessions[self.key] = self.first
        return super()._session(key, id)


@pytest.fixture(scope="module")
def document() -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(Lasting(), SETTINGS))


ROUTES = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "GET /v1/methods",
    "POST /v1/sessions",
    "GET /v1/sessions",
    "GET /v1/sessions/{session}",
    "DELETE /v1/sessions/{session}",
    "GET /v1/sessions/{session}/tokens",
    "POST /v1/sessions/{session}/erase",
    "POST /v1/sessions/{session}/undo",
    "POST /v1/sessions/{session}/fork",
    "POST /v1/sessions/{session}/audit",
    "POST /v1/sessions/{session}/influence",
    "POST /v1/sessions/{session}/messages",
    "POST /v1/sessions/{session}/ask",
    "GET /health",
    "GET /metrics",
]


@pytest.mark.parametrize(
    ("route", "mode"),
    # Of a route without body and parameters there is nothing to get wrong.
    [
        (route, mode)
        for mode in GenerationMode
        for route in ROUTES
        if mode.is_positive or "POST" in route or "{" in route
    ],
)
def test_replies_are_as_the_document_says(route: str, mode: GenerationMode, document: Any) -> None:
    verb, path = route.split()
    operation = document[path][verb]
    cases = operation.as_strategy(mode)
    if "{session}" in path:
        cases |= operation.as_strategy(mode, path_parameters={"session": "session_0"})

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(cases)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and mode.is_positive and "model" in case.body:
            case.body["model"] = MODEL
        case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, excluded_checks=UNTOLD)

    check()


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    return create_app(FakeService()).openapi()


def test_every_route_names_the_errors_that_it_has(openapi: dict[str, Any]) -> None:
    operations = {
        f"{verb.upper()} {path}": operation
        for path, verbs in openapi["paths"].items()
        for verb, operation in verbs.items()
    }
    assert sorted(operations) == sorted(ROUTES)
    for name, operation in operations.items():
        statuses = set(operation["responses"])
        assert "422" not in statuses and operation["summary"] and operation["description"], name
        assert {"400", "500"} <= statuses
        if name != "GET /health":
            assert {"401", "429"} <= statuses and operation["security"] == [{"API key": []}], name
            assert "Retry-After" in operation["responses"]["429"]["headers"]
        if "requestBody" in operation:
            assert {"413", "415"} <= statuses, name
        if "{session}" in name:
            assert {"404", "410"} <= statuses, name
        for status, reply in operation["responses"].items():
            if status >= "400":
                assert reply["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply")
    assert "HTTPValidationError" not in openapi["components"]["schemas"]


@pytest.mark.parametrize(
    "body",
    [ChatRequest, CompletionRequest, NewSession, NewMessages, EraseRequest, UndoRequest, AuditRequest, AskRequest],
)
def test_the_examples_are_good_requests(body: Any, openapi: dict[str, Any]) -> None:
    examples = openapi["components"]["schemas"][body.__name__]["examples"]
    assert examples and all(body.model_validate(example) for example in examples)
