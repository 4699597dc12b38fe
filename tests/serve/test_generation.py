"""Answers over real connections: they come in pieces while they are made, and end with their client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest

from kveraser.serve.app import Settings
from tests.serve_fake import MODEL, PIECES, FakeService, listening

pytestmark = pytest.mark.anyio

MESSAGES: list[Any] = [{"role": "user", "content": "Where is it?"}]


def request_bytes(path: str, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    ).encode() + payload


async def until(condition: Any) -> None:
    """Let the server run until something is so; a test that waits in vain is stopped here."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


async def test_pieces_arrive_while_the_answer_is_made() -> None:
    service = FakeService()
    service.gate = asyncio.Event()
    async with (
        listening(service) as (host, port),
        openai.AsyncOpenAI(api_key="unused", base_url=f"http://{host}:{port}/v1", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        said = ""
        async for chunk in stream:
            said += chunk.choices[0].delta.content or ""
            if said == "".join(PIECES[:-1]):
                # All but the last piece are here, and the service still holds that one back.
                assert service.running == 1
                service.gate.set()
        assert said == "".join(PIECES)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/sessions/session_0/ask"])
async def test_a_client_that_goes_away_cancels_its_answer(path: str, stream: bool) -> None:
    service = FakeService()
    service.gate = asyncio.Event()
    await service.create("anonymous", text="a")
    body: dict[str, Any] = {"question": "a", "stream": stream}
    if path.startswith("/v1/c"):
        body = {"model": MODEL, "stream": stream} | ({"messages": MESSAGES} if "chat" in path else {"prompt": "a"})
    async with listening(service) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request_bytes(path, body))
        await writer.drain()
        await until(lambda: service.running == 1)
        if stream:
            assert b"200 OK" in await reader.readline()
        writer.close()
        await until(lambda: service.running == 0)
        assert service.cancelled == 1
        # The server goes on.
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
            counted = (await client.get("/metrics")).text
            assert (await client.get("/v1/models")).status_code == 200
    assert "kveraser_requests_running 1.0" in counted
    assert f'status="{200 if stream else 499}"' in counted
    assert service.closed


async def test_a_client_that_reads_on_to_the_end_cancels_nothing() -> None:
    service = FakeService()
    async with listening(service) as (host, port), httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
        for stream in (False, True):
            body = {"model": MODEL, "messages": MESSAGES, "stream": stream}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert (service.running, service.cancelled) == (0, 0)


async def test_a_body_over_the_limit_is_refused_while_it_is_read() -> None:
    service, settings = FakeService(), Settings(most_bytes=1000)
    messages: list[Any] = [{"role": "user", "content": "a" * 100_000}]
    async with listening(service, settings) as (host, port):
        async with openai.AsyncOpenAI(api_key="unused", base_url=f"http://{host}:{port}/v1", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError) as refused:
                await client.chat.completions.create(model=MODEL, messages=messages)
        assert refused.value.status_code == 413 and refused.value.code == "request_too_large"
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        # The body never ends: the reply comes once it is too long.
        for _ in range(5):
            writer.write(b"fa\r\n" + b" " * 250 + b"\r\n")
            await writer.drain()
        assert b"413" in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
    assert not service.turns


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    service = FakeService()
    async with listening(service, Settings(body_seconds=0.01)) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(request_bytes("/v1/completions", {"model": MODEL, "prompt": "a"})[:-5])
        assert b"408" in await asyncio.wait_for(reader.readline(), 30)
        writer.close()
    assert not service.turns


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n"
        b"Content-Type: application/json\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /v1/sessions/%ff%00%ed%a0%80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
async def test_what_is_no_proper_request_is_refused_and_the_server_goes_on(sent: bytes) -> None:
    async with listening(FakeService()) as (host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(sent)
        status = await asyncio.wait_for(reader.readline(), 30)
        assert status.split()[1] in (b"400", b"404", b"413"), status
        writer.close()
        async with httpx2.AsyncClient(base_url=f"http://{host}:{port}") as client:
            assert (await client.get("/v1/models")).status_code == 200
