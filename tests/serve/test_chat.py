"""Chat completions as the official client sees them: unchanged, whole and streaming."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import openai
import pytest

from kveraser.serve.context_edits import ClearThinking, ClearToolUses, InputTokens, ToolUses
from kveraser.serve.engine import Sampling, TokenLogprob
from kveraser.serve.errors import Overloaded, UnknownSession
from kveraser.serve.types import Erasing, Turn
from tests.serve.test_tools import FIND, SEND
from tests.serve_fake import MODEL, PIECES, RECEIPT, FakeService, client_of, http

pytestmark = pytest.mark.anyio

ASKED: list[Any] = [{"role": "user", "content": "Where is it?"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "find", "description": "Find.", "parameters": {"type": "object"}}}
]
WHOLE = "".join(PIECES)


async def turn_of(**request: Any) -> Turn:
    """What the service is asked when the client sends `request`."""
    service = FakeService()
    async with client_of(service) as client:
        await client.chat.completions.create(**{"model": MODEL, "messages": ASKED} | request)
    ((owner, turn),) = service.turns
    assert owner == "anonymous"
    return turn


async def test_an_answer_is_what_the_service_says() -> None:
    async with client_of(FakeService()) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASKED)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", WHOLE, "stop")
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert (answer.model, answer.object) == (MODEL, "chat.completion") and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (12, 5, 17)
    assert answer.usage.prompt_tokens_details.cached_tokens == 9


async def test_the_reply_and_its_header_say_what_happened() -> None:
    async with client_of(FakeService()) as client:
        raw = await client.chat.completions.with_raw_response.create(model=MODEL, messages=ASKED)
    happened = (raw.parse().model_extra or {})["kveraser"]
    header = json.loads(raw.headers["x-kveraser"])
    assert happened["receipts"] == [RECEIPT] and happened["exact"] is True and happened["exact_pending"] is True
    for name in ("action", "context", "erased_tokens", "recomputed_tokens", "prefilled_tokens"):
        assert header[name] == happened[name]
    assert header["receipts"] == [
        {"method": "repair(32)", "exact": False, "erased": 7, "recomputed": 32, "seconds": 0.25}
    ]
    # Proxies log headers: what was erased is in the body alone.
    assert "secret" not in raw.headers["x-kveraser"] and "secret" in raw.text


async def test_a_stream_says_the_same_in_pieces() -> None:
    async with client_of(FakeService()) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in raw.parse()]
    assert raw.headers["content-type"].startswith("text/event-stream")
    # The header goes out before the answer; what happens during it is in the last chunk.
    assert json.loads(raw.headers["x-kveraser"])["exact"] is False
    first, *pieces, last, spent = chunks
    assert first.choices[0].delta.role == "assistant" and not first.choices[0].delta.content
    assert [piece.choices[0].delta.content for piece in pieces] == list(PIECES)
    assert last.choices[0].finish_reason == "stop" and last.choices[0].delta.content is None
    assert (last.model_extra or {})["kveraser"]["exact"] is True
    assert spent.choices == [] and spent.usage is not None and spent.usage.prompt_tokens_details is not None
    assert (spent.usage.completion_tokens, spent.usage.prompt_tokens_details.cached_tokens) == (5, 9)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_stream_without_usage_ends_with_the_reason() -> None:
    async with client_of(FakeService()) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, stream=True, max_tokens=2)
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Rome, "


async def test_settings_reach_the_service() -> None:
    assert (await turn_of()).sampling == Sampling()
    turn = await turn_of(
        temperature=0, top_p=0.5, frequency_penalty=-1, presence_penalty=0.25, seed=-3, stop="x", max_tokens=7
    )
    assert turn.sampling == Sampling(7, 0.0, 0.5, -1.0, 0.25, -3, ("x",), None)
    assert turn.messages == ({"role": "user", "content": "Where is it?"},) and turn.prompt is None
    turn = await turn_of(stop=["a", "b"], max_completion_tokens=9, logprobs=True)
    assert (turn.sampling.stop, turn.sampling.max_tokens, turn.sampling.logprobs) == (("a", "b"), 9, 0)
    assert (await turn_of(logprobs=True, top_logprobs=20)).sampling.logprobs == 20
    assert (await turn_of(logprobs=False)).sampling.logprobs is None


async def test_erasing_settings_reach_the_service() -> None:
    assert (await turn_of()).erasing == Erasing()
    turn = await turn_of(extra_body={"kveraser": {"method": "recompute"}})
    assert turn.erasing == Erasing("recompute")
    turn = await turn_of(extra_body={"kveraser": {"max_kl": 0, "now_then_exact": True}})
    assert turn.erasing == Erasing(None, 0.0, True)


async def test_messages_reach_the_service_as_templates_take_them() -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"what": 1}'}}]
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": [{"type": "text", "text": "Where "}, {"type": "text", "text": "is it?"}]},
        # As clients send back what a server answered, with fields that other servers add.
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "annotations": [], "audio": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "Rome."},
    ]
    turn = await turn_of(messages=messages, tools=TOOLS)
    assert turn.messages == (
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": "Where is it?"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "Rome.", "tool_call_id": "call_1"},
    )
    assert turn.options.tools == tuple(TOOLS)
    # Dropping a result from the history is what the server is for.
    assert len((await turn_of(messages=messages[:3])).messages or ()) == 3


async def test_context_management_reaches_the_service_and_what_it_did_comes_back() -> None:
    edit = {
        "type": "clear_tool_uses_20250919",
        "trigger": {"type": "tool_uses", "value": 2},
        "keep": {"type": "tool_uses", "value": 1},
        "clear_at_least": {"type": "input_tokens", "value": 50},
        "exclude_tools": ["search"],
        "clear_tool_inputs": True,
    }
    thinking = {"type": "clear_thinking_20251015", "keep": "all"}
    dropped = {"kveraser": {"drop_message": [0, -1]}}
    turn = await turn_of(
        extra_body={"context_management": {"edits": [edit, {"type": edit["type"]}, thinking]}, **dropped}
    )
    assert turn.context_edits == (
        ClearToolUses(
            trigger=ToolUses(value=2), keep=ToolUses(value=1), clear_at_least=InputTokens(value=50),
            exclude_tools=["search"], clear_tool_inputs=True,
        ),
        ClearToolUses(),
        ClearThinking(keep="all"),
    )  # fmt: skip
    assert turn.dropped == (0, -1)

    applied = {"type": edit["type"], "cleared_tool_uses": 2, "cleared_input_tokens": 70}
    service = FakeService()
    service.what = type(service.what)("erase", "context_1", applied_edits=(applied,))
    async with client_of(service) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=ASKED, extra_body={"context_management": {"edits": [edit]}}
        )
        stream = await client.chat.completions.create(
            model=MODEL, messages=ASKED, stream=True, extra_body={"context_management": {"edits": [edit]}}
        )
        chunks = [chunk async for chunk in stream]
    assert (answer.model_extra or {})["context_management"] == {"applied_edits": [applied]}
    assert (chunks[-1].model_extra or {})["context_management"] == {"applied_edits": [applied]}


async def test_logprobs_of_every_token() -> None:
    request: Any = {"model": MODEL, "messages": ASKED, "logprobs": True, "top_logprobs": 2}
    async with client_of(FakeService()) as client:
        answer = await client.chat.completions.create(**request)
        stream = await client.chat.completions.create(**request, stream=True)
        chunks = [chunk async for chunk in stream]
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None and [token.token for token in tokens] == list(PIECES)
    assert tokens[0].bytes == list(b"Rome") and tokens[0].logprob == -0.5
    assert [(top.token, top.logprob) for top in tokens[0].top_logprobs] == [("Rome", -0.5), (", ", -1.5)]
    # Part of a character has no bytes of its own that could be told.
    assert (tokens[-1].top_logprobs[1].token, tokens[-1].top_logprobs[1].bytes) == ("\ufffd", None)
    streamed = [chunk.choices[0].logprobs for chunk in chunks]
    assert [token for one in streamed if one is not None for token in one.content or []] == tokens


async def test_numbers_that_json_does_not_have_are_not_sent() -> None:
    class Certain(FakeService):
        def _token(self, number: int, sampling: Sampling) -> TokenLogprob:
            return TokenLogprob(number, 0.0, ((number, 0.0), (9, -math.inf)))

    service = Certain()
    service.what = replace(service.what, receipts=({**RECEIPT, "audit": {"kl": math.inf}},))
    body = {"model": MODEL, "messages": ASKED, "logprobs": True, "top_logprobs": 2}
    async with http(service) as client:
        for stream in (False, True):
            reply = await client.post("/v1/chat/completions", json={**body, "stream": stream})
            assert "-9999.0" in reply.text and '"audit":{"kl":null}' in reply.text
            assert "Infinity" not in reply.text and "NaN" not in reply.text


@pytest.mark.parametrize("pieces", [[f"Let me look.\n{FIND}\n{SEND}"], list(f"Let me look.\n{FIND}\n{SEND}")])
async def test_tool_calls_are_taken_out_of_the_answer(pieces: list[str]) -> None:
    service = FakeService(pieces)
    async with client_of(service) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
        calls = choice.message.tool_calls or []
        assert [call.function.name for call in calls if call.type == "function"] == ["find", "send"]
        assert len({call.id for call in calls}) == 2
        # What the client got goes back as it is.
        said = choice.message.model_dump()
        results = [{"role": "tool", "tool_call_id": call.id, "content": "Rome."} for call in calls]
        again: Any = [*ASKED, said, *results]
        await client.chat.completions.create(model=MODEL, messages=again, tools=TOOLS)
        sent = service.turns[-1][1].messages
        assert sent is not None and [call["id"] for call in sent[1]["tool_calls"]] == [call.id for call in calls]

        async with client.chat.completions.stream(model=MODEL, messages=ASKED, tools=TOOLS) as stream:
            final = await stream.get_final_completion()
        (streamed,) = final.choices
        assert streamed.finish_reason == "tool_calls" and streamed.message.content == "Let me look."
        functions = [call.function for call in streamed.message.tool_calls or []]
        assert [function.name for function in functions] == ["find", "send"]
        assert json.loads(functions[0].arguments)["what"] == "parcel"

        one = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS, parallel_tool_calls=False)
        assert len(one.choices[0].message.tool_calls or []) == 1


async def test_without_tools_a_call_is_text() -> None:
    async with client_of(FakeService([FIND])) as client:
        plain = await client.chat.completions.create(model=MODEL, messages=ASKED)
        none = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS, tool_choice="none")
        only = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS)
    for answer in (plain, none):
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (FIND, "stop")
    assert only.choices[0].message.content is None and only.choices[0].finish_reason == "tool_calls"


async def test_an_answer_cut_short_in_a_call_is_text_of_the_length_asked_for() -> None:
    async with client_of(FakeService([SEND, "\n<tool_call>{"])) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=ASKED, tools=TOOLS, max_tokens=1)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.tool_calls


WRONG: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "no messages": ({"messages": []}, "messages", "at least 1 item"),
    "a role": ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'wizard'"),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0", "has no content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content",
        "no images",
    ),
    "arguments": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "b", "arguments": "{"}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
        "not JSON",
    ),
    "arguments are a list": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "b", "arguments": "[]"}}],
                }
            ]
        },
        "messages.0.tool_calls.0.function.arguments",
        "a list",
    ),
    "a result without its call": (
        {"messages": [*ASKED, {"role": "tool", "tool_call_id": "call_9", "content": "a"}]},
        None,
        "'call_9'",
    ),
    "a result of no call": ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0", "tool_call_id"),
    "calls of a user": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "a",
                    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "b", "arguments": "{}"}}],
                }
            ]
        },
        "messages.0",
        "only an assistant",
    ),
    "two answers": ({"n": 2}, "n", "one answer"),
    "a bias": ({"logit_bias": {"1": 5}}, "logit_bias", "biased"),
    "a format": ({"response_format": {"type": "json_object"}}, "response_format", "plain text"),
    "a forced tool": ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "auto or none"),
    "a hot temperature": ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    "a negative length": ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    "a huge length": ({"max_tokens": 10**40}, "max_tokens", "a huge number"),
    "a length as text": ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    "two lengths": ({"max_tokens": 5, "max_completion_tokens": 6}, None, "differ"),
    "too many logprobs": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
    "likely tokens alone": ({"top_logprobs": 2}, None, "set logprobs"),
    "five stops": ({"stop": list("abcde")}, "stop", "at most 4"),
    "a typing mistake": ({"extra_body": {"max_tokns": 5}}, "max_tokns", "no such field"),
    "usage of no stream": ({"stream_options": {"include_usage": True}}, None, "set stream to true"),
    "a method": ({"extra_body": {"kveraser": {"method": "shif"}}}, "kveraser.method", "did you mean shift"),
    "a method's parameter": ({"extra_body": {"kveraser": {"method": "repair(-1)"}}}, "kveraser.method", "pattern"),
    "code for a method": (
        {"extra_body": {"kveraser": {"method": "repair(__import__('os'))"}}},
        "kveraser.method",
        "pattern",
    ),
    "a negative budget": ({"extra_body": {"kveraser": {"max_kl": -1}}}, "kveraser.max_kl", "greater than"),
    "a budget nobody keeps": (
        {"extra_body": {"kveraser": {"max_kl": 1, "method": "shift"}}},
        "kveraser",
        "leave one of them out",
    ),
    "an edit of another type": (
        {"extra_body": {"context_management": {"edits": [{"type": "clear_20240101"}]}}},
        "context_management.edits.0",
        "'clear_tool_uses_20250919', 'clear_thinking_20251015'",
    ),
    "a trigger of another type": (
        {
            "extra_body": {
                "context_management": {
                    "edits": [{"type": "clear_tool_uses_20250919", "trigger": {"type": "hours", "value": 1}}]
                }
            }
        },
        "context_management.edits.0.trigger",
        "'hours'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_request_is_refused_with_the_field_and_what_to_do(case: str) -> None:
    request, param, message = WRONG[case]
    service = FakeService()
    async with client_of(service) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**{"model": MODEL, "messages": ASKED} | request)
    body: Any = refused.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["param"]) == ("invalid_request_error", param) and message in body["message"]
    assert not service.turns


async def test_hints_are_accepted() -> None:
    turn = await turn_of(
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", n=1, logit_bias={},
        response_format={"type": "text"}, tool_choice="auto",
    )  # fmt: skip
    assert turn == Turn(messages=({"role": "user", "content": "Where is it?"},))


async def test_an_unknown_model_is_not_found() -> None:
    async with client_of(FakeService()) as client:
        with pytest.raises(openai.NotFoundError, match="it has fake") as refused:
            await client.chat.completions.create(model="gpt-7", messages=ASKED)
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_service_refuses_has_its_status_streaming_or_not(stream: bool) -> None:
    service = FakeService()
    async with client_of(service) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=10**6, stream=stream)
        assert refused.value.code == "context_length_exceeded"
        service.failure = Overloaded("come back", retry_after=2.2)
        with pytest.raises(openai.RateLimitError) as busy:
            await client.chat.completions.create(model=MODEL, messages=ASKED, stream=stream)
        assert busy.value.response.headers["retry-after"] == "3" and busy.value.code == "rate_limit_exceeded"
    assert service.running == 0


async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    service = FakeService()
    service.failure, service.failure_at = UnknownSession("it went away"), 2
    async with client_of(service) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=ASKED, stream=True)
        said = []
        with pytest.raises(openai.APIError, match="it went away"):
            async for chunk in stream:
                said.append(chunk.choices[0].delta.content)
    assert said == ["", "Rome", ", "]


@pytest.mark.parametrize("at", [None, 2])
async def test_a_fault_of_the_servers_tells_nothing_of_the_request(at: int | None, caplog: Any) -> None:
    service = FakeService()
    service.failure, service.failure_at = RuntimeError("the client wrote 7777"), at
    body = {"model": MODEL, "messages": ASKED, "stream": True}
    async with http(service) as client:
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == (500 if at is None else 200)
    assert "internal_error" in reply.text and "7777" not in reply.text and "[DONE]" not in reply.text
    assert "7777" not in caplog.text and any("fail" in record.message for record in caplog.records)
