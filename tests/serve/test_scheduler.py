"""The owner thread takes turns: who runs when, what cancelling leaves, and that nobody is told nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from kveraser.model.backbone import Backbone
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Sampling, Step, TokenLogprob
from kveraser.serve.errors import Overloaded
from kveraser.serve.scheduler import Scheduler
from tests.engines import alone, contexts, finished, read, words

GREEDY = Sampling(temperature=0.0)


@dataclass
class Context:
    """A context as the scheduler knows it: a name, and how many chunks its prefill takes."""

    name: str
    chunks: int = 0
    kept: list[bool] = field(default_factory=list)


@dataclass
class Answer:
    held: Context
    left: int
    tokens: list[int] = field(default_factory=list)


class Recording:
    """An engine that writes down what it is asked; answers have `max_tokens` tokens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.broken: set[str] = set()
        self.during_step: Callable[[], None] = lambda: None
        self.between: Callable[[], None] = lambda: None
        self.chunk = 0

    def note(self, what: str) -> None:
        self.log.append(what)
        self.threads.add(threading.get_ident())

    def share_time(self, between: Callable[[], None], chunk: int) -> None:
        self.between, self.chunk = between, chunk

    def prefill(self, held: Context, most: int) -> int:
        self.note(f"prefill {held.name}")
        if held.name in self.broken:
            raise ValueError(held.name)
        held.chunks -= 1
        return held.chunks

    def begin(self, held: Context, sampling: Sampling) -> Answer:
        self.note(f"begin {held.name}")
        if "begin" in self.broken:
            raise ValueError(held.name)
        return Answer(held, sampling.max_tokens or 0)

    def step(self, answers: list[Answer]) -> list[Step]:
        self.note("step " + " ".join(answer.held.name for answer in answers))
        self.during_step()
        if self.broken & {answer.held.name for answer in answers}:
            raise ValueError("broken")
        steps = []
        for answer in answers:
            answer.tokens.append(len(answer.tokens))
            ended = len(answer.tokens) == answer.left
            said = (TokenLogprob(answer.tokens[-1], 0.0),)
            steps.append(Step(f"{answer.held.name}{answer.tokens[-1]} ", said, "length" if ended else None))
        return steps

    def finish(self, answer: Answer, keep: bool) -> None:
        self.note(f"finish {answer.held.name}")
        answer.held.kept.append(keep)
        if "finish" in self.broken:
            raise ValueError("finish")


@pytest.fixture
def engine() -> Recording:
    return Recording()


def scheduled(engine: Any, test: Callable[[Scheduler], Awaitable[None]], **limits: int) -> None:
    """Run a test with a scheduler, which is closed afterwards; one that hangs fails."""
    scheduler = Scheduler(engine, **limits)
    try:
        asyncio.run(asyncio.wait_for(test(scheduler), 60))
    finally:
        scheduler.close()


@asynccontextmanager
async def held_up(scheduler: Scheduler) -> AsyncIterator[None]:
    """Inside, the owner thread is busy with a work of its own; what is asked for meanwhile waits."""
    entered, released = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> None:
        loop.call_soon_threadsafe(entered.set)
        released.wait(60)

    task = asyncio.create_task(scheduler.run(wait))
    await entered.wait()
    try:
        yield
    finally:
        released.set()
        await task


def answered(scheduler: Scheduler, held: Context, tokens: int, keep: bool = False) -> asyncio.Task[str]:
    """A task that reads a whole answer's text."""

    async def read() -> str:
        async with aclosing(scheduler.decode(held, Sampling(max_tokens=tokens), keep)) as steps:  # type: ignore[arg-type]
            return "".join([step.text async for step in steps])

    return asyncio.create_task(read())


async def settled() -> None:
    """Let tasks run up to where they wait."""
    for _ in range(5):
        await asyncio.sleep(0)


# Turns


