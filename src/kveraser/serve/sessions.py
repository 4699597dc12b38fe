"""Sessions that clients create and edit. Each is restored at its acknowledged state or reported as gone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import regex  # type: ignore[import-untyped]

from kveraser.errors import InputError, SessionError, SpanError
from kveraser.measure.probes import Probe
from kveraser.serve.conversations import ANSWER_TOKENS, Conversations
from kveraser.serve.engine import Engine, Held, Sampling
from kveraser.serve.entries import Entry, Undoable
from kveraser.serve.errors import ContextOverflow, Overloaded, SessionBusy
from kveraser.serve.rendering import (
    Reading,
    exchanged,
)
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.store import Store
from kveraser.serve.tasks import Background
from kveraser.serve.types import (
    Caches,
    Delta,
    Erasing,
    Event,
    Finished,
    Happened,
    SessionView,
    Started,
    TokenView,
    message_views,
    summary,
    token_views,
)
from kveraser.session.erase import Change
from kveraser.text import chat
from kveraser.text.spans import Pattern, Selector, Span, Transcript, replacements, resolve, selector_from_json
from kveraser.text.template import ChatOptions
from kveraser.text.tokenized import TokenizedText, tokenize

T = TypeVar("T")

TOKEN_CHARACTERS = 128
"""Upper bound on the characters per token of any text."""
SESSION_RETRY_SECONDS = 60.0
"""When a client with too many sessions should retry: sessions expire only after hours."""
PATTERN_SECONDS = 0.5
"""Time limit for a regular expression of a client."""
MOST_PATTERNS = 8
"""Per request."""
PATTERN_CHARACTERS = 1000
"""Maximum length of a regular expression."""


@dataclass(frozen=True)
class TimedPattern:
    """A `Pattern` with a time limit, since some expressions take exponential time."""

    pattern: str
    occurrence: int | None

    def resolve(self, transcript: Transcript) -> list[Span]:
        """See `Pattern.resolve`. Also raises SpanError if the search exceeds the time limit."""
        try:
            matches = regex.compile(self.pattern, regex.V0).finditer(
                transcript.text, transcript.body_start, timeout=PATTERN_SECONDS
            )
            found = [match.span() for match in matches]
        except (regex.error, RecursionError, OverflowError) as error:
            raise SpanError(f"the pattern {self.pattern!r} is not a regular expression: {error}") from error
        except TimeoutError as error:
            raise SpanError(f"the pattern {self.pattern!r} takes too long on this text: simplify it") from error
        live = transcript.occurrences(found)
        if not live:
            raise SpanError(f"the pattern {self.pattern!r} matches nothing that is live: try it on the text")
        if self.occurrence is None:
            return [span for _, span in live]
        if not 1 <= self.occurrence <= len(live):
            raise SpanError(
                f"the pattern {self.pattern!r} has no match {self.occurrence}: it matches {len(live)} times"
            )
        return [live[self.occurrence - 1][1]]


def read_selectors(value: Any) -> list[Selector]:
    """Read a selector as `selector_from_json` does, or a list of them; two integers are a range of characters.

    Raises:
        SpanError: invalid selectors, too many patterns, or a pattern that is too long.
    """
    several = isinstance(value, list) and not (len(value) == 2 and all(type(bound) is int for bound in value))
    selectors = [selector_from_json(one) for one in (value if several else [value])]
    patterns = [one.pattern for one in selectors if isinstance(one, Pattern)]
    longest = max(map(len, patterns), default=0)
    if len(patterns) > MOST_PATTERNS:
        raise SpanError(f"{len(patterns)} patterns at once: give {MOST_PATTERNS} at most, or join them with |")
    if longest > PATTERN_CHARACTERS:
        raise SpanError(f"a pattern has {longest} characters: give {PATTERN_CHARACTERS} at most")
    return [TimedPattern(one.pattern, one.occurrence) if isinstance(one, Pattern) else one for one in selectors]


class Sessions:
    """Operations on sessions. Operations on the same session run one after another; while it is answering, only reading
    is possible.

    Args:
        tokenizer: used only by this class, on the event loop's thread.
        conversations: answers from the contexts that a session is compared with.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        store: Store,
        background: Background,
        tokenizer: Any,
        conversations: Conversations,
    ) -> None:
        self.engine, self.scheduler, self.store, self.background = engine, scheduler, store, background
        self.tokenizer, self.conversations = tokenizer, conversations

    # Making and reading

    async def create(self, owner: str, rendered: TokenizedText, turn_open: bool, ttl: float | None) -> SessionView:
        """Create, prefill and record a session."""
        limits = self.store.limits
        self._check_count(owner)
        self._check_room(0, len(rendered.tokens))
        ttl = min(limits.session_seconds if ttl is None else ttl, limits.longest_session_seconds)
        entry = self.store.enter(owner, "session", ttl)
        entry.turn_open = turn_open
        try:
            async with entry.lock:
                await self.store.reserve(entry, len(rendered.tokens))
                held = entry.held = await self.scheduler.run(lambda: self.engine.hold(rendered))
                await self.scheduler.prefill(held)
                await self.store.settle(entry)
                return await self._view(entry, held, False)
        except BaseException:
            await self.background.surely(self.store.remove(entry))
            raise

    def _check_count(self, owner: str) -> None:
        limits = self.store.limits
        if len(self.store.of(owner, "session")) >= limits.most_sessions:
            raise Overloaded(
                f"there are {limits.most_sessions} sessions already, the most that a key may have: delete some",
                code="too_many_sessions",
                retry_after=SESSION_RETRY_SECONDS,
            )

    def _check_room(self, held: int, added: int) -> None:
        most = self.engine.max_positions
        if most is not None and held + added > most:
            raise ContextOverflow(f"the session would have {held + added} tokens and the model has {most} positions")

    async def view(self, owner: str, id: str, contents: bool = False) -> SessionView:
        """View a session, with texts if `contents`. It is loaded from disk if necessary."""
        return await self._read(owner, id, lambda entry, held: self._view(entry, held, contents))

    async def tokens(self, owner: str, id: str) -> Sequence[TokenView]:
        """All tokens of a session, including erased ones."""

        async def read(entry: Entry, held: Held) -> Sequence[TokenView]:
            return await self.scheduler.run(lambda: token_views(held.transcript)[: entry.measured.tokens])

        return await self._read(owner, id, read)

    async def _read(self, owner: str, id: str, read: Callable[[Entry, Held], Awaitable[T]]) -> T:
        """Read a session between turns of the engine, even while it is answering.

        The transcript then includes the question already, but only the measured tokens belong to the session.
        """
        entry = self.store.session(owner, id)
        if entry.held is not None and entry.streaming:
            return await read(entry, entry.held)
        async with self._using(owner, id) as (entry, held):
            entry.used = self.store.clock()
            return await read(entry, held)

    async def _view(self, entry: Entry, held: Held, contents: bool) -> SessionView:
        def read() -> SessionView:
            transcript = held.transcript
            return summary(
                entry,
                messages=message_views(transcript, contents),
                text=transcript.live_text(0, entry.measured.tokens) if contents else None,
                receipts=tuple(receipt.to_json() for receipt in held.receipts),
            )

        return await self.scheduler.run(read)

    async def list(self, owner: str) -> Sequence[SessionView]:
        """The sessions of an owner, oldest first, without loading them."""
        now = self.store.clock()
        return [summary(entry) for entry in self.store.of(owner, "session") if entry.revision and entry.expires > now]

    # Changing

    async def append(
        self,
        owner: str,
        id: str,
        messages: Sequence[Mapping[str, Any]] | None,
        text: str | None,
        allow_special: bool = False,
    ) -> SessionView:
        """Append messages or text."""

        async def append(entry: Entry, held: Held) -> SessionView:
            rendered = self._continuation(entry, messages, text, ChatOptions(allow_special=allow_special))
            self._check_room(entry.measured.live_tokens, len(rendered.tokens))
            await self.store.reserve(entry, len(rendered.tokens))
            async with self._or_as_before(entry, held):
                await self._add(held, rendered)
                await self._settle(entry)
            return await self._view(entry, held, False)

        return await self._change(owner, id, append)

    def _continuation(
        self, entry: Entry, messages: Sequence[Mapping[str, Any]] | None, text: str | None, options: ChatOptions
    ) -> TokenizedText:
        check_length(
            self.engine.max_positions, text or "", *(str(message.get("content")) for message in messages or ())
        )
        templated = chat.has_template(self.tokenizer)
        if messages is not None:
            if entry.turn_open or not templated:
                raise InputError("this is a text session: append text, not messages")
            return chat.added_messages(self.tokenizer, messages, options)
        if templated and not entry.turn_open:
            raise InputError("this is a conversation: append messages, not text")
        return chat.added_text(self.tokenizer, text or "", options)

    async def erase(
        self,
        owner: str,
        id: str,
        what: Any,
        method: str | None = None,
        max_kl: float | None = None,
        undoable: bool = True,
        text: str | None = None,
    ) -> dict[str, Any]:
        """Erase or replace spans and return the receipt.

        Args:
            what: a selector as `selector_from_json` reads it, or a list of them; a list of two integers is one range
                of characters.
            undoable: False overwrites the removed states, in memory and on disk, and everything that could restore
                them.
            text: takes the place of each span; special tokens in it are text. None: nothing does.
        """
        selectors = read_selectors(what)
        added = None if text is None else chat.added_text(self.tokenizer, text)

        async def erase(entry: Entry, held: Held) -> dict[str, Any]:
            # Undo states take up to the size of the context; `auto` compares with two prefills.
            compared = 2 * entry.measured.tokens if method == "auto" or max_kl is not None else 0
            more = 0 if added is None else len(added.tokens) * len(selectors)
            await self.store.reserve(entry, compared + more, entry.bytes)

            def work() -> dict[str, Any]:
                if text is None:
                    changes = [Change(span) for span in resolve(held.transcript, selectors)]
                else:
                    pairs = replacements(held.transcript, selectors, text)
                    changes = [Change(span, chat.added_text(self.tokenizer, new)) for span, new in pairs]
                return self.engine.edit(held, changes, method, max_kl, undoable).to_json()

            receipt = await self.scheduler.run(work)
            await self._settle(entry)
            if not undoable:
                await self.store.forget_made_for(id)
            return receipt

        return await self._change(owner, id, erase)

    async def undo(self, owner: str, id: str, steps: int = 1) -> SessionView:
        """Undo the last operations: erases, appends and kept answers.

        They can be undone for the time in `Limits`, while the session stays in memory.
        """

        async def undo(entry: Entry, held: Held) -> SessionView:
            if not 1 <= steps <= len(entry.undoable):
                raise SessionError(f"can't undo {steps} steps: {len(entry.undoable)} can be undone")
            undone = entry.undoable[-steps:]
            await self.scheduler.run(lambda: self.engine.undo(held, sum(one.steps for one in undone)))
            entry.undoable, entry.turn_open = entry.undoable[:-steps], undone[0].turn_open
            await self.store.settle(entry)
            return await self._view(entry, held, False)

        return await self._change(owner, id, undo)

    async def audit(
        self,
        owner: str,
        id: str,
        probes: Sequence[str | Probe] | None = None,
        secrets: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Audit the erases. The last receipt includes the audit."""

        async def audit(entry: Entry, held: Held) -> dict[str, Any]:
            await self.store.reserve(entry, 2 * entry.measured.tokens)
            measured = await self.scheduler.run(lambda: self.engine.audit(held, probes, secrets))
            await self.store.settle(entry)
            return measured.to_json()

        return await self._change(owner, id, audit)

    async def influence(self, owner: str, id: str, what: Any) -> dict[str, Any]:
        """Measure how much spans changed each later message and token; `what` is as for `erase`."""
        selectors = read_selectors(what)

        async def measure(entry: Entry, held: Held) -> dict[str, Any]:
            await self.store.reserve(entry, 2 * entry.measured.tokens)
            found = await self.scheduler.run(lambda: self.engine.influence(held, selectors))
            await self.store.settle(entry)
            return found.to_json()

        return await self._change(owner, id, measure)

    async def fork(self, owner: str, id: str) -> SessionView:
        """Make and record an independent copy."""

        async def fork(origin: Entry, held: Held) -> SessionView:
            self._check_count(owner)
            entry = self.store.enter(owner, "session", origin.ttl)
            entry.turn_open, entry.undoable = origin.turn_open, list(origin.undoable)
            try:
                async with entry.lock:
                    await self.store.reserve(entry, 0, origin.bytes)
                    copy = entry.held = await self.scheduler.run(lambda: self.engine.fork(held))
                    await self.store.settle(entry)
                    return await self._view(entry, copy, False)
            except BaseException:
                await self.store.remove(entry)
                raise

        return await self._change(owner, id, fork)

    async def delete(self, owner: str, id: str) -> None:
        """Delete a session and the contexts created for comparison with it. Their states are overwritten."""
        entry = self._free(owner, id)

        async def delete() -> None:
            async with entry.lock:
                if self.store.entries.get(id) is entry:
                    await self.store.forget_made_for(id)
                    await self.store.remove(entry, wipe=True)

        await self.background.surely(delete())

    # Asking

    async def ask(
        self, owner: str, id: str, question: str, sampling: Sampling, keep: bool, caches: Caches
    ) -> AsyncGenerator[Event, None]:
        """Ask the session, or a context that it is compared with."""
        check_length(self.engine.max_positions, question)
        if caches != "edited":
            if keep:
                raise InputError("only an answer from the session's own cache can be kept: ask with caches=edited")
            reading = await self._read(owner, id, lambda entry, held: self._compared(entry, held, question, caches))
            answer = self.conversations.answer(owner, reading, sampling, Erasing("recompute"), (id, caches))
        else:
            answer = self._ask(owner, id, question, sampling, keep)
        async with aclosing(answer) as events:
            async for event in events:
                yield event

    async def _compared(self, entry: Entry, held: Held, question: str, caches: Caches) -> Reading:
        """All tokens or the live tokens of the session, and the question."""
        added = self._question(entry, question)

        def read() -> Reading:
            transcript, tokens = held.transcript, entry.measured.tokens
            stays = [place for place in range(tokens) if caches == "unerased" or transcript.live[place]]
            text, offsets, reached = "", list[tuple[int, int]](), 0
            for start, end in (transcript.offsets[place] for place in stays):
                # Several tokens may share a character.
                text += transcript.text[max(start, reached) : end]
                offsets.append((len(text) - (end - start), len(text)))
                reached = end
            return Reading(
                self.tokenizer,
                text + added.text,
                [*(transcript.tokens[place] for place in stays), *added.tokens],
                [*offsets, *((len(text) + start, len(text) + end) for start, end in added.offsets)],
            )

        return await self.scheduler.run(read)

    def _question(self, entry: Entry, question: str) -> TokenizedText:
        return tokenize(self.tokenizer, chat.question_text(self.tokenizer, question, entry.turn_open), follows=True)

    async def _ask(
        self, owner: str, id: str, question: str, sampling: Sampling, keep: bool
    ) -> AsyncGenerator[Event, None]:
        async with self._using(owner, id, streaming=True) as (entry, held):
            prompt = self._question(entry, question)
            live, before = entry.measured.live_tokens, len(held.transcript.text)
            self._check_room(live + 1, len(prompt.tokens))
            await self.store.reserve(entry, len(prompt.tokens))
            async with self._or_as_before(entry, held, always=not keep):
                await self._add(held, prompt)
                what = Happened("append", id, prefilled_tokens=len(prompt.tokens), exact=entry.measured.exact)
                yield Started(live + len(prompt.tokens), live, what)
                count, room, reason = 0, ANSWER_TOKENS, "length"
                async with aclosing(self.scheduler.decode(held, sampling, keep)) as steps:
                    async for step in steps:
                        count += len(step.tokens)
                        if step.text or step.tokens:
                            yield Delta(step.text, step.tokens)
                        if count >= room:
                            room += ANSWER_TOKENS
                            await self.conversations.grow(entry, len(prompt.tokens) + room)
                        reason = step.finish_reason or reason
                if keep:
                    await self.background.surely(self._keep(entry, held, question, prompt.text, before))
            entry.used = self.store.clock()
        yield Finished("length" if reason == "length" else "stop", count, what)

    async def _keep(self, entry: Entry, held: Held, question: str, prompt: str, before: int) -> None:
        """Close the reply's turn, and record the question and the answer."""
        if chat.has_template(self.tokenizer):
            said = len(held.transcript.text) - before - len(prompt)
            body = held.transcript.body_start if entry.turn_open else None
            closing = exchanged(self.tokenizer, question, prompt, said, before, body)
            if closing.tokens:
                await self._add(held, closing)
        was_open, entry.turn_open = entry.turn_open, False
        await self._settle(entry, was_open)

    # What operations share

    def _free(self, owner: str, id: str) -> Entry:
        entry = self.store.session(owner, id)
        if entry.streaming:
            raise SessionBusy(f"session {id} is answering: wait for the end of the answer, or cancel it")
        return entry

    @asynccontextmanager
    async def _using(self, owner: str, id: str, streaming: bool = False) -> AsyncIterator[tuple[Entry, Held]]:
        """Lock the session and load it into memory."""
        entry = self._free(owner, id)
        async with entry.lock:
            # It may have been removed in the meantime.
            self._free(owner, id)
            entry.streaming = streaming
            try:
                yield entry, await self.store.awake(entry)
            finally:
                entry.streaming, entry.reserved = False, 0

    async def _change(self, owner: str, id: str, change: Callable[[Entry, Held], Awaitable[T]]) -> T:
        """Run an operation to its end even if the request is cancelled."""

        async def run() -> T:
            async with self._using(owner, id) as (entry, held):
                return await change(entry, held)

        return await self.background.surely(run())

    async def _add(self, held: Held, text: TokenizedText) -> None:
        await self.scheduler.run(lambda: self.engine.append(held, text))
        await self.scheduler.prefill(held)

    @asynccontextmanager
    async def _or_as_before(self, entry: Entry, held: Held, always: bool = False) -> AsyncIterator[None]:
        """Undo additions to a session after an exception, or always with `always`."""
        steps = entry.measured.undo_steps

        def take_back() -> int:
            # Truncation would leave a token run that was pending before, and a later erase would differ.
            if held.undo_steps > steps:
                self.engine.undo(held, held.undo_steps - steps)
            return held.nbytes

        async def as_before() -> None:
            size = await self.scheduler.run(take_back, always=True)
            # Grown buffers remain; the reservation for them ends.
            entry.measured, entry.reserved = replace(entry.measured, bytes=size), 0

        try:
            yield
        except BaseException:
            await self.background.surely(as_before())
            raise
        if always:
            await self.background.surely(as_before())

    async def _settle(self, entry: Entry, turn_open: bool | None = None) -> None:
        """Record a change and its undo steps."""
        before, opened = entry.measured.undo_steps, entry.turn_open if turn_open is None else turn_open
        await self.store.settle(entry)
        grown = entry.measured.undo_steps - before
        if not entry.measured.undo_steps:
            entry.undoable = []
        elif grown > 0:
            entry.undoable = [*entry.undoable, Undoable(grown, self.store.clock(), opened)]
            if len(entry.undoable) > self.store.limits.undo_steps:
                most = self.store.limits.undo_steps
                await self.store.keep_undoable(entry, entry.undoable[len(entry.undoable) - most :])


def check_length(most: int | None, *texts: str) -> None:
    """Refuse text that can't fit `most` positions before it is cut into tokens, which takes its time.

    Raises:
        ContextOverflow: it has more characters than so many tokens can have.
    """
    size = sum(map(len, texts))
    if most is not None and size > most * TOKEN_CHARACTERS:
        raise ContextOverflow(f"the text has {size} characters, too many for the model's {most} positions")
