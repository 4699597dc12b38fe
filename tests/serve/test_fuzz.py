"""Mutated requests: whatever comes, the server answers with a reply or an error object, and tells nobody's secrets."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kveraser.serve.access import Keys
from kveraser.serve.app import Settings
from kveraser.serve.service import Service
from kveraser.serve.session_schemas import CONVERSATION
from tests.serve_fake import FakeService, http
from tests.served import serving

pytestmark = pytest.mark.anyio

REQUESTS = int(os.environ.get("KVERASER_FUZZ_REQUESTS", "300"))
SEED = int(os.environ.get("KVERASER_FUZZ_SEED", "1"))
LONGEST_SECONDS = 120
"""No reply takes so long; what does hangs."""

ALICE, BOB = "alice-0123456789", "bob-0123456789abc"
SECRET = "quartzite"
SETTINGS = Settings(keys=Keys([ALICE, BOB]), most_bytes=200_000)

TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
EDIT = {
    "type": "clear_tool_uses_20250919",
    "trigger": {"type": "tool_uses", "value": 0},
    "keep": {"type": "tool_uses", "value": 0},
    "clear_at_least": {"type": "input_tokens", "value": 1},
    "exclude_tools": [],
    "clear_tool_inputs": False,
    "placeholder": "[gone]",
}
THINKING = {"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}
CHAT = {
    "messages": CONVERSATION,
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 3,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "tools": TOOLS,
    "stream": False,
    "kveraser": {"method": "repair(8)", "now_then_exact": True, "drop_message": [1]},
    "context_management": {"edits": [EDIT, THINKING]},
}


@dataclass(frozen=True)
class Sent:
    """A request."""

    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    content: bytes | None = None

    def bytes(self) -> bytes:
        if self.content is not None:
            return self.content
        return b"" if self.body is None else json.dumps(self.body).encode()


def good_requests(model: str, session: str) -> list[Sent]:
    """One of every route."""
    chat, path = {"model": model, **CHAT}, f"/v1/sessions/{session}"
    streamed = {**chat, "stream": True, "stream_options": {"include_usage": True}}
    return [
        Sent("POST", "/v1/chat/completions", chat),
        Sent("POST", "/v1/chat/completions", streamed),
        Sent("POST", "/v1/chat/completions", {**chat, "kveraser": {"max_kl": 0.1}}),
        Sent(
            "POST", "/v1/completions", {"model": model, "prompt": "a b", "max_tokens": 2, "logprobs": 1, "echo": False}
        ),
        Sent("POST", "/v1/completions", {"model": model, "prompt": [5, 6, 7], "max_tokens": 2, "stream": True}),
        Sent("GET", "/v1/models"),
        Sent("GET", f"/v1/models/{model}"),
        Sent("POST", "/v1/sessions", {"messages": CONVERSATION, "tools": TOOLS, "ttl": 60}),
        Sent("POST", "/v1/sessions", {"text": "The ship left at noon."}),
        Sent("GET", "/v1/sessions"),
        Sent("GET", f"{path}?contents=true"),
        Sent("GET", f"{path}/tokens"),
        Sent("DELETE", "/v1/sessions/none"),
        Sent("POST", f"{path}/erase", {"spans": ["shelf 44"], "method": "repair(8)"}),
        Sent("POST", f"{path}/erase", {"spans": [{"tool_call_id": "call_1", "keep_turn": True}, [2, 5]]}),
        Sent("POST", f"{path}/erase", {"spans": [{"message": 1}], "max_kl": 0.5, "method": "auto"}),
        Sent("POST", f"{path}/erase", {"spans": [{"pattern": "R.m", "occurrence": 1}], "undoable": False}),
        Sent("POST", f"{path}/erase", {"spans": [{"tool_call_id": "call_1"}], "replace": "[cleared]"}),
        Sent("POST", f"{path}/influence", {"spans": [{"message": 2}]}),
        Sent("POST", f"{path}/undo", {"steps": 1}),
        Sent("POST", f"{path}/fork"),
        Sent("POST", f"{path}/audit", {"probes": ["Where?", {"question": "a", "kind": "leak"}], "secrets": ["44"]}),
        Sent("POST", f"{path}/messages", {"messages": [{"role": "user", "content": "And?"}]}),
        Sent("POST", f"{path}/messages", {"text": "More."}),
        Sent("POST", f"{path}/ask", {"question": "Where?", "max_tokens": 2, "caches": "exact", "stream": True}),
        Sent("POST", f"{path}/ask", {"question": "Where?", "max_tokens": 2, "keep": True, "logprobs": 1}),
        Sent("GET", "/health"),
        Sent("GET", "/metrics"),
    ]


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), -float("inf"), "", " ", "\0", "a", "a" * 3000, "\ud800", "\udfff\ud800", "\u202e\u2028", "🙂" * 20,
    "<|im_start|>system\n", "<|im_end|>", "{{ 7 * 7 }}", "{% for a in b %}", "../../../etc/passwd", "(a+)+$", "(?P<",
    "repair(99999999)", "recompute", "auto", "selective(1e9)", "mask()", "unerased", "edited", "system", "tool",
    "call_1", "user", [], {}, [[]], [{}], [None], ["a", "a"], [1, 2], [2, 1], [-5, 10**6], {"message": -1},
    {"message": 10**9}, {"text": "e", "occurrence": 2}, {"pattern": ".*"}, {"pattern": "(a|aa)+$"}, {"tokens": [0, 1]},
    {"tool_call_id": "nobody"}, {"role": "user", "content": "a"}, {"role": "tool", "content": "a", "tool_call_id": "b"},
    {"type": "text", "text": "a"}, deep(50), deep(250), {"__class__": "a", "path": "/tmp/a"},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key in it."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed_value(dice: random.Random, sent: Sent, others: list[Sent]) -> Sent:
    """Something in the body is replaced, renamed, doubled or gone."""
    body = deepcopy(sent.body)
    found = places(body)
    if not found:
        return replace(sent, body=deepcopy(dice.choice(ODD)))
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        container, key = dice.choice(places(body) or [([None], 0)])
        match dice.randrange(5):
            case 0 | 1:
                container[key] = deepcopy(dice.choice(ODD))
            case 2:
                del container[key]
            case 3 if isinstance(container, dict):
                container[dice.choice(["", "model", "stream", "kveraser", "é", str(key).upper()])] = container[key]
            case 3:
                container.extend([container[key]] * dice.choice([1, 40]))
            case 4:
                pieces = [place for other in others if other.body for place in places(other.body)]
                donor, name = dice.choice(pieces)
                container[key] = deepcopy(donor[name])
    return replace(sent, body=body)


def changed_bytes(dice: random.Random, sent: Sent, others: list[Sent]) -> Sent:
    """The body's bytes are cut, flipped, doubled or mixed with others."""
    content = bytearray(sent.bytes() or b"{}")
    for _ in range(dice.choice([1, 1, 3])):
        place = dice.randrange(len(content) + 1)
        match dice.randrange(5):
            case 0:
                content[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                content[place:place] = dice.randbytes(dice.randrange(1, 9))
            case 2:
                del content[place : place + dice.randrange(1, 40)]
            case 3:
                del content[place:]
            case 4:
                content[place:place] = content[: dice.randrange(len(content) + 1)]
    return replace(sent, content=bytes(content))


def changed_head(dice: random.Random, sent: Sent, others: list[Sent]) -> Sent:
    """Method, path or headers are others."""
    match dice.randrange(4):
        case 0:
            return replace(
                sent, method=dice.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW"])
            )
        case 1:
            return replace(sent, path=dice.choice(others).path)
        case 2:
            ends = ["/", "//", "/..", "%2e%2e", "%00", "%ff", "?contents=maybe", "?a=b&a=c", "/x" * 200, "🙂"]
            return replace(sent, path=sent.path + dice.choice(ends))
    name, value = dice.choice(
        [
            ("content-type", "text/plain"),
            ("content-type", "application/json; charset=utf-16"),
            ("content-type", ";;;"),
            ("content-encoding", "gzip"),
            ("content-length", "99999999"),
            ("content-length", "-1"),
            ("authorization", "Bearer \xff"),
            ("authorization", "Bearer"),
            ("host", "evil.example"),
            ("accept", "image/png"),
            ("x-long", "a" * 5000),
        ]
    )
    return replace(sent, headers={**sent.headers, name: value})


def foreign(dice: random.Random, sent: Sent, others: list[Sent]) -> Sent:
    """Asks for the other key's session."""
    return replace(sent, path=sent.path.replace("SESSION", "FOREIGN"))


Change = Callable[[random.Random, Sent, list[Sent]], Sent]
CHANGES: list[Change] = [changed_value, changed_value, changed_value, changed_bytes, changed_head, foreign]


@asynccontextmanager
async def fake() -> AsyncIterator[Service]:
    yield FakeService(["It is ", '<tool_call>{"name": "find"}</tool_call>'])


def checked(sent: Sent, status: int, text: str, kind: str) -> None:
    """A reply is one of the server's."""
    assert 200 <= status < 500, (sent, status, text)
    assert SECRET not in text, (sent, status, text)
    if status >= 400 and sent.method != "HEAD":
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}, (sent, error)
        assert error["message"] and error["type"].endswith("_error") and len(error["message"]) < 4000, (sent, error)
    elif kind.startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in text.strip().split("\n\n")]
        last = events[-1] == "[DONE]" or json.loads(events[-1])["error"]["type"] != "server_error"
        assert last and all(json.loads(event) for event in events[:-1]), (sent, text)
    elif kind.startswith("application/json") and sent.method != "HEAD":
        assert json.loads(text), (sent, text)


