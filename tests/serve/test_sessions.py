"""The sessions' routes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kveraser.measure.probes import Probe
from kveraser.serve.engine import Sampling
from kveraser.serve.errors import OutOfSpace, SessionBusy, SessionGone
from kveraser.serve.session_schemas import CONVERSATION
from tests.serve_fake import PIECES, RECEIPT, FakeService, http

pytestmark = pytest.mark.anyio

TEXT = {"text": "The ship left at noon."}


def events(body: str) -> list[dict[str, Any]]:
    """The JSON objects of a stream that ended well."""
    *lines, end = body.strip().split("\n\n")
    assert end == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_session_lives_from_its_making_to_its_end() -> None:
    service = FakeService()
    async with http(service) as client:
        made = await client.post("/v1/sessions", json={"messages": CONVERSATION, "ttl": 60})
        assert made.status_code == 201 and made.json()["object"] == "session"
        assert [one["role"] for one in made.json()["messages"]] == ["user", "assistant", "tool", "assistant"]
        _, owner, messages, text, tools, ttl = service.asked[0]
        assert (owner, text, tools, ttl) == ("anonymous", None, (), 60) and messages[2]["tool_call_id"] == "call_1"
        path = f"/v1/sessions/{made.json()['id']}"

        erased = await client.post(
            f"{path}/erase", json={"spans": ["Rome", [2, 5], {"message": 2}], "method": "repair(32)"}
        )
        assert erased.json() == {"object": "receipt", "receipt": RECEIPT}
        assert service.asked[-1][3:] == (["Rome", [2, 5], {"message": 2}], "repair(32)", None, True)
        await client.post(f"{path}/erase", json={"spans": ["Rome"], "max_kl": 0.02, "undoable": False})
        assert service.asked[-1][4:] == (None, 0.02, False)

        await client.post(f"{path}/erase", json={"spans": ["Rome"], "replace": "Oslo", "undoable": False})
        assert service.asked[-1][3:] == (["Rome"], None, None, False, "Oslo")
        found = await client.post(f"{path}/influence", json={"spans": [{"message": 2}]})
        assert found.json()["object"] == "influence" and found.json()["influence"]["messages"][0]["message"] == 3
        assert service.asked[-1][3:] == ([{"message": 2}],)

        audited = await client.post(
            f"{path}/audit", json={"probes": ["Where?", {"question": "What?", "kind": "leak"}], "secrets": ["44"]}
        )
        assert audited.json()["audit"]["fidelity"] == 0.97
        assert service.asked[-1][3:] == (["Where?", Probe("What?", "leak")], ["44"])
        assert (await client.post(f"{path}/audit")).status_code == 200 and service.asked[-1][3:] == (None, None)

        assert (await client.get(path)).json()["undo_steps"] == 1
        assert (await client.post(f"{path}/undo")).json()["undo_steps"] == 0
        copy = await client.post(f"{path}/fork")
        assert copy.status_code == 201 and copy.json()["id"] != made.json()["id"]

        more = await client.post(f"{path}/messages", json={"messages": [{"role": "user", "content": "And?"}]})
        assert more.json()["tokens"] == 25 and service.asked[-1][3:] == ([{"role": "user", "content": "And?"}], None)
        await client.post(f"{path}/messages", json={"text": "More."})
        assert service.asked[-1][3:] == (None, "More.")

        assert [one["id"] for one in (await client.get("/v1/sessions")).json()["data"]] == ["session_0", "session_1"]
        shown = await client.get(path, params={"contents": "true"})
        assert shown.json()["messages"][0]["text"] == "Where is my parcel?"
        assert (await client.get(path)).json()["messages"][0]["text"] is None
        tokens = (await client.get(f"{path}/tokens")).json()["data"]
        assert tokens[1] == {
            "text": " secret", "live": False, "message": None, "start": 3, "end": 10, "content": False,
        }  # fmt: skip
        (method,) = (await client.get("/v1/methods")).json()["data"]
        assert method["name"] == "repair" and method["parameters"] == {"window": 8, "per_span": 0} and method["default"]

        gone = await client.delete(path)
        assert gone.json() == {"id": "session_0", "object": "session.deleted", "deleted": True}
        assert (await client.get(path)).status_code == 404


async def test_an_answer_whole_and_streaming() -> None:
    service = FakeService()
    async with http(service) as client:
        path = f"/v1/sessions/{(await client.post('/v1/sessions', json=TEXT)).json()['id']}/ask"
        whole = (await client.post(path, json={"question": "Where?", "max_tokens": 4, "logprobs": 1})).json()
        # Greedy unless asked otherwise.
        assert service.asked[-1][3:] == ("Where?", Sampling(4, 0.0, logprobs=1), False, "edited")
        assert (whole["text"], whole["finish_reason"]) == ("".join(PIECES[:4]), "length")
        assert whole["tokens"][0] == {"token": "Rome", "logprob": -0.5, "top": [{"token": "Rome", "logprob": -0.5}]}
        assert whole["usage"]["prompt_tokens_details"]["cached_tokens"] == 9
        assert (await client.post(path, json={"question": "Where?"})).json()["tokens"] is None

        streamed = await client.post(path, json={"question": "Where?", "caches": "exact", "stream": True, "seed": 2})
        assert service.asked[-1][3:] == ("Where?", Sampling(None, 0.0, seed=2), False, "exact")
        started, *deltas, finished = events(streamed.text)
        assert started["object"] == "answer.started" and started["kveraser"]["exact"] is False
        assert [delta["text"] for delta in deltas] == list(PIECES)
        assert finished["finish_reason"] == "stop" and finished["usage"]["completion_tokens"] == 5
        assert finished["kveraser"]["exact"] is True and json.loads(streamed.headers["x-kveraser"])["exact"] is False

        await client.post(path, json={"question": "Where?", "keep": True})
        assert service.asked[-1][5:] == (True, "edited")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("", {}, None, "give one of them"),
        ("", {**TEXT, "messages": CONVERSATION}, None, "give one of them"),
        ("", {"text": " \n"}, "text", "pattern"),
        ("", {"messages": []}, "messages", "at least 1"),
        ("", {"messages": CONVERSATION[2:]}, None, "'call_1'"),
        ("", {**TEXT, "tools": [{"type": "function", "function": {"name": "a"}}]}, None, "tools belong"),
        ("", {**TEXT, "ttl": 0}, "ttl", "greater than 0"),
        ("", {**TEXT, "ttl": -1}, "ttl", "greater than 0"),
        ("", {**TEXT, "ttl": 1e300}, "ttl", "less than"),
        ("", {**TEXT, "path": "/etc/passwd"}, "path", "no such field"),
        ("/erase", {"spans": []}, "spans", "at least 1"),
        ("/erase", {"spans": [5]}, "spans.0", "is not a span"),
        ("/erase", {"spans": [{"message": "first"}]}, "spans.0", "a whole number"),
        ("/erase", {"spans": [{"message": 1, "whole": True}]}, "spans.0", "is not a span"),
        ("/erase", {"spans": [[1, 2, 3]]}, "spans.0", "is not a span"),
        ("/erase", {"spans": [[1, True]]}, "spans.0", "is not a span"),
        ("/erase", {"spans": "Rome"}, "spans", "valid list"),
        ("/erase", {"spans": ["a"], "method": "magic"}, "method", "no method"),
        ("/erase", {"spans": ["a"], "method": "shift", "max_kl": 1}, None, "budget"),
        ("/erase", {"spans": [{"tool_call_id": "call_unknown"}]}, None, "no result of a tool call"),
        ("/undo", {"steps": 0}, "steps", "greater than or equal to 1"),
        ("/undo", {"steps": 10**30}, "steps", "less than or equal"),
        ("/audit", {"probes": []}, "probes", "at least 1"),
        ("/audit", {"probes": [{"question": "a", "kind": "spite"}]}, "probes.0.kind", "influence"),
        ("/messages", {}, None, "give one of them"),
        ("/ask", {"question": ""}, "question", "at least 1"),
        ("/ask", {"question": "a", "keep": True, "caches": "exact"}, None, "leave one of them out"),
        ("/ask", {"question": "a", "caches": "other"}, "caches", "'edited'"),
    ],
)
async def test_a_wrong_request_is_refused_and_the_session_stays_as_it_was(
    path: str, body: dict[str, Any], param: str | None, message: str
) -> None:
    async with http(FakeService()) as client:
        made = (await client.post("/v1/sessions", json=TEXT)).json()
        reply = await client.post(f"/v1/sessions/{made['id']}{path}" if path else "/v1/sessions", json=body)
        error = reply.json()["error"]
        assert reply.status_code == 400 and error["type"] == "invalid_request_error"
        assert error["param"] == param and message in error["message"], error
        assert (await client.get("/v1/sessions")).json()["data"] == [made]


@pytest.mark.parametrize(
    ("verb", "path", "body"),
    [
        ("GET", "", None),
        ("DELETE", "", None),
        ("GET", "/tokens", None),
        ("POST", "/erase", {"spans": ["a"]}),
        ("POST", "/undo", {}),
        ("POST", "/fork", None),
        ("POST", "/audit", {}),
        ("POST", "/messages", {"text": "a"}),
        ("POST", "/ask", {"question": "a"}),
        ("POST", "/ask", {"question": "a", "stream": True}),
    ],
)
async def test_every_route_says_what_became_of_a_session(verb: str, path: str, body: Any) -> None:
    service = FakeService()
    async with http(service) as client:

        async def ask() -> tuple[int, str]:
            reply = await client.request(verb, f"/v1/sessions/session_9%2F..{path}", json=body)
            return reply.status_code, reply.json()["error"]["code"]

        assert await ask() in [(404, "session_not_found"), (404, "not_found")]
        reply = await client.request(verb, f"/v1/sessions/session_9{path}", json=body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
        await client.post("/v1/sessions", json=TEXT)
        for failure, status, code in (
            (SessionBusy("it answers a question: ask again"), 409, "session_conflict"),
            (SessionGone("its file is corrupt"), 410, "session_gone"),
            (OutOfSpace("the disk is full"), 507, "out_of_space"),
        ):
            service.failure = failure
            reply = await client.request(verb, f"/v1/sessions/session_0{path}", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def test_more_steps_than_there_are_is_a_conflict() -> None:
    async with http(FakeService()) as client:
        await client.post("/v1/sessions", json=TEXT)
        for path, body in (("undo", {"steps": 3}), ("audit", {})):
            reply = await client.post(f"/v1/sessions/session_0/{path}", json=body)
            assert reply.status_code == 409 and reply.json()["error"]["type"] == "conflict_error"
