"""Cached conversations: a request's history against what is held, and the least work that makes the one the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kveraser.errors import ContextLengthError, KVEraserError
from kveraser.measure.receipt import Receipt
from kveraser.methods import make_method
from kveraser.serve.engine import Engine, Held, Sampling
from kveraser.serve.entries import Entry, Measured, Source
from kveraser.serve.errors import ContextOverflow, ServeError, SessionGone
from kveraser.serve.history import SPAN_TOKENS, Reuse, Tokens, align, reuse, run_again
from kveraser.serve.rendering import Reading
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.store import Store
from kveraser.serve.tasks import Background
from kveraser.serve.types import Action, Delta, Erasing, Event, Finished, Happened, Started
from kveraser.session.erase import Change
from kveraser.text.spans import Place, Span

BRANCH_TOKENS = 64
"""A request that gives up more than this of what the last one asked with is a branch: the context is copied for it."""

LEAST_KEPT = 16
"""Fewer tokens in common are not worth a context that another conversation goes on with."""

SPARED_TOKENS = 8
"""A request that gives up more than this of a context works on a copy where memory is free: the other goes on."""

COPIED_PER_KEPT = 16
"""A branch that keeps less than this part of a context is prefilled afresh instead of copying it."""

ANSWER_TOKENS = 64
"""Room that is reserved for an answer, and again whenever it has grown by as much."""


@dataclass(frozen=True)
class _Asked:
    """A request: whose, its tokens, how to edit for it, and whether only exact states may serve it.

    Attributes:
        inserts: whether its method can insert text.
    """

    owner: str
    reading: Reading
    wanted: Tokens
    erasing: Erasing
    method: str | None
    exactly: bool
    inserts: bool
    source: Source | None


@dataclass(frozen=True)
class Plan:
    """How a context is to serve a request.

    Attributes:
        found: all that it has in common with the request.
        kept: leading tokens of the request that are taken from it.
        removed: spans of its live tokens to erase; a `Place` where tokens are only inserted.
        held: its leading live tokens that are kept or erased.
        inserted: for every removed span the tokens `(start, end)` of the request that take its place, if any.
        again: tokens of the request that it holds after the first difference, and that are run again.
    """

    entry: Entry
    revision: int
    found: Reuse
    kept: int
    removed: tuple[Span, ...]
    held: int
    inserted: tuple[tuple[int, int], ...] = ()
    again: int = 0

    @property
    def branches(self) -> bool:
        return self.found.held < self.entry.prompt - BRANCH_TOKENS

    @property
    def new(self) -> int:
        """Tokens of the request that are inserted."""
        return sum(end - start for start, end in self.inserted)

    @property
    def spares(self) -> bool:
        """Whether what the context would lose is worth a copy."""
        return self.entry.source is None and self.kept - self.new < self.entry.measured.live_tokens - SPARED_TOKENS


def edited(before: Reading | None, now: Reading) -> bool:
    """Whether the client took something out of the history, rather than the chat template or a change of its options.

    Without messages (a prompt of its own, a context brought back from disk) every change is the client's.
    """
    if before is None or not (before.messages and now.messages):
        return True
    same = list(now.messages[: len(before.messages)]) == list(before.messages)
    return not same and now.options == before.options


def same_opening(before: Reading | None, now: Reading) -> bool:
    """Whether two conversations have the same tools and system prompt: all later text was computed from those."""
    if before is None or not (before.messages and now.messages):
        return True
    return before.options == now.options and (
        before.messages[0] == now.messages[0] or now.messages[0]["role"] == "user"
    )


def revised(before: Reading | None, now: Reading) -> bool:
    """Whether `now` is the conversation of `before` with other contents in some of its messages.

    It has the roles of `before` and perhaps more messages, and at least half of the messages of `before` unchanged,
    among them the first and the last.
    """
    if before is None or not before.messages or before.options != now.options:
        return False
    pairs = list(zip(before.messages, now.messages, strict=False))
    same = [one == other for one, other in pairs]
    return (
        len(pairs) == len(before.messages)
        and all(one["role"] == other["role"] for one, other in pairs)
        and same[0]
        and same[-1]
        and 2 * sum(same) >= len(same)
    )


class Conversations:
    """Answers requests from contexts that it keeps by itself.

    Args:
        method: how spans are erased where a request does not say; None: the engine's own choice.
        span_tokens: tokens that an erased span must save; see `history.reuse`.
        thread: for searches among cached tokens, one at a time.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        store: Store,
        thread: Executor,
        background: Background,
        method: str | None = None,
        span_tokens: int = SPAN_TOKENS,
    ) -> None:
        self.engine, self.scheduler, self.store, self.thread = engine, scheduler, store, thread
        self.background = background
        self.method, self.span_tokens = method, span_tokens

    async def answer(
        self, owner: str, reading: Reading, sampling: Sampling, erasing: Erasing, source: Source | None = None
    ) -> AsyncGenerator[Event, None]:
        """One `Started`, `Delta`s, one `Finished`.

        Args:
            source: what the context is made for; contexts made for something else don't serve it.

        Raises:
            KVEraserError: before the first event.
        """
        wanted = np.array(reading.wanted, dtype=np.int32)
        most = self.engine.max_positions
        if most is not None and len(wanted) >= most:
            raise ContextOverflow(
                f"the request has {len(wanted)} tokens and the model {most} positions, one at least for the answer: "
                "shorten it"
            )
        method = erasing.method or (None if erasing.max_kl is not None else self.method)
        # An unknown method is refused before anything is changed.
        named = None if method in (None, "auto") else make_method(str(method))
        exactly = erasing.max_kl == 0 if named is None else named.is_reference
        inserts = named is None or (named.inserts and not named.needs_eraser)
        asked = _Asked(owner, reading, wanted, erasing, method, exactly, inserts, source)
        entry, what, kept = await self._prepared(asked)
        try:
            held = entry.held
            assert held is not None
            await self.scheduler.prefill(held)
            exact, size = await self.scheduler.run(lambda: (held.exact, held.nbytes))
            entry.reserved = max(entry.reserved, size - entry.bytes)
            entry.exact_wanted = (entry.exact_wanted or erasing.now_then_exact) and not exact
            what = replace(what, exact=exact, exact_pending=entry.exact_wanted)
            yield Started(len(wanted), kept, what)
            count, room, reason = 0, ANSWER_TOKENS, "length"
            async with aclosing(self.scheduler.decode(held, sampling, keep=True)) as steps:
                async for step in steps:
                    count += len(step.tokens)
                    if step.text or step.tokens:
                        yield Delta(step.text, step.tokens)
                    if count >= room:
                        room += ANSWER_TOKENS
                        await self.grow(entry, room)
                    reason = step.finish_reason or reason
        finally:
            await self.background.surely(self._release(entry, reading))
        yield Finished("length" if reason == "length" else "stop", count, what)

    async def grow(self, entry: Entry, tokens: int) -> None:
        """Keep room for an answer of `tokens`. Where there is none it goes on: it can't be put away half said."""
        try:
            await self.store.reserve(entry, tokens)
        except ServeError:
            entry.reserved = self.store.size(tokens)

    # Choosing a context

    async def _prepared(self, asked: _Asked) -> tuple[Entry, Happened, int]:
        """A locked context that holds the request's tokens, the new ones pending; what was done; and tokens kept."""
        reading, size = asked.reading, len(asked.wanted)
        plan, again = await self._chosen(asked)
        if plan is not None:
            entry = plan.entry
            try:
                await self.store.awake(entry)
                added, undo = size - plan.kept + plan.new, 0
                if plan.removed:
                    # Until an erase is done it can be undone; `auto` compares with two prefills.
                    undo = entry.bytes
                    added += 2 * plan.held if asked.method == "auto" or asked.erasing.max_kl is not None else 0
                copied = self.store.size(added) + entry.bytes + undo
                fits = entry.bytes + copied <= self.store.limits.memory_bytes
                if (plan.branches and fits) or (plan.spares and self._free(copied)):
                    entry = await self._branch(plan, added, undo)
                else:
                    await self.store.reserve(entry, added, undo)
                receipts, kept = await self.scheduler.run(self._edit(entry, plan, asked))
            except (SessionGone, _Unusable):
                await self.background.surely(self._release(entry, None))
            except BaseException:
                await self.background.surely(self._release(entry, None))
                raise
            else:
                inserted = sum(receipt.inserted for receipt in receipts)
                return entry, _happened(plan, entry, receipts, kept, size, reading), kept - inserted
        entry = self.store.enter(asked.owner, "conversation", self.store.limits.conversation_seconds)
        await entry.lock.acquire()
        entry.source = asked.source
        try:
            await self.store.reserve(entry, size)
            entry.held = await self.scheduler.run(lambda: self.engine.hold(reading.rest(0)))
        except BaseException:
            await self.background.surely(self._release(entry, None))
            raise
        return entry, Happened("prefill", entry.id, 0, again, size - again, applied_edits=reading.applied), 0

    def _free(self, size: int) -> bool:
        """Whether so many bytes are free without letting another context go."""
        return self.store.bytes_held + size <= self.store.limits.memory_bytes

    async def _chosen(self, asked: _Asked) -> tuple[Plan | None, int]:
        """The free context that saves most, locked; and tokens that are run again where none is used."""
        known = self.store.of(asked.owner, "conversation")
        free = [entry for entry in known if entry.source == asked.source and not entry.lock.locked()]
        states = [(entry, entry.revision, entry.measured, entry.reading) for entry in free]
        search = asyncio.get_running_loop().run_in_executor
        plans = await search(self.thread, lambda: self._ranked(states, asked))
        for plan in plans:
            entry = plan.entry
            if self.store.entries.get(entry.id) is entry and entry.revision == plan.revision:
                if entry.lock.locked():
                    continue
                await entry.lock.acquire()
                if self.store.entries.get(entry.id) is entry and entry.revision == plan.revision:
                    return plan, plan.again
                entry.lock.release()

        def again() -> int:
            return max((run_again(measured.live, asked.wanted, LEAST_KEPT) for _, _, measured, _ in states), default=0)

        return None, await search(self.thread, again)

    def _exact_only(
        self, entry: Entry, measured: Measured, found: Reuse, reading: Reading | None, asked: _Asked
    ) -> bool:
        """Whether nothing but a context's exact states may serve a request."""
        erasing, max_kl = asked.erasing, asked.erasing.max_kl
        within = max_kl is None or (measured.kl is not None and measured.kl <= max_kl)
        if asked.exactly or not (measured.exact or within):
            # Behind the first erase nothing is exact; and nothing is erased to stay exact.
            return True
        if erasing.allows_approximate:
            return False
        # What a client did not edit is not served approximately: a conversation of its own behind an erased span, and
        # text that the template or other tools leave out.
        foreign = not measured.exact and found.held < entry.prompt - 1
        return foreign or (bool(found.removed) and not edited(reading, asked.reading))

    def _ranked(self, states: Sequence[tuple[Entry, int, Measured, Reading | None]], asked: _Asked) -> list[Plan]:
        """Contexts that are worth using, the best first."""
        wanted = asked.wanted
        plans: list[tuple[int, float, Plan]] = []
        for entry, revision, measured, reading in states:
            # One token at least is new: the answer begins with what the model says behind it.
            borders = reading.borders if reading is not None else None
            # Into an edited context text is only inserted where the client allows it, or edits its own conversation.
            approximate = asked.erasing.allows_approximate or revised(reading, asked.reading)
            inserts = asked.inserts and (measured.exact or approximate) and same_opening(reading, asked.reading)
            found = (align if inserts else reuse)(measured.live, wanted[:-1], self.span_tokens, borders)
            if self._exact_only(entry, measured, found, reading, asked):
                usable = len(measured.live) if measured.exact else measured.exact_prefix
                kept = min(found.prefix, usable)
                plan = Plan(entry, revision, found, kept, (), kept)
            else:
                plan = Plan(entry, revision, found, found.kept, found.removed, found.held, found.inserted)
            worth = plan.kept * COPIED_PER_KEPT >= len(measured.live) if plan.branches else plan.kept > 0
            if worth and plan.kept >= min(LEAST_KEPT, len(wanted) // 2):
                again = run_again(measured.live[plan.held :], wanted[plan.kept :], LEAST_KEPT)
                plan = replace(plan, again=again)
                saved = plan.kept - plan.new - self.span_tokens * len(plan.removed)
                plans.append((saved, entry.used, plan))
        return [plan for *_, plan in sorted(plans, key=lambda ranked: ranked[:2], reverse=True)]

    async def _branch(self, plan: Plan, tokens: int, more: int) -> Entry:
        """A copy of the plan's context, locked; the context is free again, as it was."""
        origin = plan.entry
        held = origin.held
        assert held is not None
        entry = self.store.enter(origin.owner, "conversation", origin.ttl)
        await entry.lock.acquire()
        try:
            await self.store.reserve(entry, tokens, origin.bytes + more)
            entry.held = await self.scheduler.run(lambda: self.engine.fork(held))
        except BaseException:
            await self.background.surely(self._release(entry, None))
            raise
        entry.reading, entry.prompt, entry.measured = origin.reading, origin.prompt, origin.measured
        entry.source, entry.origin = origin.source, origin.id
        origin.lock.release()
        self.background.start(self._let_copies_go(entry, origin))
        return entry

    async def _let_copies_go(self, entry: Entry, origin: Entry) -> None:
        """Of a context that is copied again, let its origin and its copies that served once go: they would pile up."""
        for other in self.store.of(entry.owner, "conversation"):
            related = other.id == origin.origin or (other.origin == origin.id and other.revision == 1)
            if related and other is not entry and other.used < origin.used and not other.lock.locked():
                await self.store.remove(other)

    # On the owner thread

    def _edit(self, entry: Entry, plan: Plan, asked: _Asked) -> Callable[[], tuple[list[Receipt], int]]:
        """Work that truncates, erases, and appends what is new; it returns receipts and how many tokens were kept."""
        held, erasing = entry.held, asked.erasing
        assert held is not None

        def edit() -> tuple[list[Receipt], int]:
            transcript, receipts, kept = held.transcript, list[Receipt](), plan.kept
            places = [place for place, live in enumerate(transcript.live) if live]
            if plan.held < len(places):
                self.engine.truncate(held, places[plan.held - 1] + 1)
            if plan.removed:
                changes = _changes(plan, places, asked.reading)
                try:
                    receipts.append(self.engine.edit(held, changes, asked.method, erasing.max_kl, undoable=False))
                except KVEraserError:
                    if erasing.method is not None or erasing.max_kl is not None:
                        raise
                    # The server's own way of erasing can't serve this: run again from the first difference.
                    kept = plan.found.prefix
                    if not kept:
                        raise _Unusable from None
                    self.engine.truncate(held, places[kept - 1] + 1)
            left = [token for token, live in zip(transcript.tokens, transcript.live, strict=True) if live]
            if not np.array_equal(np.array(left, dtype=np.int32), asked.wanted[:kept]):
                raise _Unusable
            try:
                self.engine.append(held, asked.reading.rest(kept))
            except ContextLengthError:
                # Holes that methods left count as positions; without them the request fits.
                raise _Unusable from None
            return receipts, kept

        return edit

    # Afterwards

    async def _release(self, entry: Entry, reading: Reading | None) -> None:
        """Account for what a request left and free the context; what has not run of it is forgotten."""
        held = entry.held

        def tidy() -> bool:
            assert held is not None
            self.engine.forget_undo(held, 0)
            if held.pending > 1:
                places = [place for place, live in enumerate(held.transcript.live) if live]
                if held.pending >= len(places):
                    return False
                self.engine.truncate(held, places[-held.pending])
            return True

        try:
            usable = held is not None and await self.scheduler.run(tidy, always=True)
            if not usable:
                await self.store.remove(entry)
                return
            await self.store.settle(entry)
            if reading is not None:
                entry.reading, entry.prompt = reading, min(len(reading.wanted), entry.measured.live_tokens)
            if entry.exact_wanted and not entry.measured.exact:
                await self._make_exact(entry)
        except BaseException:
            await self.store.remove(entry)
            raise
        finally:
            entry.reserved = 0
            entry.lock.release()
        await self._keep_count(entry.owner)

    async def _keep_count(self, owner: str) -> None:
        """Let the owner's conversations go that were used longest ago, beyond how many are kept."""
        kept = self.store.of(owner, "conversation")
        free = sorted((entry for entry in kept if not entry.lock.locked()), key=lambda entry: entry.used)
        for entry in free[: max(0, len(kept) - self.store.limits.most_conversations)]:
            await self.store.remove(entry)

    async def _make_exact(self, entry: Entry) -> None:
        """Prefill the context's live tokens afresh in idle time; the lock is held, and free again meanwhile.

        A context that changes meanwhile keeps its cache: the request that changed it asks anew.
        """
        held, revision, loop = entry.held, entry.revision, asyncio.get_running_loop()
        assert held is not None
        copy_bytes = self.store.size(entry.measured.live_tokens)
        if self.store.bytes_held + copy_bytes > self.store.limits.memory_bytes:
            return
        entry.copy_bytes = copy_bytes
        copy = await self.scheduler.run(lambda: self.engine.exact_copy(held), always=True)

        def current() -> bool:
            return self.store.entries.get(entry.id) is entry and entry.revision == revision and entry.held is held

        def advance() -> bool:
            try:
                if current() and self.engine.prefill(copy, self.scheduler.chunk):
                    return True
            except KVEraserError:
                # The context stays as it is.
                entry.exact_wanted = False
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: self.background.start(swap()))
            return False

        async def swap() -> None:
            async with entry.lock:
                entry.copy_bytes = 0
                unneeded = copy
                with suppress(ServeError):
                    if current() and entry.exact_wanted:
                        entry.held, entry.exact_wanted, unneeded = copy, False, held
                        await self.scheduler.run(lambda: _declare_exact(copy), always=True)
                        await self.store.settle(entry)
                    await self.scheduler.run(lambda: self.engine.drop(unneeded, wipe=False), always=True)

        self.scheduler.when_idle(advance)