@pytest.mark.parametrize("served", [fake, serving], ids=["fake", "tiny"])
async def test_mutated_requests_get_replies(served: Any) -> None:
    dice = random.Random(SEED)
    async with (
        served() as service,
        http(service, SETTINGS, authorization=f"Bearer {ALICE}") as client,
        http(service, SETTINGS, authorization=f"Bearer {BOB}") as other,
    ):
        model = service.models()[0].id
        bobs = (await other.post("/v1/sessions", json={"text": f"The vault opens with {SECRET}."})).json()
        kept = await other.get(f"/v1/sessions/{bobs['id']}", params={"contents": "true"})
        statuses: dict[int, int] = {}
        own = ""
        for number in range(REQUESTS):
            # A session now and then that nothing was done to; a key may have only so many.
            if number % 50 == 0 or not own:
                for one in (await client.get("/v1/sessions")).json()["data"]:
                    assert (await client.delete(f"/v1/sessions/{one['id']}")).status_code == 200
                own = (await client.post("/v1/sessions", json={"messages": CONVERSATION})).json()["id"]
            good = good_requests(model, "SESSION")
            sent = dice.choice(good)
            if number % 10:
                sent = dice.choice(CHANGES)(dice, sent, good)
            sent = replace(sent, path=sent.path.replace("SESSION", own).replace("FOREIGN", bobs["id"]))
            head = {name: value.encode("latin-1") for name, value in sent.headers.items()}
            reply = await asyncio.wait_for(
                client.request(sent.method, sent.path, content=sent.bytes(), headers=head), LONGEST_SECONDS
            )
            checked(sent, reply.status_code, reply.text, reply.headers.get("content-type", ""))
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            if bobs["id"] in sent.path:
                assert reply.status_code in (400, 401, 404, 405, 413, 415), (sent, reply.text)
            own = own if sent.method != "DELETE" else ""
        # Not all were refused at the door, nor all let through.
        assert statuses.get(200, 0) > REQUESTS // 10 and statuses.get(400, 0) > REQUESTS // 10, statuses
        again = await other.get(f"/v1/sessions/{bobs['id']}", params={"contents": "true"})
        assert {**again.json(), "expires": 0} == {**kept.json(), "expires": 0} and SECRET in again.text
        assert (await client.get("/health")).status_code == 200
