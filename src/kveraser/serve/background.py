"""Work that runs to its end, whether or not somebody still waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """The running tasks of a service; asyncio itself keeps none alive."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something on its own."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def surely(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for something that goes on when the waiting is cancelled."""
        task = self.start(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Nobody is there to hear what becomes of it.
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)
            raise

    async def finish(self) -> None:
        """Wait for everything that runs."""
        while self._tasks:
            # What went wrong is told to whoever waits for it; here all that counts is that it has ended.
            with suppress(Exception):
                await next(iter(self._tasks))
