"""What the tests of the service share: a tiny model that is served, and its answers without any cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Sampling
from kveraser.serve.rendering import read_messages
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.service import Service
from kveraser.serve.types import Delta, Erasing, Event, Finished, Started, Turn
from kveraser.text.template import ChatOptions
from tests.tiny import tiny_backbone

T = TypeVar("T")

GREEDY = Sampling(temperature=0.0, max_tokens=6)
METHOD = "repair(8)"
"""How the tests' servers erase: cheap, and not exact."""


@cache
def backbone() -> Backbone:
    return tiny_backbone(seed=3)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        # Later is later: what was used last is always known.
        self.now += 0.001
        return self.now


@asynccontextmanager
async def serving(
    folder: Path | None = None, engine: Any = None, chunk: int = 32, method: str | None = METHOD, **settings: Any
) -> AsyncIterator[Service]:
    """A service over a tiny model."""
    engine = engine or TransformersEngine(backbone())
    scheduler = Scheduler(engine, chunk=chunk)
    service = Service(engine, scheduler, folder=folder, method=method, **{"clock": Clock()} | settings)
    try:
        yield service
    finally:
        await service.close()


@dataclass(frozen=True)
class Answered:
    """A whole answer."""

    started: Started
    text: str
    tokens: tuple[int, ...]
    finished: Finished


async def whole(events: AsyncIterator[Event]) -> Answered:
    """An answer to its end."""
    started, *deltas, finished = [event async for event in events]
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert all(isinstance(delta, Delta) for delta in deltas)
    pieces = [delta for delta in deltas if isinstance(delta, Delta)]
    tokens = tuple(token.token for delta in pieces for token in delta.tokens)
    return Answered(started, "".join(delta.text for delta in pieces), tokens, finished)


async def chat(
    service: Service,
    messages: Sequence[Mapping[str, Any]],
    key: str = "ada",
    sampling: Sampling = GREEDY,
    edits: Sequence[Any] = (),
    dropped: Sequence[int] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    **erasing: Any,
) -> Answered:
    turn = Turn(
        messages=tuple(messages),
        options=ChatOptions(tuple(tools)),
        sampling=replace(sampling, logprobs=0),
        erasing=Erasing(**erasing),
        context_edits=tuple(edits),
        dropped=tuple(dropped),
    )
    return await whole(service.generate(key, turn))


def leave_no_room_for_copies(service: Service) -> None:
    """From now on one context of the size of the held one can be edited, and none copied."""
    store = service.store
    store.limits = replace(store.limits, memory_bytes=int(2.7 * store.bytes_held))


def uncached(messages: Sequence[Mapping[str, Any]], limit: int = 6) -> tuple[int, ...]:
    """The greedy answer to a conversation that is prefilled afresh."""
    return continued(read_messages(backbone().tokenizer, messages).wanted, limit)


def continued(tokens: Sequence[int], limit: int = 6) -> tuple[int, ...]:
    """The greedy answer to tokens that are prefilled afresh."""
    return tuple(greedy(backbone(), backbone().prefill(tokens[:-1]), [tokens[-1]], limit))


def said(role: str, size: int, seed: int) -> dict[str, Any]:
    """A message of some words, different ones for every seed."""
    words = [f"w{(seed * 7919 + place * 104729) % 9973}" for place in range(size)]
    return {"role": role, "content": " ".join(words)}


def conversation(turns: int = 6, size: int = 8) -> list[dict[str, Any]]:
    """A system prompt, then user and assistant in turn, ending with the user."""
    roles = ["user", "assistant"]
    messages = [said(roles[number % 2], size, number) for number in range(turns - 1 + turns % 2)]
    return [said("system", size, 99), *messages]
