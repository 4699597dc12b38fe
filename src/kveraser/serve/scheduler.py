"""The engine's owner thread: it takes turns between requests, so that all get on and none waits for a whole other one.

A turn is what was asked for between turns (for a short while), a chunk of one prefill, and one decode step of all
running streams together. A long work, such as an audit, lets the others have their turn between two of its passes.
Requests talk to it from asyncio; nothing else may touch the engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kveraser.serve.engine import Engine, Held, Sampling, Step, Stream
from kveraser.serve.errors import Overloaded

T = TypeVar("T")

WORK_SECONDS = 0.05
"""How long short works may keep running streams waiting; at least one runs every turn."""

SMOOTHING = 0.1
"""The weight of the last turn in the mean by which clients are told when to come back."""


class _Reply:
    """A future of asyncio that the owner thread answers; an answer nobody waits for any more is dropped."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def answer(self, value: Any) -> None:
        self._settle(lambda: self.future.set_result(value))

    def fail(self, error: BaseException) -> None:
        # A future takes no StopIteration, and its caller would wait for ever.
        told = RuntimeError("the work raised StopIteration") if isinstance(error, StopIteration) else error
        self._settle(lambda: self.future.set_exception(told))

    def _settle(self, settle: Callable[[], None]) -> None:
        def once() -> None:
            if not self.future.done():
                settle()

        # The loop may be closed: its requests are gone then.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(once)


@dataclass(eq=False)
class _Work:
    work: Callable[[], Any]
    reply: _Reply


@dataclass(eq=False)
class _Prefill:
    held: Held
    reply: _Reply
    cancelled: bool = False


@dataclass(eq=False)
class _Answer:
    """A decode request: first it waits, then it is a stream; `ended` is answered when the context is free again."""

    held: Held
    sampling: Sampling
    keep: bool
    steps: asyncio.Queue[Step | BaseException]
    ended: _Reply
    cancelled: bool = False
    stream: Stream | None = field(default=None, init=False)

    def tell(self, step: Step | BaseException) -> None:
        with suppress(RuntimeError):
            self.ended.loop.call_soon_threadsafe(self.steps.put_nowait, step)