def test_work_runs_on_one_other_thread_and_comes_back(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        threads = {await scheduler.run(threading.get_ident) for _ in range(5)}
        assert len(threads) == 1 and threading.get_ident() not in threads
        for error in (ValueError("no"), StopIteration(), KeyboardInterrupt()):

            def fail(error: BaseException = error) -> None:
                raise error

            with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
                await scheduler.run(fail)
        await scheduler.prefill(Context("a", 2))  # type: ignore[arg-type]
        assert await answered(scheduler, Context("b"), 2) == "b0 b1 "
        assert engine.threads == threads

    scheduled(engine, test)


def test_a_turn_is_a_chunk_of_one_prefill_and_a_step_of_all_streams(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        async with held_up(scheduler):
            tasks = [
                answered(scheduler, Context("a"), 4), answered(scheduler, Context("b"), 2),
                asyncio.create_task(scheduler.prefill(Context("long", 3))),  # type: ignore[arg-type]
                asyncio.create_task(scheduler.prefill(Context("other", 2))),  # type: ignore[arg-type]
            ]  # fmt: skip
            await settled()
            assert (scheduler.waiting, scheduler.streams) == (4, 0)
        assert await tasks[0] == "a0 a1 a2 a3 "
        await asyncio.gather(*tasks)
        assert engine.log == [
            "prefill long", "begin a", "begin b", "step a b",
            "prefill other", "step a b", "finish b",
            "prefill long", "step a",
            "prefill other", "step a", "finish a",
            "prefill long",
        ]  # fmt: skip
        assert (scheduler.waiting, scheduler.streams) == (0, 0)

    scheduled(engine, test)


def test_only_so_many_streams_run_at_once(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        async with held_up(scheduler):
            tasks = [answered(scheduler, Context(name), count) for name, count in (("a", 3), ("b", 1), ("c", 1))]
            await settled()
        await asyncio.gather(*tasks)
        steps = [line for line in engine.log if line.startswith("step")]
        assert steps == ["step a b", "step a c", "step a"]

    scheduled(engine, test, most_streams=2)


def test_short_works_go_between_the_steps_of_a_stream(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        async with aclosing(scheduler.decode(Context("a"), Sampling(max_tokens=1000), False)) as steps:  # type: ignore[arg-type]
            await anext(steps)
            before = len(engine.log)
            await scheduler.run(lambda: engine.note("work"))
            await anext(steps)
            assert "work" in engine.log[before:]

    scheduled(engine, test)


# Ends


def test_closing_an_answer_ends_it_and_frees_the_context(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        for keep in (True, False):
            held = Context("a")
            steps = scheduler.decode(held, Sampling(max_tokens=10**9), keep)  # type: ignore[arg-type]
            assert (await anext(steps)).text == "a0 "
            await steps.aclose()
            assert held.kept == [keep] and engine.log[-1] == "finish a"
            assert await scheduler.run(lambda: scheduler.streams) == 0

    scheduled(engine, test)


def test_a_cancelled_task_leaves_its_context_free(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        held, begun = Context("a"), threading.Event()
        engine.during_step = begun.set
        task = answered(scheduler, held, 10**9, keep=True)
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.kept == [True] and engine.log[-1] == "finish a"

    scheduled(engine, test)


def test_a_task_that_is_cancelled_again_still_waits_for_its_context(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        held, begun, go_on = Context("a"), threading.Event(), threading.Event()

        def pause() -> None:
            begun.set()
            go_on.wait(60)

        engine.during_step = pause
        task = answered(scheduler, held, 10**9, keep=True)
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(3):
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done() and held.kept == []
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held.kept == [True] and engine.log[-1] == "finish a"

    scheduled(engine, test)


def test_what_is_cancelled_while_it_waits_never_runs(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        done: list[str] = []
        async with held_up(scheduler):
            tasks: list[asyncio.Task[Any]] = [
                answered(scheduler, Context("a"), 3),
                asyncio.create_task(scheduler.prefill(Context("b", 3))),  # type: ignore[arg-type]
                asyncio.create_task(scheduler.run(lambda: done.append("cancelled"))),
                asyncio.create_task(scheduler.run(lambda: done.append("always"), always=True)),
            ]
            await settled()
            for task in tasks:
                task.cancel()
            await settled()
        await asyncio.gather(*tasks, return_exceptions=True)
        await scheduler.run(lambda: None)
        assert all(task.cancelled() for task in tasks)
        assert engine.log == [] and done == ["always"] and scheduler.waiting == 0

    scheduled(engine, test)


def test_a_cancelled_prefill_stops_after_its_chunk(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        held = Context("long", 10**9)
        task = asyncio.create_task(scheduler.prefill(held))  # type: ignore[arg-type]
        while not engine.log:
            await scheduler.run(lambda: None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await scheduler.run(lambda: None)
        ran = len(engine.log)
        for _ in range(3):
            await scheduler.run(lambda: None)
        assert len(engine.log) == ran and scheduler.waiting == 0

    scheduled(engine, test)


def test_a_failing_stream_fails_alone(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        held = {name: Context(name) for name in "abc"}
        engine.broken = {"b"}
        async with held_up(scheduler):
            tasks = {name: answered(scheduler, context, 3, keep=True) for name, context in held.items()}
            await settled()
        results = dict(zip(tasks, await asyncio.gather(*tasks.values(), return_exceptions=True), strict=True))
        assert results["a"] == "a0 a1 a2 " and results["c"] == "c0 c1 c2 "
        assert isinstance(results["b"], ValueError)
        assert [held[name].kept for name in "abc"] == [[True], [False], [True]]

    scheduled(engine, test)


@pytest.mark.parametrize("where", ["begin", "finish", "a"])
def test_errors_of_the_engine_come_back(engine: Recording, where: str) -> None:
    async def test(scheduler: Scheduler) -> None:
        engine.broken = {where}
        with pytest.raises(ValueError, match=r"^(a|broken|finish)$"):
            await answered(scheduler, Context("a"), 2)
        if where == "a":
            with pytest.raises(ValueError, match="a"):
                await scheduler.prefill(Context("a", 3))  # type: ignore[arg-type]
        engine.broken = set()
        assert await answered(scheduler, Context("b"), 1) == "b0 "

    scheduled(engine, test)


# Too much, and nothing


def test_more_than_may_wait_is_refused(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        done: list[str] = []
        async with held_up(scheduler):
            tasks: list[asyncio.Task[Any]] = [
                answered(scheduler, Context("a"), 1),
                asyncio.create_task(scheduler.prefill(Context("b", 1))),  # type: ignore[arg-type]
            ]
            await settled()
            for refused in (
                scheduler.run(lambda: done.append("refused")),
                scheduler.prefill(Context("c", 1)),  # type: ignore[arg-type]
                anext(scheduler.decode(Context("c"), GREEDY, False)),  # type: ignore[arg-type]
            ):
                with pytest.raises(Overloaded, match="2 jobs wait") as caught:
                    await refused
                assert caught.value.retry_after is not None and caught.value.retry_after >= 1
            tasks.append(asyncio.create_task(scheduler.run(lambda: done.append("always"), always=True)))
            await settled()
        await asyncio.gather(*tasks)
        assert done == ["always"] and not any(line.endswith(" c") for line in engine.log)
        await scheduler.prefill(Context("c", 1))  # type: ignore[arg-type]

    scheduled(engine, test, most_waiting=2)


def test_idle_work_runs_when_nothing_else_does(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        counts = {"one": 3, "two": 2}
        finished = asyncio.Event()
        loop = asyncio.get_running_loop()

        def idle(name: str) -> Callable[[], bool]:
            def work() -> bool:
                engine.note(name)
                counts[name] -= 1
                if not any(counts.values()):
                    loop.call_soon_threadsafe(finished.set)
                return counts[name] > 0

            return work

        def broken() -> bool:
            raise ValueError

        async with held_up(scheduler):
            scheduler.when_idle(broken)
            scheduler.when_idle(idle("one"))
            scheduler.when_idle(idle("two"))
            tasks = [answered(scheduler, Context("a"), 3), asyncio.create_task(scheduler.prefill(Context("b", 2)))]  # type: ignore[arg-type]
            await settled()
        await asyncio.gather(*tasks)
        await finished.wait()
        assert engine.log[-5:] == ["one", "two", "one", "two", "one"]
        assert engine.log.index("one") > engine.log.index("finish a")

    scheduled(engine, test)


def test_a_scheduler_with_nothing_to_do_does_nothing(engine: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    own = Scheduler._next
    monkeypatch.setattr(Scheduler, "_next", lambda self: (rounds.append(1), own(self))[1])

    async def test(scheduler: Scheduler) -> None:
        scheduler.when_idle(lambda: False)
        assert await answered(scheduler, Context("a"), 3) == "a0 a1 a2 "
        for _ in range(10):
            await scheduler.run(lambda: None)
            # Time in which a busy loop would go round many times.
            for _ in range(200):
                await asyncio.sleep(0)
        assert len(rounds) < 40

    scheduled(engine, test)


def test_a_long_work_lets_the_others_have_their_turns(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        assert engine.chunk == scheduler.chunk
        first = answered(scheduler, Context("a"), 3)
        prefill = asyncio.create_task(scheduler.prefill(Context("c", 2)))  # type: ignore[arg-type]
        await settled()

        def long() -> list[str]:
            begun = len(engine.log)
            for _ in range(6):
                engine.between()
                # What uses the model meanwhile is not interrupted in turn.
            return engine.log[begun:]

        async with held_up(scheduler):
            second = answered(scheduler, Context("b"), 2)
            work = asyncio.create_task(scheduler.run(long))
            await settled()
        during = await work
        assert await first == "a0 a1 a2 " and await second == "b0 b1 "
        await prefill
        # Guard: the streams went on inside the work, together, and ended there.
        assert any(line.startswith("step") and line.endswith(" b") for line in during) and "finish b" in during
        # From another thread nobody gets a turn.
        before = list(engine.log)
        await asyncio.to_thread(engine.between)
        assert engine.log == before

    scheduled(engine, test)


def test_nobody_interrupts_who_interrupts(engine: Recording) -> None:
    async def test(scheduler: Scheduler) -> None:
        depth = 0

        def step() -> None:
            nonlocal depth
            depth += 1
            assert depth == 1
            engine.between()
            depth -= 1

        engine.during_step = step
        async with held_up(scheduler):
            said = answered(scheduler, Context("a"), 2)
            work = asyncio.create_task(scheduler.run(lambda: engine.between()))
            await settled()
        await work
        assert await said == "a0 a1 "

    scheduled(engine, test)


def test_closing_tells_everybody_and_frees_every_context(engine: Recording) -> None:
    scheduler = Scheduler(engine)  # type: ignore[arg-type]

    async def test() -> None:
        running, waiting = Context("a"), Context("b")
        begun = threading.Event()
        engine.during_step = begun.set
        first = answered(scheduler, running, 10**9, keep=True)
        await asyncio.to_thread(begun.wait, 60)
        async with held_up(scheduler):
            tasks: list[asyncio.Task[Any]] = [
                first, answered(scheduler, waiting, 3),
                asyncio.create_task(scheduler.prefill(Context("c", 10**9))),  # type: ignore[arg-type]
            ]  # fmt: skip
            await settled()
            closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
            while not scheduler._closing:
                await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="shutting down"):
                await scheduler.run(lambda: None, always=True)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await closing
        assert all(isinstance(result, Overloaded) and result.code == "shutting_down" for result in results)
        assert running.kept == [True] and True not in waiting.kept
        scheduler.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_requests_of_a_loop_that_is_gone_harm_nobody(engine: Recording) -> None:
    scheduler = Scheduler(engine)  # type: ignore[arg-type]
    entered, released = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        released.wait(60)

    async def leave() -> None:
        task = asyncio.create_task(scheduler.run(wait, always=True))
        await asyncio.to_thread(entered.wait, 60)
        task.cancel()

    asyncio.run(leave())
    released.set()

    async def go_on() -> None:
        assert await answered(scheduler, Context("b"), 1) == "b0 "

    asyncio.run(asyncio.wait_for(go_on(), 60))
    scheduler.close()


# With the engine itself


@pytest.fixture
def threads() -> Iterator[None]:
    """The owner thread is gone after the test."""
    before = set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "kveraser-engine"]


def test_answers_are_those_decoded_alone_whatever_else_is_asked(erasing_backbone: Backbone, threads: None) -> None:
    engine = TransformersEngine(erasing_backbone)
    held = contexts(engine)
    limits = [24, 20, 16, 24, 12]
    expected = [alone(context, limit) for context, limit in zip(held, limits, strict=True)]
    late = words(300, 3)
    late_expected = alone(read(engine, late), 8)

    async def ask(scheduler: Scheduler, context: Any, limit: int) -> list[int]:
        sampling = Sampling(temperature=0.0, max_tokens=limit)
        async with aclosing(scheduler.decode(context, sampling, True)) as steps:
            return [token.token async for step in steps for token in step.tokens]

    async def test(scheduler: Scheduler) -> None:
        async def read_late() -> list[int]:
            context = await scheduler.run(lambda: engine.hold(late))
            await scheduler.prefill(context)
            return await ask(scheduler, context, 8)

        async def leave() -> None:
            context = await scheduler.run(lambda: read(engine, words(80, 8)))
            async with aclosing(scheduler.decode(context, Sampling(max_tokens=500, seed=1), False)) as steps:
                await anext(steps)

        tasks = [ask(scheduler, context, limit) for context, limit in zip(held, limits, strict=True)]
        *answers, lately, _ = await asyncio.gather(*tasks, read_late(), leave())
        assert answers == expected and lately == late_expected

    scheduled(engine, test, chunk=32)
    assert all(finished(context) for context in held)
