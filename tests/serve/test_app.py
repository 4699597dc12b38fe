"""Requests that are no requests, the playground's files, and what every reply carries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kveraser.serve.app import Settings, create_app
from kveraser.serve.errors import Overloaded
from tests.serve_fake import MODEL, FakeService, http

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"


def chat_body(text: str) -> bytes:
    return b'{"model": "fake", "messages": [{"role": "user", "content": %s}]}' % text.encode()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "the body: it is missing"),
        (b"{", 400, "is not JSON"),
        (b"null", 400, ""),
        (b"[]", 400, ""),
        (b"5", 400, ""),
        (b'"a"', 400, ""),
        (b"\xff\xfe{\x00}\x00", 400, "is not JSON"),
        (chat_body('"\xff"').replace(b"\xc3\xbf", b"\xff"), 400, "is not JSON"),
        (chat_body('"\\ud800"'), 400, "is not JSON"),
        (chat_body('"\\udc00\\ud800"'), 400, "is not JSON"),
        (b"\xef\xbb\xbf" + chat_body('"a"'), 400, "is not JSON"),
        (chat_body('"a"')[:-1] + b', "temperature": NaN}', 400, "is not JSON"),
        (chat_body('"a"')[:-1] + b', "temperature": Infinity}', 400, "is not JSON"),
        (chat_body('"a"')[:-1] + b', "temperature": 1e999}', 400, "temperature"),
        (chat_body('"a"')[:-1] + b', "max_tokens": ' + b"9" * 5000 + b"}", 400, ""),
        (chat_body('"a"')[:-1] + b', "seed": -1e400}', 400, "seed"),
        (b"[" * 100_000, 400, "is not JSON"),
        (b'{"a":' * 100_000, 400, "is not JSON"),
        (chat_body("[" * 150 + "]" * 150), 400, "messages.0.content"),
        (chat_body('{"__proto__": 1}'), 400, "messages.0.content"),
    ],
)
async def test_a_body_that_is_none_is_refused(body: bytes, status: int, message: str) -> None:
    service = FakeService()
    async with http(service) as client:
        reply = await client.post(CHAT, content=body, headers=JSON)
    error = reply.json()["error"]
    assert reply.status_code == status and error["type"] == "invalid_request_error" and message in error["message"]
    assert len(error["message"]) < 500 and not service.turns


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded", ""]
)
async def test_a_body_that_a_web_page_may_send_anywhere_is_refused(kind: str) -> None:
    service = FakeService()
    async with http(service) as client:
        reply = await client.post(CHAT, content=chat_body('"a"'), headers={"content-type": kind})
        assert reply.status_code == 415 and reply.json()["error"]["code"] == "unsupported_media_type"
        good = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await client.post(CHAT, content=chat_body('"a"'), headers=good)).status_code == 200
    assert len(service.turns) == 1


async def test_a_body_is_read_up_to_its_limit() -> None:
    body = chat_body('"a"')
    for most, status in ((len(body), 200), (len(body) - 1, 413)):
        async with http(FakeService(), Settings(most_bytes=most)) as client:
            assert (await client.post(CHAT, content=body, headers=JSON)).status_code == status

            async def pieces() -> object:
                for byte in body:
                    yield bytes([byte])

            assert (await client.post(CHAT, content=pieces(), headers=JSON)).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nothing", 404, None),
        ("POST", "/", 405, "GET"),
        ("GET", CHAT, 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
        ("PATCH", "/v1/sessions/a", 405, "GET"),
        ("BREW", "/v1/models", 405, "GET"),
        ("GET", "/v1/chat/completions/", 404, None),
        ("GET", "/v1/models/no/such/model", 404, None),
        ("GET", "/docs", 404, None),
        ("GET", "/page/%2e%2e/app.py", 404, None),
        ("GET", "/page/..%2fapp.py", 404, None),
        ("GET", "/page//etc/passwd", 404, None),
        ("GET", "/page/%00", 404, None),
        ("GET", "/" + "a" * 10_000, 404, None),
    ],
)
@pytest.mark.parametrize("page", ["", "missing"])
async def test_unknown_paths_and_methods_are_error_objects(
    method: str, path: str, status: int, allow: str | None, page: str, tmp_path: Path
) -> None:
    async with http(FakeService(), Settings(page=tmp_path / page)) as client:
        reply = await client.request(method, path)
    error = reply.json()["error"]
    assert reply.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300 and (allow is None or allow in reply.headers["allow"])


async def test_the_playground_is_served_with_a_strict_policy(tmp_path: Path) -> None:
    async with http(FakeService(), Settings(page=tmp_path / "page")) as client:
        for path in ("/", "/page/", "/page/app.js"):
            assert (await client.get(path)).json()["error"]["code"] == "not_found"
        (tmp_path / "page").mkdir()
        (tmp_path / "page" / "index.html").write_text("<!doctype html>")
        (tmp_path / "page" / "app.js").write_text("0")
        (tmp_path / "secret").write_text("secret")
        (tmp_path / "page" / "link").symlink_to(tmp_path / "secret")
        for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript")):
            reply = await client.get(path)
            assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
        assert "secret" not in (await client.get("/page/link")).text
        assert (await client.post("/page/app.js")).status_code == 405


async def test_every_reply_has_an_id_of_its_own() -> None:
    async with http(FakeService()) as client:
        replies = [await client.get(path) for path in ("/health", "/nothing", "/v1/models")]
    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == 3


async def test_health_says_which_models_there_are_and_the_numbers() -> None:
    async with http(FakeService()) as client:
        reply = await client.get("/health")
    assert reply.json() == {
        "object": "health",
        "models": [MODEL],
        "status": {"contexts": 3.0, "sessions": 0.0, "bytes_held": 2048.0, "streams": 0.0},
    }


async def test_retry_after_is_a_whole_number_of_seconds() -> None:
    service = FakeService()
    async with http(service) as client:
        for given, sent in ((0.01, "1"), (2.0, "2"), (2.1, "3")):
            service.failure = Overloaded("wait", retry_after=given)
            reply = await client.post("/v1/sessions", json={"text": "a"})
            assert (reply.status_code, reply.headers["retry-after"]) == (429, sent)


async def test_the_service_is_closed_when_the_server_stops() -> None:
    service = FakeService()
    app = create_app(service)
    async with app.router.lifespan_context(app):
        assert not service.closed
    assert service.closed


async def test_what_failed_is_counted_and_told_to_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    service = FakeService()
    service.failure = ValueError("the client wrote 7777")
    async with http(service) as client:
        reply = await client.post("/v1/sessions", json={"text": "a"})
        metrics = (await client.get("/metrics")).text
    assert reply.status_code == 500 and json.loads(reply.text)["error"]["type"] == "server_error"
    assert "7777" not in reply.text + capsys.readouterr().err
    assert 'kveraser_requests_total{method="POST",route="/v1/sessions",status="500"} 1.0' in metrics
