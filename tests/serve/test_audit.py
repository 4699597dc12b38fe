"""Random scripts of requests: whenever a reply says exact, the states that answered equal a fresh prefill's."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.rendering import read_messages
from kveraser.serve.service import Service
from kveraser.serve.types import Finished, Started, Turn
from kveraser.text.template import ChatOptions
from tests.serve.test_exactness import thinking, tool
from tests.served import GREEDY, run, said, serving

SCRIPTS = int(os.environ.get("KVERASER_AUDIT_SCRIPTS", "500"))
REQUESTS = 3
TOLERANCE = 1e-4

Conversation = list[dict[str, Any]]


def history(dice: random.Random) -> Conversation:
    roles = ["user", "assistant", "user", "assistant", "user"]
    system = [said("system", 3, dice.randrange(2))]
    return [*system, *(said(role, dice.randint(1, 3), dice.randrange(40)) for role in roles)]


def changed(dice: random.Random, messages: Conversation, answer: str) -> tuple[str, Conversation]:
    """What a client might send next, and what kind of request it is."""
    following = [*messages, {"role": "assistant", "content": answer}, said("user", 2, dice.randrange(40))]
    at = dice.randrange(1, len(messages) - 1)
    kinds: dict[str, Conversation] = {
        "next": following,
        "trimmed answer": [*messages, {"role": "assistant", "content": answer.strip()[:-1]}, following[-1]],
        "again": messages,
        "edit": [*messages[:at], *messages[at + 1 :], *following[len(messages) :]],
        "placeholder": [*messages[:at], {**messages[at], "content": "[gone]"}, *messages[at + 1 :]],
        "side": [messages[0], *messages[2:], said("user", 2, 50)],
        "branch": [*messages[:at], said("user", 2, 60)],
        "reasoning": [
            *messages,
            {"role": "assistant", "content": f"<think>{said('assistant', 3, 7)['content']}</think>{answer}"},
            said("user", 2, 8),
        ],
        "new": [messages[0], said("user", 2, dice.randrange(40))],
    }  # fmt: skip
    kind = dice.choice(list(kinds))
    return kind, kinds[kind]


async def audited(engine: TransformersEngine, service: Service, turn: Turn) -> tuple[Started, str]:
    """A reply; if it says exact, its context's states are those of its prompt and answer read at once."""
    events = [event async for event in service.generate("ada", turn)]
    started, finished = events[0], events[-1]
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert finished.what.exact is started.what.exact
    if started.what.exact:
        held: Any = service.store.entries[started.what.context].held
        live = [token for token, kept in zip(held.transcript.tokens, held.transcript.live, strict=True) if kept]
        wanted = list(read_messages(engine.tokenizer, turn.messages or (), turn.options).wanted)
        assert live[: len(wanted)] == wanted, "the context does not hold what was asked"
        cache = held.cache
        assert len(wanted) - 1 <= cache.length <= len(live)
        fresh = engine.backbone.prefill(live[: cache.length])
        assert torch.equal(cache.positions, fresh.positions)
        for mine, its in zip(cache.read(0, cache.length), fresh.read(0, cache.length), strict=True):
            for one, other in zip(mine, its, strict=True):
                assert float((one - other).abs().max()) < TOLERANCE
    return started, "".join(getattr(event, "text", "") for event in events[1:-1])


async def script(seed: int, engine: TransformersEngine, counts: Counter[str]) -> None:
    dice = random.Random(seed)
    tools = [tool("find", 5), tool("send", 6)]
    for one in tools:
        one["function"]["description"] = one["function"]["description"][:30]
    async with serving(engine=engine, span_tokens=4, method=dice.choice(["mask", "repair(4)"])) as service:
        messages, answer, given = history(dice), "", tools[: dice.randrange(3)]
        stopped = False
        for number in range(REQUESTS):
            kind = "first"
            if number:
                kind, messages = changed(dice, messages, answer)
                if dice.random() < 0.2:
                    given = tools[: dice.randrange(3)]
                if seed % 2 and number == 1:
                    # Half of the servers have little room for copies.
                    store = service.store
                    store.limits = replace(store.limits, memory_bytes=int(2.2 * store.bytes_held) + store.size(400))
                if len(messages) < 3:
                    messages = [*messages, said("assistant", 1, 3), said("user", 2, 4)]
            stop = dice.choice([(), (), ("e",), ("a", " ")])
            sampling = replace(GREEDY, max_tokens=dice.choice([1, 3]), stop=stop)
            turn = Turn(messages=tuple(messages), options=ChatOptions(tuple(given)), sampling=sampling)
            try:
                started, answer = await audited(engine, service, turn)
            except AssertionError as error:
                raise AssertionError(f"script {seed}, request {number} ({kind}): {error}") from error
            exact = started.what.exact
            reused = exact and started.cached_tokens > 0
            counts[f"{kind}, exact, reused"] += reused
            counts["stopped, exact, reused"] += reused and stopped
            stopped = bool(stop)
            counts["exact"] += exact
            counts["exact, reused"] += reused
            counts["approximate"] += not exact


@pytest.mark.parametrize("part", range(5))
def test_what_says_exact_is_exact(part: int) -> None:
    engine, counts = thinking(), Counter[str]()

    async def test() -> None:
        for seed in range(part, SCRIPTS, 5):
            await script(seed, engine, counts)

    run(test())
    answered = SCRIPTS // 5 * REQUESTS
    assert counts["exact"] + counts["approximate"] >= answered
    # Neither all afresh nor all approximate.
    assert counts["exact, reused"] > answered // 4, counts
    assert counts["approximate"] > answered // 20, counts
    # Truncated and trimmed answers, regenerated ones, and answers behind a stop text were among the exact ones.
    for kind in ("trimmed answer", "again", "next", "stopped"):
        assert counts[f"{kind}, exact, reused"] > 0, (kind, counts)
