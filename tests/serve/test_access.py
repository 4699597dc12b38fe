"""Who may ask, from where, and how much."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx2
import openai
import pytest

from kveraser.errors import InputError
from kveraser.serve.access import ANONYMOUS, Gate, Keys, Limits, read_keys
from kveraser.serve.app import Settings
from kveraser.serve.errors import Overloaded, Unauthorized
from tests.serve_fake import MODEL, FakeService, client_of, http

ALICE, BOB = "alice-0123456789", "bob-0123456789abc"


def test_each_key_is_an_owner_of_its_own_and_is_kept_nowhere() -> None:
    keys = Keys([ALICE, BOB])
    owners = {keys.owner(f"Bearer {key}") for key in (ALICE, BOB)}
    assert len(owners) == 2 and ANONYMOUS not in owners
    assert keys.owner(f"bearer  {ALICE}") == keys.owner(f"Bearer {ALICE}")
    # The owner stays the same when the server starts again, with other keys beside it.
    assert Keys([BOB, ALICE]).owner(f"Bearer {ALICE}") == keys.owner(f"Bearer {ALICE}")
    assert ALICE not in repr(vars(keys)) and all(ALICE not in owner for owner in owners)


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Basic {ALICE}", ALICE, f"Bearer {ALICE[:-1]}", f"Bearer {ALICE}x", "Bearer é"],
)
def test_what_is_no_key_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized, match="API key"):
        Keys([ALICE]).owner(header)


def test_without_keys_everyone_is_the_same_owner() -> None:
    assert Keys().owner(None) == Keys().owner(f"Bearer {ALICE}") == ANONYMOUS


def test_keys_come_from_a_file_and_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYS", raising=False)
    assert len(read_keys(None, "KEYS")) == 0
    file = tmp_path / "keys"
    file.write_text(f"# team\n{ALICE}  # alice\n\n")
    monkeypatch.setenv("KEYS", f"{BOB}, {ALICE}")
    keys = read_keys(file, "KEYS")
    assert len(keys) == 2 and keys.owner(f"Bearer {BOB}") != keys.owner(f"Bearer {ALICE}")


def test_a_file_that_would_leave_the_server_open_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    with pytest.raises(InputError, match="can't read"):
        read_keys(file, "KEYS")
    file.write_text("# nobody yet\n")
    with pytest.raises(InputError, match="holds no API key"):
        read_keys(file, "KEYS")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="can't read"):
        read_keys(file, "KEYS")


@pytest.mark.parametrize("key", ["short", "with a space 012345", "ünicode-0123456789"])
def test_a_key_that_is_no_secret_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InputError, match="API key 2") as refused:
        Keys([ALICE, key])
    assert key not in str(refused.value)


def test_only_so_many_requests_run_at_once() -> None:
    gate = Gate(Limits(requests_at_once=2))
    gate.enter("alice")
    gate.enter("alice")
    gate.enter("bob")
    with pytest.raises(Overloaded, match="2 requests") as refused:
        gate.enter("alice")
    assert refused.value.retry_after == 1
    gate.leave("alice")
    gate.enter("alice")


def test_a_rate_is_kept_and_the_client_is_told_when_to_come_back() -> None:
    now = 100.0
    gate = Gate(Limits(requests_per_minute=2), lambda: now)

    def ask(owner: str) -> None:
        gate.enter(owner)
        gate.leave(owner)

    ask("alice")
    ask("alice")
    with pytest.raises(Overloaded, match="2 times a minute") as refused:
        ask("alice")
    assert refused.value.retry_after == 30
    ask("bob")
    now += 29
    with pytest.raises(Overloaded) as refused:
        ask("alice")
    assert refused.value.retry_after == 1
    now += 1
    ask("alice")
    # Waiting for hours saves up no more than a minute's worth.
    now += 10_000
    ask("alice")
    ask("alice")
    with pytest.raises(Overloaded):
        ask("alice")


@pytest.mark.anyio
async def test_every_route_but_the_open_ones_needs_the_key() -> None:
    settings = Settings(keys=Keys([ALICE, BOB]))
    async with http(FakeService(), settings) as client:
        for path in ("/v1/models", "/v1/sessions", "/metrics", "/v1/nothing", "/nothing"):
            reply = await client.get(path)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        # Refused before its body is looked at.
        assert (await client.post("/v1/chat/completions", content=b"{")).status_code == 401
        for path in ("/health", "/openapi.json"):
            assert (await client.get(path)).status_code == 200


@pytest.mark.anyio
async def test_sessions_belong_to_their_key() -> None:
    service, settings = FakeService(), Settings(keys=Keys([ALICE, BOB]))
    async with client_of(service, settings, ALICE) as client:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "a"}])
        made = await client.post("/sessions", body={"text": "a"}, cast_to=httpx2.Response)
    assert service.turns[0][0] == settings.keys.owner(f"Bearer {ALICE}")
    path = f"/v1/sessions/{made.json()['id']}"
    async with http(service, settings, Authorization=f"Bearer {BOB}") as client:
        assert (await client.get("/v1/sessions")).json()["data"] == []
        for reply in (await client.get(path), await client.delete(path), await client.post(f"{path}/fork")):
            # Not 403: that would tell that it is there.
            assert reply.status_code == 404 and reply.json()["error"]["code"] == "session_not_found"
    async with http(service, settings, Authorization=f"Bearer {ALICE}") as client:
        assert (await client.get(path)).status_code == 200
    async with client_of(service, settings, "wrong-0123456789") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


@pytest.mark.anyio
async def test_a_request_counts_until_its_answer_has_ended() -> None:
    service, settings = FakeService(), Settings(limits=Limits(requests_at_once=1))
    service.gate = asyncio.Event()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}
    async with http(service, settings) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        while not service.running:
            await asyncio.sleep(0)
        refused = await client.get("/v1/models")
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_requests_at_once"
        assert (await client.get("/health")).status_code == 200
        service.gate.set()
        assert (await first).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "LOCALHOST:9", "[::1]:8000", "[::1]"])
async def test_the_server_is_asked_by_its_own_names(host: str) -> None:
    async with http(FakeService(), Host=host) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:8000"])
async def test_a_web_page_whose_name_points_here_is_turned_away(host: str) -> None:
    async with http(FakeService(), Host=host) as client:
        reply = await client.get("/v1/models")
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "unknown_host"
        assert (await client.get("/")).status_code == 400
    async with http(FakeService(), Settings(hosts=None), Host=host) as client:
        assert (await client.get("/v1/models")).status_code == 200
