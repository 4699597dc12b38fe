"""Logs are one JSON object a line, and never hold what a client or the model wrote."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from kveraser.serve.access import Keys
from kveraser.serve.app import Settings
from kveraser.serve.logs import configure, log
from tests.serve_fake import MODEL, FakeService, http

KEY = "alice-0123456789"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Where the logs go; the loggers are as before afterwards."""
    loggers = [logging.getLogger(name) for name in ("kveraser.serve", "uvicorn", "uvicorn.error")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    stream = io.StringIO()
    configure(stream=stream)
    yield stream
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_an_object_with_time_level_and_event(written: io.StringIO) -> None:
    log("started", port=8000)
    log("slow", logging.WARNING, seconds=1.5)
    log("never seen", logging.DEBUG)
    first, second = lines(written)
    assert (first["level"], first["event"], first["port"]) == ("info", "started", 8000)
    assert (second["level"], second["seconds"]) == ("warning", 1.5) and second["time"] >= first["time"]


def test_an_error_is_told_by_its_kind_and_place_alone(written: io.StringIO) -> None:
    try:
        try:
            raise KeyError("the secret is 7777")
        except KeyError as error:
            raise ValueError("the client wrote 7777") from error
    except ValueError:
        # As uvicorn logs what reaches it.
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    (line,) = lines(written)
    assert (line["error"], line["cause"]) == ("ValueError", "KeyError") and "7777" not in written.getvalue()
    assert any("test_an_error_is_told" in frame for frame in line["stack"])


@pytest.mark.anyio
async def test_requests_are_logged_without_contents(written: io.StringIO) -> None:
    service, settings = FakeService(["ANSWERED"]), Settings(keys=Keys([KEY]))
    messages = [{"role": "user", "content": "ASKED"}]
    async with http(service, settings, Authorization=f"Bearer {KEY}") as client:
        for stream in (False, True):
            await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "stream": stream})
        await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "temperature": "ASKED"})
        await client.get("/ASKED?ASKED=ASKED", headers={"ASKED": "ASKED"})
        made = await client.post("/v1/sessions", json={"text": "ASKED"})
        await client.get(f"/v1/sessions/{made.json()['id']}")
        service.failure = ValueError("ASKED")
        await client.post("/v1/sessions", json={"text": "ASKED"})
    requests = [line for line in lines(written) if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 200),
        ("POST", "/v1/chat/completions", 400),
        ("GET", "unknown", 404),
        ("POST", "/v1/sessions", 201),
        ("GET", "/v1/sessions/{session}", 200),
        ("POST", "/v1/sessions", 500),
    ]
    (failed,) = [line for line in lines(written) if line["event"] == "failed"]
    assert failed["error"] == "ValueError" and failed["request_id"] == requests[-1]["request_id"]
    for secret in ("ASKED", "ANSWERED", KEY):
        assert secret not in written.getvalue()