class Scheduler:
    """One owner thread over an engine. Made and closed anywhere; the other methods are called from asyncio.

    Args:
        chunk: most tokens of a prefill that run in one turn.
        most_streams: answers that are decoded at once; further ones wait.
        most_waiting: jobs that may wait; further ones are refused.

    Attributes:
        turn_seconds: a running mean of how long a turn takes.
    """

    def __init__(self, engine: Engine, *, chunk: int = 128, most_streams: int = 32, most_waiting: int = 64) -> None:
        self.engine = engine
        self.chunk, self.most_streams, self.most_waiting = chunk, most_streams, most_waiting
        self.turn_seconds = 0.0
        self._changed = threading.Condition()
        self._works: deque[_Work] = deque()
        self._prefills: deque[_Prefill] = deque()
        self._answers: deque[_Answer] = deque()
        self._running: list[_Answer] = []
        self._idle: deque[Callable[[], bool]] = deque()
        self._closing = self._advancing = False
        engine.share_time(self._share, chunk)
        self._thread = threading.Thread(target=self._run, name="kveraser-engine", daemon=True)
        self._thread.start()

    # From asyncio

    @property
    def streams(self) -> int:
        """Answers that are being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn: works, prefills, and answers that have not begun."""
        return len(self._works) + len(self._prefills) + len(self._answers)

    async def run(self, work: Callable[[], T], *, always: bool = False) -> T:
        """Run `work` on the owner thread between turns and return what it returns; exceptions come back.

        Cancelled before it begins, it never runs; once begun it runs to its end.

        Args:
            always: what ends a request, such as letting its context go: never refused for too many waiting, and run
                even when the caller is cancelled.

        Raises:
            Overloaded: too many jobs wait, or the scheduler is closed.
        """
        job = _Work(work, _Reply())
        self._enter(self._works, job, always)
        try:
            result: T = await job.reply.future
            return result
        finally:
            if not always:
                self._leave(self._works, job)

    async def prefill(self, held: Held) -> None:
        """Run a context's pending tokens, all but the last, in chunks that take turns with everything else.

        Cancelled, it stops after the chunk that runs; the context keeps what ran.

        Raises:
            Overloaded: too many jobs wait, or the scheduler is closed.
        """
        job = _Prefill(held, _Reply())
        self._enter(self._prefills, job)
        try:
            await job.reply.future
        finally:
            job.cancelled = True
            self._leave(self._prefills, job)

    async def decode(self, held: Held, sampling: Sampling, keep: bool) -> AsyncGenerator[Step, None]:
        """Decode an answer, a step at a time. Closing or cancelling it ends the answer there.

        However it ends, the context is free when this returns or raises: kept, the answer's tokens are part of it,
        those so far when it was closed early; after an error it is as before.

        Raises:
            Overloaded: too many jobs wait, or the scheduler is closed.
        """
        answer = _Answer(held, sampling, keep, asyncio.Queue(), _Reply())
        self._enter(self._answers, answer)
        try:
            while True:
                step = await answer.steps.get()
                if isinstance(step, BaseException):
                    raise step
                yield step
                if step.finish_reason is not None:
                    return
        finally:
            answer.cancelled = True
            if not self._leave(self._answers, answer):
                # The caller may use the context next: a cancelled one still waits for the step that runs.
                await _surely(answer.ended.future)

    def when_idle(self, work: Callable[[], bool]) -> None:
        """Call `work` on the owner thread while nothing else waits or runs, again and again as long as it returns True.

        Several take turns. One that raises is dropped, which is logged. Any thread may call this.
        """
        with self._changed:
            self._idle.append(work)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the turn that runs: streams are ended as if they were cancelled, everything else is refused."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _enter(self, queue: deque[Any], job: Any, always: bool = False) -> None:
        with self._changed:
            if self._closing:
                raise _closed()
            if self.waiting >= self.most_waiting and not always:
                wait = max(1.0, round(self.turn_seconds * self.waiting, 1))
                raise Overloaded(
                    f"{self.waiting} jobs wait already, the server takes {self.most_waiting}: "
                    f"try again in {wait:g} seconds",
                    retry_after=wait,
                )
            queue.append(job)
            self._changed.notify()

    def _leave(self, queue: deque[Any], job: Any) -> bool:
        """Take a job back that nobody waits for any more; False: its turn has come already."""
        with self._changed:
            if waits := job in queue:
                queue.remove(job)
            return waits

    # On the owner thread

    def _run(self) -> None:
        while (turn := self._next()) is not None:
            turn()
        self._refuse_all()

    def _next(self) -> Callable[[], None] | None:
        """Wait until there is something to do, and say what; None: the scheduler is closed."""
        with self._changed:
            while True:
                if self._closing:
                    return None
                if self.waiting or self._running:
                    return self._turn
                if self._idle:
                    return self._rest
                self._changed.wait()

    def _take(self, queue: deque[T]) -> T | None:
        """The next job of a queue, which its caller can't take back any more."""
        with self._changed:
            return queue.popleft() if queue else None

    def _turn(self) -> None:
        started = time.monotonic()
        self._end_cancelled()
        self._work(until=started + WORK_SECONDS)
        self._advance()
        self.turn_seconds += SMOOTHING * (time.monotonic() - started - self.turn_seconds)

    def _share(self) -> None:
        """A turn of all others, between two passes of a work. Contexts that works use have no jobs of their own."""
        if not self._advancing and threading.current_thread() is self._thread:
            self._end_cancelled()
            self._advance()

    def _end_cancelled(self) -> None:
        for answer in [answer for answer in self._running if answer.cancelled]:
            self._end(answer)

    def _advance(self) -> None:
        """A chunk of a prefill, and a step of all streams."""
        self._advancing = True
        self._prefill_chunk()
        while len(self._running) < self.most_streams and (begun := self._take(self._answers)) is not None:
            self._begin(begun)
        if self._running:
            self._decode_step(list(self._running))
        self._advancing = False

    def _work(self, until: float) -> None:
        while (job := self._take(self._works)) is not None:
            try:
                job.reply.answer(job.work())
            except BaseException as error:
                job.reply.fail(error)
            if time.monotonic() >= until:
                return

    def _prefill_chunk(self) -> None:
        job = self._take(self._prefills)
        if job is None:
            return
        try:
            left = self.engine.prefill(job.held, self.chunk)
        except BaseException as error:
            job.reply.fail(error)
            return
        if not left:
            job.reply.answer(None)
            return
        with self._changed:
            if not job.cancelled:
                self._prefills.append(job)

    def _begin(self, answer: _Answer) -> None:
        try:
            answer.stream = self.engine.begin(answer.held, answer.sampling)
        except BaseException as error:
            answer.tell(error)
            answer.ended.answer(None)
            return
        self._running.append(answer)

    def _decode_step(self, answers: list[_Answer]) -> None:
        try:
            steps = self.engine.step([answer.stream for answer in answers if answer.stream is not None])
        except BaseException as error:
            # An engine that fails has moved none of them: alone, those that can go on do.
            if len(answers) > 1:
                for answer in answers:
                    self._decode_step([answer])
            else:
                self._end(answers[0], error)
            return
        for answer, step in zip(answers, steps, strict=True):
            if step.finish_reason is None:
                answer.tell(step)
            else:
                self._end(answer, step)

    def _end(self, answer: _Answer, last: Step | BaseException | None = None) -> None:
        """Take a stream out; its consumer hears `last` when the context is free."""
        self._running.remove(answer)
        assert answer.stream is not None
        try:
            self.engine.finish(answer.stream, answer.keep and not isinstance(last, BaseException))
        except BaseException as error:
            last = error
        if last is not None:
            answer.tell(last)
        answer.ended.answer(None)

    def _rest(self) -> None:
        """One call of one idle work."""
        work = self._idle.popleft()
        try:
            again = work()
        except Exception as error:
            # Its message may quote a context, which no log shows.
            logging.getLogger(__name__).error("idle work failed: %s", type(error).__name__)
            return
        if again:
            self._idle.append(work)

    def _refuse_all(self) -> None:
        for answer in list(self._running):
            self._end(answer, None)
            answer.tell(_closed())
        with self._changed:
            jobs: list[_Work | _Prefill] = [*self._works, *self._prefills]
            answers = [*self._answers]
            for queue in (self._works, self._prefills, self._answers, self._idle):
                queue.clear()
        for job in jobs:
            job.reply.fail(_closed())
        for answer in answers:
            answer.tell(_closed())
            answer.ended.answer(None)


async def _surely(future: asyncio.Future[None]) -> None:
    """Wait for `future` however often the waiting is cancelled; then it is."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


def _closed() -> Overloaded:
    return Overloaded("the server is shutting down: try again later", code="shutting_down", retry_after=10.0)
