"""`/v1/sessions`: contexts that clients edit by hand."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import Path, Query, Request, Response

from kveraser.serve.api.chat import STREAM_REPLY
from kveraser.serve.api.generation import (
    ClientGone,
    EventStream,
    Generation,
    finite,
    gone,
    happened_header,
    happening,
    usage,
)
from kveraser.serve.api.routing import ANSWERING, EDITING, READING, Counted, Owner, Served, errors, router
from kveraser.serve.engine import TokenLogprob
from kveraser.serve.session_schemas import (
    AnswerReply,
    AskRequest,
    AuditReply,
    AuditRequest,
    DeletedReply,
    EraseRequest,
    InfluenceReply,
    InfluenceRequest,
    NewMessages,
    NewSession,
    ReceiptReply,
    SessionReply,
    SessionsReply,
    SessionToken,
    TokensReply,
    UndoRequest,
    ViewQuery,
)
from kveraser.serve.types import Delta, SessionView, Started

routes = router("Sessions")

SessionId = Annotated[str, Path(description="The session's id.", max_length=200)]
TOUCHING = (*READING, 404, 409, 410, 507)
"""Statuses of routes without a body: a session that lies on disk comes back when it is touched."""


def _reply(view: SessionView) -> SessionReply:
    return SessionReply.model_validate(asdict(view))


@routes.post("/v1/sessions", status_code=201, responses=errors(*ANSWERING), summary="Make a session")
async def create(body: NewSession, service: Served, owner: Owner) -> SessionReply:
    """Prefills messages or a text. The session belongs to the key; nobody else can see it."""
    tools = [tool.plain() for tool in body.tools or []]
    made = await service.create(
        owner, messages=body.plain_messages(), text=body.text, tools=tools, ttl=body.ttl,
        allow_special=body.allow_special,
    )  # fmt: skip
    return _reply(made)


@routes.get("/v1/sessions", responses=errors(*READING), summary="List the sessions")
async def list_sessions(service: Served, owner: Owner) -> SessionsReply:
    """The key's sessions, oldest first."""
    return SessionsReply(data=[_reply(view) for view in await service.list(owner)])


@routes.get("/v1/sessions/{session}", responses=errors(*TOUCHING), summary="One session")
async def view(
    session: SessionId,
    service: Served,
    owner: Owner,
    query: Annotated[ViewQuery, Query()],
) -> SessionReply:
    """What a session holds, and what was erased from it."""
    return _reply(await service.view(owner, session, query.contents))


@routes.delete("/v1/sessions/{session}", responses=errors(*TOUCHING), summary="Delete a session")
async def delete(session: SessionId, service: Served, owner: Owner) -> DeletedReply:
    """Deletes a session; its states are overwritten, on disk too."""
    await service.delete(owner, session)
    return DeletedReply(id=session)


@routes.get("/v1/sessions/{session}/tokens", responses=errors(*TOUCHING), summary="A session's tokens")
async def tokens(session: SessionId, service: Served, owner: Owner) -> TokensReply:
    """Every token of a session, erased ones included."""
    return TokensReply(data=[SessionToken(**asdict(token)) for token in await service.tokens(owner, session)])


@routes.post("/v1/sessions/{session}/erase", responses=errors(*EDITING), summary="Erase from a session")
async def erase(session: SessionId, body: EraseRequest, service: Served, owner: Owner) -> ReceiptReply:
    """Erases texts, characters, matches, messages or tool results from the live cache, or replaces them."""
    receipt = await service.erase(
        owner, session, body.spans, body.method, body.max_kl, body.undoable, text=body.replace
    )
    return ReceiptReply(receipt=receipt)


@routes.post("/v1/sessions/{session}/undo", responses=errors(*EDITING), summary="Undo")
async def undo(session: SessionId, service: Served, owner: Owner, body: UndoRequest | None = None) -> SessionReply:
    """Takes back the last operations; every bit is as it was."""
    return _reply(await service.undo(owner, session, 1 if body is None else body.steps))


@routes.post("/v1/sessions/{session}/fork", status_code=201, responses=errors(*TOUCHING), summary="Fork a session")
async def fork(session: SessionId, service: Served, owner: Owner) -> SessionReply:
    """An independent copy."""
    return _reply(await service.fork(owner, session))


@routes.post("/v1/sessions/{session}/audit", responses=errors(*EDITING), summary="Audit the erases")
async def audit(session: SessionId, service: Served, owner: Owner, body: AuditRequest | None = None) -> AuditReply:
    """Measures what the erases achieved, against exact recomputation."""
    asked = body or AuditRequest()
    return AuditReply(audit=await service.audit(owner, session, asked.made(), asked.secrets))


@routes.post("/v1/sessions/{session}/influence", responses=errors(*EDITING), summary="What a span changed")
async def influence(session: SessionId, body: InfluenceRequest, service: Served, owner: Owner) -> InfluenceReply:
    """Measures how much spans changed each later message and token, by two prefills."""
    return InfluenceReply(influence=await service.influence(owner, session, body.spans))


@routes.post("/v1/sessions/{session}/messages", responses=errors(*EDITING), summary="Add to a session")
async def append(session: SessionId, body: NewMessages, service: Served, owner: Owner) -> SessionReply:
    """Adds messages to a conversation, or text to a text."""
    changed = await service.append(
        owner, session, messages=body.plain_messages(), text=body.text, allow_special=body.allow_special
    )
    return _reply(changed)


@routes.post(
    "/v1/sessions/{session}/ask",
    response_model=AnswerReply,
    responses={200: STREAM_REPLY, **errors(*EDITING)},
    summary="Ask a session",
)
async def ask(
    session: SessionId, body: AskRequest, request: Request, service: Served, owner: Owner, metrics: Counted
) -> Response:
    """Answers a question from the edited cache, from one without erases, or from an exact one."""
    events = service.ask(owner, session, body.question, body.settings(), body.keep, body.caches)
    generation = Generation(events, request.receive, metrics)
    try:
        started = await generation.start()
        if body.stream:
            return EventStream(_chunks(body, started, generation, service.token_text), generation, started.what)
        text, tokens, finished = await generation.collect()
    except ClientGone:
        return gone()
    reply = AnswerReply(
        text=text,
        tokens=None if body.logprobs is None else _tokens(tokens, service.token_text),
        finish_reason=finished.finish_reason,
        usage=usage(started, finished.completion_tokens),
        kveraser=happening(finished.what),
    )
    return Response(reply.model_dump_json(), media_type="application/json", headers=happened_header(finished.what))


def _tokens(tokens: Sequence[TokenLogprob], text_of: Callable[[int], str]) -> list[Any]:
    return [
        {
            "token": text_of(one.token),
            "logprob": finite(one.logprob),
            "top": [{"token": text_of(token), "logprob": finite(logprob)} for token, logprob in one.top],
        }
        for one in tokens
    ]


async def _chunks(
    body: AskRequest, started: Started, generation: Generation, text_of: Callable[[int], str]
) -> AsyncGenerator[dict[str, Any]]:
    yield {"object": "answer.started", "kveraser": happening(started.what).model_dump()}
    async for event in generation.rest():
        if isinstance(event, Delta):
            tokens = None if body.logprobs is None else _tokens(event.tokens, text_of)
            yield {"object": "answer.delta", "text": event.text, "tokens": tokens}
            continue
        yield {
            "object": "answer.finished",
            "finish_reason": event.finish_reason,
            "usage": usage(started, event.completion_tokens).model_dump(),
            "kveraser": happening(event.what).model_dump(),
        }
