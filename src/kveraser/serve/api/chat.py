"""`POST /v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import replace
from secrets import token_hex
from typing import Any, Literal

from fastapi import Request, Response

from kveraser.serve.api.generation import (
    ClientGone,
    EventStream,
    Generation,
    as_bytes,
    finite,
    gone,
    happened_header,
    happening,
    usage,
)
from kveraser.serve.api.models import check_model
from kveraser.serve.api.routing import ANSWERING, Counted, Owner, Served, errors, router
from kveraser.serve.engine import TokenLogprob
from kveraser.serve.messages import ToolCall
from kveraser.serve.replies import (
    AppliedEdits,
    AssistantMessage,
    ChatChoice,
    ChatReply,
    ChoiceLogprobs,
    TokenLogprobs,
    TopLogprob,
)
from kveraser.serve.response_template import TemplateReader
from kveraser.serve.schemas import ChatRequest
from kveraser.serve.service import Service
from kveraser.serve.tools import Call, CallReader
from kveraser.serve.types import Delta, Finished, Happened, Started

routes = router("OpenAI")

TokenText = Callable[[int], str]

STREAM_REPLY: dict[str, Any] = {
    "description": "The answer; with `stream`, server-sent events that end with `[DONE]`.",
    "headers": {"X-KVEraser": {"description": "What happened to the cache, as JSON.", "schema": {"type": "string"}}},
    "content": {
        "text/event-stream": {
            "schema": {
                "type": "object",
                "properties": {"data": {"type": "string", "description": "A chunk as JSON, or `[DONE]`."}},
                "required": ["data"],
            }
        }
    },
}


@routes.post(
    "/v1/chat/completions",
    response_model=ChatReply,
    response_model_exclude_unset=False,
    responses={200: STREAM_REPLY, **errors(*ANSWERING)},
    summary="Answer a conversation",
)
async def chat(body: ChatRequest, request: Request, service: Served, owner: Owner, metrics: Counted) -> Response:
    """Answers a conversation. What its history lacks of a cached one is erased from the cache, not recomputed."""
    check_model(service, body.model)
    reader, turn = _reader(body, service), body.turn()
    if reader is not None:
        turn = replace(turn, sampling=replace(turn.sampling, show_special=reader.show_special))
    generation = Generation(service.generate(owner, turn), request.receive, metrics)
    head: dict[str, Any] = {"id": f"chatcmpl-{token_hex(12)}", "created": int(time.time()), "model": body.model}
    try:
        started = await generation.start()
        if body.stream:
            return EventStream(_chunks(body, head, started, generation, service, reader), generation, started.what)
        text, tokens, finished = await generation.collect()
    except ClientGone:
        return gone()
    calls: list[Call] = []
    if reader is not None:
        text, calls = reader.feed(text)[0] + reader.finish()[0], reader.calls
    reply = ChatReply(
        **head,
        choices=[
            ChatChoice(
                message=AssistantMessage(
                    content=None if calls and not text else text,
                    tool_calls=[ToolCall.model_validate(call.to_json()) for call in calls] or None,
                ),
                logprobs=ChoiceLogprobs(content=_logprobs(tokens, service.token_text)) if body.logprobs else None,
                finish_reason=_reason(finished, calls),
            )
        ],
        usage=usage(started, finished.completion_tokens),
        kveraser=happening(finished.what),
        context_management=_applied(body, finished.what),
    )
    return Response(reply.model_dump_json(), media_type="application/json", headers=happened_header(finished.what))


def _reader(body: ChatRequest, service: Service) -> CallReader | TemplateReader | None:
    """What takes tool calls out of the answer; None where the request has no tools to call."""
    if not body.tools or body.tool_choice == "none":
        return None
    tools = [tool.plain() for tool in body.tools]
    return service.call_reader(1 if body.parallel_tool_calls is False else None, tools)


def _reason(finished: Finished, calls: Sequence[Call]) -> Literal["stop", "length", "tool_calls"]:
    return "tool_calls" if calls and finished.finish_reason == "stop" else finished.finish_reason


def _applied(body: ChatRequest, what: Happened) -> AppliedEdits | None:
    return None if body.context_management is None else AppliedEdits(applied_edits=list(what.applied_edits))


def _logprobs(tokens: Iterable[TokenLogprob], text_of: TokenText) -> list[TokenLogprobs]:
    def top(token: int, logprob: float) -> TopLogprob:
        text = text_of(token)
        return TopLogprob(token=text, logprob=finite(logprob), bytes=as_bytes(text))

    return [
        TokenLogprobs(**top(one.token, one.logprob).model_dump(), top_logprobs=[top(*likely) for likely in one.top])
        for one in tokens
    ]


async def _chunks(
    body: ChatRequest,
    head: dict[str, Any],
    started: Started,
    generation: Generation,
    service: Service,
    reader: CallReader | TemplateReader | None,
) -> AsyncGenerator[dict[str, Any]]:
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)

    def chunk(delta: dict[str, Any], reason: str | None = None, tokens: Iterable[TokenLogprob] = ()) -> dict[str, Any]:
        logprobs = [one.model_dump() for one in _logprobs(tokens, service.token_text)] if body.logprobs else []
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": {"content": logprobs, "refusal": None} if logprobs else None,
            "finish_reason": reason,
        }
        made = {**head, "object": "chat.completion.chunk", "choices": [choice]}
        return {**made, "usage": None} if with_usage else made

    count = 0

    def called(calls: list[Call]) -> list[dict[str, Any]]:
        nonlocal count
        count += len(calls)
        return [{"index": count - len(calls) + place, **call.to_json()} for place, call in enumerate(calls)]

    first = chunk({"role": "assistant", "content": ""})
    yield {**first, "kveraser": happening(started.what).model_dump()}
    async for event in generation.rest():
        if isinstance(event, Delta):
            text, calls = (event.text, list[Call]()) if reader is None else reader.feed(event.text)
            delta = ({"content": text} if text else {}) | ({"tool_calls": called(calls)} if calls else {})
            if delta or (body.logprobs and event.tokens):
                yield chunk(delta, tokens=event.tokens)
            continue
        if reader is not None:
            text, calls = reader.finish()
            delta = ({"content": text} if text else {}) | ({"tool_calls": called(calls)} if calls else {})
            if delta:
                yield chunk(delta)
        last = chunk({}, _reason(event, reader.calls if reader is not None else []))
        last["kveraser"] = happening(event.what).model_dump()
        applied = _applied(body, event.what)
        if applied is not None:
            last["context_management"] = applied.model_dump()
        yield last
        if with_usage:
            spent = usage(started, event.completion_tokens).model_dump()
            yield {**head, "object": "chat.completion.chunk", "choices": [], "usage": spent}
