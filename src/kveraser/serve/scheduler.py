"""Round-robin scheduling on the thread that owns the engine: no request blocks another for its full duration.

A turn consists of waiting short calls (up to a time limit), a chunk of one prefill, and one decode step of all running
streams. Long calls, such as audits, give turns to others between their forward passes. Requests use the scheduler from
asyncio; nothing else may call the engine.
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
"""Time limit for calls in a turn; at least one runs in every turn."""

SMOOTHING = 0.1
"""Weight of the last turn in the running mean of turn durations, from which retry times are computed."""


class _Reply:
    """An asyncio future that the owner thread completes. Results of cancelled futures are dropped."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()

    def answer(self, value: Any) -> None:
        self._settle(lambda: self.future.set_result(value))

    def fail(self, error: BaseException) -> None:
        # Futures reject StopIteration, and the caller would wait forever.
        told = RuntimeError("the work raised StopIteration") if isinstance(error, StopIteration) else error
        self._settle(lambda: self.future.set_exception(told))

    def _settle(self, settle: Callable[[], None]) -> None:
        def once() -> None:
            if not self.future.done():
                settle()

        # The loop may be closed, and its requests with it.
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
    """A decode request. It waits, then becomes a stream; `ended` completes when the context is free again."""

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
    """The thread that owns an engine. Any thread may create and close it; call other methods from asyncio.

    Args:
        chunk: maximum prefill tokens per turn.
        most_streams: maximum answers that are decoded at once; others wait.
        most_waiting: maximum waiting jobs; others are refused.

    Attributes:
        turn_seconds: running mean of the duration of a turn.
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
        """Number of answers that are being decoded."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of waiting jobs: calls, prefills, and answers that have not begun."""
        return len(self._works) + len(self._prefills) + len(self._answers)

    async def run(self, work: Callable[[], T], *, always: bool = False) -> T:
        """Run `work` on the owner thread between turns; returns its result or raises its exception.

        If cancelled before it begins, it never runs; once begun it runs to its end.

        Args:
            always: never refuse it for too many waiting jobs, and run it even if the caller is cancelled; for cleanup.

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
        """Run a context's pending tokens except the last one, one chunk per turn.

        If cancelled, it stops after the current chunk; the context keeps the tokens that were run.

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
        """Decode an answer step by step. Closing or cancelling the generator ends the answer.

        The context is free when this returns or raises. With `keep` the tokens decoded so far stay in the context;
        after an error the context is unchanged.

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
                # The caller may use the context next, so wait for the current step even if cancelled.
                await _surely(answer.ended.future)

    def when_idle(self, work: Callable[[], bool]) -> None:
        """Call `work` on the owner thread whenever it is idle, until it returns False.

        Several take turns. One that raises is logged and dropped. Any thread may call this.
        """
        with self._changed:
            self._idle.append(work)
            self._changed.notify()

    def close(self) -> None:
        """Stop after the current turn. Streams end as if cancelled, and waiting jobs are refused."""
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
        """Remove a waiting job. Returns False if it has already begun."""
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
        """Wait for the next action; None: the scheduler is closed."""
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
        """Take the next job of a queue; its caller can't cancel it afterwards."""
        with self._changed:
            return queue.popleft() if queue else None

    def _turn(self) -> None:
        started = time.monotonic()
        self._end_cancelled()
        self._work(until=started + WORK_SECONDS)
        self._advance()
        self.turn_seconds += SMOOTHING * (time.monotonic() - started - self.turn_seconds)

    def _share(self) -> None:
        """Run a turn of other jobs between two forward passes of a call, whose contexts have no other jobs."""
        if not self._advancing and threading.current_thread() is self._thread:
            self._end_cancelled()
            self._advance()

    def _end_cancelled(self) -> None:
        for answer in [answer for answer in self._running if answer.cancelled]:
            self._end(answer)

    def _advance(self) -> None:
        """Run a chunk of a prefill and a step of all streams."""
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
            # After a failure no stream has advanced: step each one alone to find those that fail.
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
        """Remove a stream; its consumer receives `last` when the context is free."""
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
        """Call one idle function."""
        work = self._idle.popleft()
        try:
            again = work()
        except Exception as error:
            # The message may quote a context, which must not be logged.
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
    """Wait for `future` to end even if cancelled, and raise CancelledError afterwards."""
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
