"""Tasks that run to completion even if their caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """The background tasks of a service. It keeps references to them, which asyncio does not."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine as a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def surely(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine that keeps running if the caller is cancelled."""
        # anyio's shields do not protect from `Task.cancel`.
        task = self.start(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Retrieve the exception, or asyncio logs it.
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)
            raise

    async def finish(self) -> None:
        """Wait until all tasks have ended."""
        while self._tasks:
            # Errors are reported to the callers of `surely`.
            with suppress(Exception):
                await next(iter(self._tasks))
