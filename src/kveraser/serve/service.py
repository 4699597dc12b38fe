"""The service behind the HTTP API: answers from cached conversations, and sessions that clients edit."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from kveraser.errors import InputError, KVEraserError
from kveraser.serve.conversations import Conversations
from kveraser.serve.engine import Engine, Sampling, TokenLogprob
from kveraser.serve.entries import Limits
from kveraser.serve.errors import ContextOverflow, as_serve_error
from kveraser.serve.history import SPAN_TOKENS
from kveraser.serve.rendering import (
    Reading,
    read_messages,
    read_prompt,
)
from kveraser.serve.response_template import TemplateReader
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.sessions import Sessions, check_length
from kveraser.serve.store import Store
from kveraser.serve.tasks import Background
from kveraser.serve.tools import CallReader, formats_of
from kveraser.serve.types import (
    Action,
    Caches,
    Delta,
    Erasing,
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
    method_cards,
)
from kveraser.text import chat
from kveraser.text.template import ChatOptions, notices, special_notices

T = TypeVar("T")
P = ParamSpec("P")

SWEEP_SECONDS = 5.0
"""Interval between removals of expired contexts."""

ANSWER_TOKENS = 1024
"""Maximum length of an answer if its request sets none: a model that never stops would fill its context."""


def _operation(
    method: Callable[Concatenate[Sessions, str, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Service, str, P], Coroutine[Any, Any, T]]:
    """The method of `Sessions` as a method of `Service` that takes an API key and raises `ServeError` only."""

    @wraps(method)
    async def run(service: Service, key: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with service._serving():
            return await method(service.sessions, _owner(key), *args, **kwargs)

    return run


class Service:
    """The contexts of all clients and the operations on them. Every method raises `ServeError` only.

    `key` is the API key that owns the contexts. Nothing is shared between keys, and another key's session is reported
    as not found. Use it from one asyncio loop.

    Args:
        engine: the model. Only the scheduler's thread may call it.
        scheduler: of the same engine; `close` closes it.
        limits: on contexts.
        folder: stores sessions across restarts; None: they end with the process.
        method: default erasing method; None: the engine's default. With `recompute`, all tokens after the first
            difference are run again, in chunks.
        answer_tokens: default maximum length of an answer; None: limited only by the context.
        span_tokens: tokens that erasing a span must save; else all tokens after the first difference are run again.
        clock: seconds since 1970.

    Raises:
        ServeError: the folder can't be used, or another server uses it.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        *,
        limits: Limits | None = None,
        folder: Path | None = None,
        method: str | None = None,
        answer_tokens: int | None = ANSWER_TOKENS,
        span_tokens: int = SPAN_TOKENS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.engine, self.scheduler = engine, scheduler
        self.created, self.answer_tokens = int(clock()), answer_tokens
        # Tokenizers are not thread-safe, and the engine's thread uses its own.
        self.tokenizer = copy.deepcopy(engine.tokenizer)
        self.thread = ThreadPoolExecutor(1, "kveraser-reader")
        self.background = Background()
        self.store = Store(engine, scheduler, limits or Limits(), folder, clock)
        self.conversations = Conversations(
            engine, scheduler, self.store, self.thread, self.background, method, span_tokens
        )
        self.sessions = Sessions(
            engine, scheduler, self.store, self.background, copy.deepcopy(engine.tokenizer), self.conversations
        )
        self._sweeper: asyncio.Task[None] | None = None

    def models(self) -> Sequence[ModelCard]:
        """The served models."""
        return [ModelCard(self.engine.name, self.created, self.engine.max_positions)]

    async def methods(self) -> Sequence[MethodCard]:
        """The available erasing methods."""
        with self._serving():
            return method_cards(await self.scheduler.run(self.engine.methods))

    def token_text(self, token: int) -> str:
        """The text of a single token; an incomplete character becomes a replacement character."""
        text: str = self.tokenizer.decode([token])
        return text

    def call_reader(self, most: int | None, tools: Sequence[Mapping[str, Any]]) -> CallReader | TemplateReader:
        """A reader of tool calls in the model's answers, by its response template if it has one."""
        try:
            opening = chat.reply_opening(self.tokenizer)
        except InputError:
            opening = ""
        if getattr(self.tokenizer, "response_template", None) is not None:
            return TemplateReader(self.tokenizer, tools, opening, most)
        names = {tool["function"]["name"] for tool in tools}
        template, thinking = str(self.tokenizer.chat_template), opening.rstrip().endswith("<think>")
        return CallReader(most, formats=formats_of(template), names=names, thinking=thinking)

    async def generate(self, key: str, turn: Turn) -> AsyncIterator[Event]:
        """Answer a request: yields one `Started`, `Delta`s, one `Finished`. Closing the iterator cancels the answer.

        The first `__anext__` raises the errors of invalid requests.
        """
        with self._serving():
            reading = await self._in_thread(lambda: self._read(turn))
            noticed = [] if turn.messages is None else await self._noticed(turn.messages, None, turn.options)
            warnings = (*turn.warnings, *noticed)
            answer = self.conversations.answer(_owner(key), reading, self._capped(turn.sampling), turn.erasing)
            async with aclosing(answer) as events:
                async for event in events:
                    if warnings and not isinstance(event, Delta):
                        event = replace(event, what=replace(event.what, warnings=warnings))
                    yield event

    def _capped(self, sampling: Sampling) -> Sampling:
        """The sampling settings with the server's limit if the request sets none."""
        return replace(sampling, max_tokens=self.answer_tokens) if sampling.max_tokens is None else sampling

    async def _noticed(
        self, messages: Sequence[Mapping[str, Any]] | None, text: str | None, options: ChatOptions
    ) -> Sequence[str]:
        """Warnings about a conversation or a text."""

        def look() -> Sequence[str]:
            if messages is None:
                return special_notices(self.tokenizer, {"the text": text}, options.allow_special)
            return notices(self.tokenizer, messages, options)

        noticed: Sequence[str] = await self._in_thread(look)
        return noticed

    def _read(self, turn: Turn) -> Reading:
        if (turn.messages is None) == (turn.prompt is None):
            raise InputError("give either messages or a prompt")
        if turn.messages is not None:
            check_length(self.engine.max_positions, *(str(message.get("content")) for message in turn.messages))
            return read_messages(self.tokenizer, turn.messages, turn.options, turn.context_edits, turn.dropped)
        if turn.context_edits or turn.dropped:
            raise InputError("context_management and drop_message edit a conversation: give messages, not a prompt")
        prompt, most = turn.prompt or "", self.engine.max_positions
        if most is not None and not isinstance(prompt, str) and len(prompt) >= most:
            raise ContextOverflow(f"the prompt has {len(prompt)} tokens and the model {most} positions: shorten it")
        return read_prompt(self.tokenizer, prompt)

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
        """Create and prefill a session of messages or a text. `ttl` in seconds from its last use; None: the default."""
        with self._serving():
            if (messages is None) == (text is None):
                raise InputError("give a session either text or messages")
            if ttl is not None and not ttl > 0:
                raise InputError(f"ttl is {ttl}: give seconds above 0")
            options = ChatOptions(tools, allow_special=allow_special)
            if messages is not None:
                rendered = await self._in_thread(lambda: chat.conversation(self.tokenizer, messages, options))
            else:
                rendered = await self._in_thread(lambda: chat.document(self.tokenizer, text or "", options))
            turn_open = messages is None and rendered.body_start > 0
            made = await self.sessions.create(_owner(key), rendered, turn_open, ttl)
            return replace(made, warnings=tuple(await self._noticed(messages, text, options)))

    list = _operation(Sessions.list)
    view = _operation(Sessions.view)
    tokens = _operation(Sessions.tokens)
    delete = _operation(Sessions.delete)
    erase = _operation(Sessions.erase)
    undo = _operation(Sessions.undo)
    fork = _operation(Sessions.fork)
    audit = _operation(Sessions.audit)
    influence = _operation(Sessions.influence)

    async def append(
        self,
        key: str,
        id: str,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: str | None = None,
        allow_special: bool = False,
    ) -> SessionView:
        """Append messages to a conversation, or text to a text session."""
        with self._serving():
            if (messages is None) == (text is None):
                raise InputError("append either text or messages")
            changed = await self.sessions.append(_owner(key), id, messages, text, allow_special)
            options = ChatOptions(allow_special=allow_special)
            return replace(changed, warnings=tuple(await self._noticed(messages, text, options)))

    async def ask(
        self,
        key: str,
        id: str,
        question: str,
        sampling: Sampling | None = None,
        keep: bool = False,
        caches: Caches = "edited",
    ) -> AsyncIterator[Event]:
        """Ask a session; yields events as `generate`.

        Args:
            keep: append question and answer to the session; only with `edited`.
            caches: answer from the session's cache, from one without erases, or from an exact one.
        """
        with self._serving():
            capped = self._capped(sampling or Sampling())
            answer = self.sessions.ask(_owner(key), id, question, capped, keep, caches)
            async with aclosing(answer) as events:
                async for event in events:
                    yield event

    def status(self) -> dict[str, float]:
        """Numbers for health and metrics: contexts, sessions, bytes_held, bytes_spilled, waiting, streams."""
        entries = self.store.entries.values()
        return {
            "contexts": sum(entry.kind == "conversation" for entry in entries),
            "sessions": sum(entry.kind == "session" for entry in entries),
            "bytes_held": self.store.bytes_held,
            "bytes_spilled": self.store.bytes_spilled,
            "waiting": self.scheduler.waiting,
            "streams": self.scheduler.streams,
        }

    async def close(self) -> None:
        """Write unsaved sessions to disk and free everything."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        await self.background.finish()
        await self.store.close()
        await asyncio.to_thread(self.scheduler.close)
        self.thread.shutdown()

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Convert errors of the library to `ServeError`."""
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().create_task(self._sweep())
        try:
            yield
        except KVEraserError as error:
            raise as_serve_error(error) from error

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Run slow rendering and searching in a thread, so that streams are not blocked."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            with suppress(KVEraserError):
                await self.store.sweep()


def _owner(key: str) -> str:
    """The digest of a key, the only form in which it is stored."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


__all__ = [
    "Action", "Caches", "Delta", "Erasing", "Event", "Finished", "Happened", "Limits", "MessageView", "MethodCard",
    "ModelCard", "Sampling", "Service", "SessionView", "Started", "TokenLogprob", "TokenView", "Turn",
]  # fmt: skip
