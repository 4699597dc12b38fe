"""`POST /v1/completions`: what follows a text, without a chat template."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import accumulate
from secrets import token_hex
from typing import Any

from fastapi import Request, Response

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
from kveraser.serve.api.models import check_model
from kveraser.serve.api.routing import ANSWERING, Counted, Owner, Served, errors, router
from kveraser.serve.engine import TokenLogprob
from kveraser.serve.replies import CompletionChoice, CompletionLogprobs, CompletionReply
from kveraser.serve.schemas import CompletionRequest
from kveraser.serve.types import Delta, Started

routes = router("OpenAI")


@routes.post(
    "/v1/completions",
    response_model=CompletionReply,
    responses={200: STREAM_REPLY, **errors(*ANSWERING)},
    summary="Continue a text",
)
async def complete(
    body: CompletionRequest, request: Request, service: Served, owner: Owner, metrics: Counted
) -> Response:
    """Continues a text or token ids."""
    check_model(service, body.model)
    generation = Generation(service.generate(owner, body.turn()), request.receive, metrics)
    head: dict[str, Any] = {"id": f"cmpl-{token_hex(12)}", "created": int(time.time()), "model": body.model}
    try:
        started = await generation.start()
        if body.stream:
            return EventStream(_chunks(body, head, started, generation, service.token_text), generation, started.what)
        text, tokens, finished = await generation.collect()
    except ClientGone:
        return gone()
    logprobs = None if body.logprobs is None else _logprobs(tokens, service.token_text, body.logprobs)
    reply = CompletionReply(
        **head,
        choices=[CompletionChoice(text=text, logprobs=logprobs, finish_reason=finished.finish_reason)],
        usage=usage(started, finished.completion_tokens),
        kveraser=happening(finished.what),
    )
    return Response(reply.model_dump_json(), media_type="application/json", headers=happened_header(finished.what))


def _logprobs(
    tokens: Iterable[TokenLogprob], text_of: Callable[[int], str], top: int, offset: int = 0
) -> CompletionLogprobs:
    """Log-probabilities as completions have them; `offset` is where the tokens begin in the answer's text."""
    chosen = list(tokens)
    texts = [text_of(one.token) for one in chosen]
    likely = [{text_of(token): finite(logprob) for token, logprob in one.top} for one in chosen]
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[finite(one.logprob) for one in chosen],
        top_logprobs=likely if top else None,
        text_offset=list(accumulate(map(len, texts), initial=offset))[:-1],
    )


async def _chunks(
    body: CompletionRequest,
    head: dict[str, Any],
    started: Started,
    generation: Generation,
    text_of: Callable[[int], str],
) -> AsyncGenerator[dict[str, Any]]:
    with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    offset = 0

    def chunk(text: str, reason: str | None = None, tokens: Iterable[TokenLogprob] = ()) -> dict[str, Any]:
        logprobs = None
        if body.logprobs is not None and tokens:
            logprobs = _logprobs(tokens, text_of, body.logprobs, offset).model_dump()
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        made = {**head, "object": "text_completion", "choices": [choice]}
        return {**made, "usage": None} if with_usage else made

    async for event in generation.rest():
        if isinstance(event, Delta):
            yield chunk(event.text, tokens=event.tokens)
            offset += len(event.text)
            continue
        yield {**chunk("", event.finish_reason), "kveraser": happening(event.what).model_dump()}
        if with_usage:
            spent = usage(started, event.completion_tokens).model_dump()
            yield {**head, "object": "text_completion", "choices": [], "usage": spent}