def _changes(plan: Plan, places: Sequence[int], reading: Reading) -> list[Change]:
    """The plan's changes of the transcript, whose live tokens are at `places`."""
    changes = []
    for number, span in enumerate(plan.removed):
        start, end = plan.inserted[number] if plan.inserted else (0, 0)
        text = reading.rest(start, end) if start < end else None
        if isinstance(span, Place):
            # Erased tokens may lie between; the text follows the last kept one.
            after = places[span.start - 1] + 1 if span.start else 0
            changes.append(Change(Place(after, after), text))
        else:
            changes.append(Change(Span(places[span.start], places[span.end - 1] + 1), text))
    return changes


class _Unusable(Exception):
    """A context turned out not to serve the request."""


def _declare_exact(held: Held) -> None:
    """The receipts of erases whose traces a fresh prefill has removed."""
    held.receipts[:] = [replace(receipt, exact=True) for receipt in held.receipts]


def _happened(
    plan: Plan, entry: Entry, receipts: Sequence[Receipt], kept: int, wanted: int, reading: Reading
) -> Happened:
    """What taking up a context came to."""
    # What the context held and the request has as well, and was run again all the same.
    again = min(max(plan.again, plan.found.kept - plan.found.new - kept), wanted - kept)
    action: Action = "append"
    if receipts:
        action = "edit" if plan.inserted else "erase"
    elif kept < min(plan.entry.prompt, wanted) - 1 or plan.found.removed:
        action = "recompute" if again else "prefix"
    documents: tuple[dict[str, Any], ...] = tuple(receipt.to_json() for receipt in receipts)
    return Happened(
        action=action,
        context=entry.id,
        erased_tokens=sum(receipt.erased for receipt in receipts),
        recomputed_tokens=again + sum(receipt.recomputed - receipt.inserted for receipt in receipts),
        prefilled_tokens=wanted - kept - again + sum(receipt.inserted for receipt in receipts),
        receipts=documents,
        applied_edits=reading.applied,
    )
