"""A service without a model, for the tests of the API: every answer is known beforehand, and what was asked is kept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import uvicorn
from fastapi import FastAPI

from kveraser.errors import SpanError
from kveraser.measure.probes import Probe
from kveraser.serve.app import Settings, create_app
from kveraser.serve.engine import Sampling, TokenLogprob
from kveraser.serve.errors import ContextOverflow, SessionBusy, UnknownSession, as_serve_error
from kveraser.serve.service import Service
from kveraser.serve.tools import CallReader
from kveraser.serve.types import (
    Caches,
    Delta,
    Event,
    Finished,
    Happened,
    MessageView,
    MethodCard,
    ModelCard,
    SessionView,
    Started,
    TokenView,
    Turn,
)
from kveraser.text.spans import selector_from_json

MODEL = "fake"
PIECES = ("Rome", ", ", "shelf", " 44", ".")
CONTEXT_LENGTH = 4096
RECEIPT = {
    "method": "repair(32)",
    "exact": False,
    "erased": 7,
    "recomputed": 32,
    "seconds": 0.25,
    "text": ["The secret is 1234."],
    "spans": [[3, 10]],
}


class FakeService(Service):
    """Says `pieces`, one token each, or as much as `max_tokens` allows.

    Attributes:
        turns: every request, with whose it was.
        running: answers under way; `cancelled`: those that were not heard to the end.
        gate: where it is set, answers stop in front of their last piece until it opens.
        failure: where it is set, what the next call raises; `failure_at` says behind how many pieces of an answer.
    """

    def __init__(self, pieces: Sequence[str] = PIECES) -> None:
        self.pieces = tuple(pieces)
        self.turns: list[tuple[str, Turn]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.running = self.cancelled = 0
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.failure_at: int | None = None
        self.what = Happened("append", "context_1", 7, 32, 5, False, (RECEIPT,), (), True)
        self.sessions: dict[tuple[str, str], SessionView] = {}
        self.closed = False

    def models(self) -> Sequence[ModelCard]:
        return [ModelCard(MODEL, 1_700_000_000, CONTEXT_LENGTH)]

    async def methods(self) -> Sequence[MethodCard]:
        self._fail(None)
        return [
            MethodCard(
                "repair", "shift, then more", "window", "here", False, True, {"window": 8, "per_span": 0.0}, True
            )
        ]

    def call_reader(self, most: int | None, tools: Sequence[Mapping[str, Any]]) -> CallReader:
        return CallReader(most, names={tool["function"]["name"] for tool in tools})

    def token_text(self, token: int) -> str:
        return self.pieces[token] if token < len(self.pieces) else "\ufffd"

    async def generate(self, key: str, turn: Turn) -> AsyncGenerator[Event]:
        self.turns.append((key, turn))
        async for event in self._answer(turn.sampling):
            yield event

    async def _answer(self, sampling: Sampling) -> AsyncGenerator[Event]:
        self._fail(None)
        most = sampling.max_tokens
        if most is not None and most > CONTEXT_LENGTH:
            raise ContextOverflow(f"the answer may have {most} tokens, the model has {CONTEXT_LENGTH} positions")
        self.running += 1
        try:
            await asyncio.sleep(0)
            yield Started(12, 9, self.what)
            said, reason = "", "stop"
            for number, piece in enumerate(self.pieces):
                self._fail(number)
                if most is not None and number >= most:
                    reason = "length"
                    break
                if self.gate is not None and number == len(self.pieces) - 1:
                    await self.gate.wait()
                said += piece
                yield Delta(piece, (self._token(number, sampling),))
                await asyncio.sleep(0)
                if any(stop in said for stop in sampling.stop):
                    break
            yield Finished(reason, min(number + 1, most or number + 1), replace(self.what, exact=True))  # type: ignore[arg-type]
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _fail(self, number: int | None) -> None:
        if self.failure is not None and self.failure_at == number:
            raise self.failure

    def _token(self, number: int, sampling: Sampling) -> TokenLogprob:
        top = () if not sampling.logprobs else tuple((number + more, -0.5 - more) for more in range(sampling.logprobs))
        return TokenLogprob(number, -0.5, top)

    async def create(
        self,
        key: str,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        ttl: float | None = None,
        allow_special: bool = False,
    ) -> SessionView:
        self._fail(None)
        self.asked.append(("create", key, messages, text, tuple(tools), ttl))
        shown = tuple(
            MessageView(index, one["role"], len(one["content"] or ""), one["content"], True)
            for index, one in enumerate(messages or ())
        )
        made = SessionView(f"session_{len(self.sessions)}", 1.0, 2.0, shown, text, 20, 20, True, 0, (), 2048, 1)
        self.sessions[key, made.id] = made
        return made

    def _session(self, key: str, id: str) -> SessionView:
        self._fail(None)
        if (key, id) not in self.sessions:
            raise UnknownSession(f"there is no session {id[:40]!r}: list them with GET /v1/sessions")
        return self.sessions[key, id]

    def _changed(self, key: str, id: str, **changes: Any) -> SessionView:
        held = self._session(key, id)
        self.sessions[key, id] = replace(held, revision=held.revision + 1, **changes)
        return self.sessions[key, id]

    async def list(self, key: str) -> Sequence[SessionView]:
        return [view for (owner, _), view in self.sessions.items() if owner == key]

    async def view(self, key: str, id: str, contents: bool = False) -> SessionView:
        held = self._session(key, id)
        if contents:
            return held
        return replace(held, text=None, messages=tuple(replace(one, text=None) for one in held.messages))

    async def tokens(self, key: str, id: str) -> Sequence[TokenView]:
        self._session(key, id)
        return [TokenView("The", True, 0, 0, 3, True), TokenView(" secret", False, None, 3, 10, False)]

    async def delete(self, key: str, id: str) -> None:
        self._session(key, id)
        del self.sessions[key, id]

    async def erase(
        self,
        key: str,
        id: str,
        what: Any,
        method: str | None = None,
        max_kl: float | None = None,
        undoable: bool = True,
        text: str | None = None,
    ) -> dict[str, Any]:
        held = self._session(key, id)
        self.asked.append(("erase", key, id, what, method, max_kl, undoable, *([] if text is None else [text])))
        for one in what:
            selector_from_json(one)
            if isinstance(one, dict) and one.get("tool_call_id") == "call_unknown":
                raise as_serve_error(SpanError("no result of a tool call 'call_unknown': the conversation has none"))
        self._changed(key, id, undo_steps=held.undo_steps + int(undoable), receipts=(*held.receipts, RECEIPT))
        return RECEIPT

    async def undo(self, key: str, id: str, steps: int = 1) -> SessionView:
        held = self._session(key, id)
        if steps > held.undo_steps:
            raise SessionBusy(f"there are {held.undo_steps} steps to undo, not {steps}: give a smaller number")
        return self._changed(key, id, undo_steps=held.undo_steps - steps, receipts=held.receipts[:-steps])

    async def fork(self, key: str, id: str) -> SessionView:
        copy = replace(self._session(key, id), id=f"session_{len(self.sessions)}")
        self.sessions[key, copy.id] = copy
        return copy

    async def audit(
        self,
        key: str,
        id: str,
        probes: Sequence[str | Probe] | None = None,
        secrets: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        if not self._session(key, id).receipts:
            raise SessionBusy("nothing has been erased yet: audit after erase")
        self.asked.append(("audit", key, id, probes, secrets))
        return {"kl": 0.01, "fidelity": 0.97, "leak": 0.0, "probes": []}

    async def influence(self, key: str, id: str, what: Any) -> dict[str, Any]:
        self._session(key, id)
        self.asked.append(("influence", key, id, what))
        return {"messages": [{"message": 3, "role": "assistant", "tokens": 6, "change": 0.5, "kl": 0.3}], "kl": 0.3}

    async def append(
        self,
        key: str,
        id: str,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: str | None = None,
        allow_special: bool = False,
    ) -> SessionView:
        self.asked.append(("append", key, id, messages, text))
        return self._changed(key, id, tokens=self._session(key, id).tokens + 5)

    async def ask(
        self,
        key: str,
        id: str,
        question: str,
        sampling: Sampling | None = None,
        keep: bool = False,
        caches: Caches = "edited",
    ) -> AsyncIterator[Event]:
        self._session(key, id)
        self.asked.append(("ask", key, id, question, sampling, keep, caches))
        async for event in self._answer(sampling or Sampling(temperature=0)):
            yield event

    def status(self) -> dict[str, float]:
        return {"contexts": 3.0, "sessions": float(len(self.sessions)), "bytes_held": 2048.0, "streams": self.running}

    async def close(self) -> None:
        self.closed = True


def transport(app: FastAPI) -> httpx2.ASGITransport:
    """The application in process; an exception that reaches its edge is an exception of the test."""
    return httpx2.ASGITransport(app=app)


@asynccontextmanager
async def http(service: Service, settings: Settings | None = None, **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    """A plain HTTP client of an application around `service`."""
    app = create_app(service, settings)
    async with httpx2.AsyncClient(
        transport=transport(app), base_url="http://127.0.0.1:8000", headers=headers
    ) as client:
        yield client


@asynccontextmanager
async def client_of(
    service: Service, settings: Settings | None = None, key: str = "unused"
) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client of an application around `service`."""
    async with (
        http(service, settings) as plain,
        openai.AsyncOpenAI(
            api_key=key, base_url="http://127.0.0.1:8000/v1", http_client=plain, max_retries=0
        ) as client,
    ):
        yield client


@asynccontextmanager
async def listening(service: Service, settings: Settings | None = None) -> AsyncIterator[tuple[str, int]]:
    """A real server around `service` on a free port of this machine: its host and port."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        config = uvicorn.Config(create_app(service, settings), log_config=None, timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            while not server.started:
                await asyncio.sleep(0)
            yield bound.getsockname()
        finally:
            server.should_exit = True
            await serving
