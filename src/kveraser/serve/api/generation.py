"""An answer that is being generated: it runs in a task of its own, and ends when its client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kveraser.errors import KVEraserError
from kveraser.serve.engine import TokenLogprob
from kveraser.serve.errors import ServeError, as_serve_error
from kveraser.serve.fields import Happening, PromptTokensDetails, Usage
from kveraser.serve.logs import error_fields, log
from kveraser.serve.metrics import Metrics
from kveraser.serve.types import Delta, Event, Finished, Happened, Started

CLIENT_CLOSED = 499
"""Status in logs and metrics of a request whose client went away; nobody receives it."""

HEADER = "X-KVEraser"
LEAST_LOGPROB = -9999.0

SHOWN_RECEIPTS = 8
"""Receipts in the header; the body has all of them."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generation:
    """The events of one answer.

    The service's iterator runs in a task that nothing else runs in, so that cancelling it, when the client goes away,
    is one clean cancellation however the response is sent.

    Args:
        events: from the service.
        receive: the request's, behind its body: it tells when the client goes away.
    """

    def __init__(self, events: AsyncIterator[Event], receive: Receive, metrics: Metrics) -> None:
        self._metrics, self._began, self._reading = metrics, time.monotonic(), True
        metrics.asked(id(self))
        # It holds one answer at most; a client that reads slowly doesn't hold up the others.
        self._queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self._work = asyncio.create_task(self._run(events))
        self._watch = asyncio.create_task(self._until_gone(receive))

    async def _run(self, events: AsyncIterator[Event]) -> None:
        try:
            async for event in events:
                self._queue.put_nowait(event)
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._work.cancel()
        self._queue.put_nowait(ClientGone())

    async def start(self) -> Started:
        """The first event: whatever is wrong with the request is raised here, before a response has begun.

        Raises:
            ServeError, ClientGone: and the generation has ended.
        """
        try:
            event = await self._queue.get()
            if isinstance(event, Exception):
                raise event
            assert isinstance(event, Started), event
        except BaseException:
            await self.close()
            raise
        self._metrics.started(event, time.monotonic() - self._began)
        self._reading = False
        return event

    async def rest(self) -> AsyncGenerator[Delta | Finished]:
        """The events behind the first.

        Raises:
            ServeError, ClientGone
        """
        while (event := await self._queue.get()) is not None:
            if isinstance(event, Exception):
                raise event
            assert not isinstance(event, Started), event
            if isinstance(event, Finished):
                self._metrics.finished(event)
            yield event

    async def close(self) -> None:
        """End it, finished or not."""
        for task in (self._work, self._watch):
            # Cancelled again it would not wait for the step that runs.
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(self._work, self._watch, return_exceptions=True)
        self._metrics.written(id(self), not self._reading)

    async def collect(self) -> tuple[str, list[TokenLogprob], Finished]:
        """The whole answer.

        Raises:
            ServeError, ClientGone
        """
        text, tokens = list[str](), list[TokenLogprob]()
        try:
            async with aclosing(self.rest()) as rest:
                async for event in rest:
                    if isinstance(event, Finished):
                        return "".join(text), tokens, event
                    text.append(event.text)
                    tokens += event.tokens
        finally:
            await self.close()
        raise ServeError("the answer ended without saying how: try again", code="internal_error")


class EventStream(StreamingResponse):
    """Server-sent events of a generation, ended by `[DONE]`, or by an error object.

    Args:
        chunks: the bodies of the events.
        generation: closed when the response has ended, however it ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncGenerator[BaseModel | dict[str, Any]], generation: Generation, what: Happened
    ) -> None:
        super().__init__(_events(chunks), headers={**happened_header(what), "Cache-Control": "no-store"})
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The generation watches for the client's going away: the base class would do so a second time.
        try:
            await self.stream_response(send)
        finally:
            await self.generation.close()


async def _events(chunks: AsyncGenerator[BaseModel | dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk if isinstance(chunk, dict) else chunk.model_dump())
    except ClientGone:
        return
    except KVEraserError as error:
        yield _event(as_serve_error(error).to_json())
        return
    except Exception as error:
        log("failed while streaming", logging.ERROR, **error_fields(error))
        yield _event(internal_error().to_json())
        return
    yield b"data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> bytes:
    # In ASCII: some clients take other characters for ends of lines. JSON has no infinite numbers.
    finite = to_jsonable_python(body, inf_nan_mode="null")
    return f"data: {json.dumps(finite, separators=(',', ':'))}\n\n".encode()


def internal_error() -> ServeError:
    """What a client learns of a fault of the server's."""
    return ServeError("the server failed on this request: its log says where", code="internal_error")


def gone() -> Response:
    """The response to a client that is not there."""
    return Response(status_code=CLIENT_CLOSED)


def happening(what: Happened) -> Happening:
    """What happened, for a reply's `kveraser` field."""
    return Happening(**asdict(what) | {"receipts": list(what.receipts), "applied_edits": list(what.applied_edits)})


def happened_header(what: Happened) -> dict[str, str]:
    """What happened, in short and without contents, for the response header."""
    shown = ("method", "exact", "erased", "recomputed", "seconds")
    short = {name: value for name, value in asdict(what).items() if name not in ("receipts", "applied_edits")}
    short["receipts"] = [{name: one.get(name) for name in shown} for one in what.receipts[:SHOWN_RECEIPTS]]
    return {HEADER: json.dumps(short, separators=(",", ":"))}


def usage(started: Started, completion_tokens: int) -> Usage:
    """Tokens read and written."""
    return Usage(
        prompt_tokens=started.prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=started.prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=started.cached_tokens),
    )


def finite(logprob: float) -> float:
    """A log-probability as OpenAI's API has it: what can't be is merely very unlikely."""
    return max(logprob, LEAST_LOGPROB)


def as_bytes(text: str) -> list[int] | None:
    """A token's bytes; None where it is part of a character, which decodes to a replacement."""
    return None if "\ufffd" in text else list(text.encode())
