"""Completions as the official client sees them."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from kveraser.serve.engine import Sampling
from kveraser.serve.types import Erasing
from tests.serve_fake import MODEL, PIECES, FakeService, client_of

pytestmark = pytest.mark.anyio

WHOLE = "".join(PIECES)


async def test_a_text_is_continued() -> None:
    service = FakeService()
    async with client_of(service) as client:
        answer = await client.completions.create(model=MODEL, prompt="It is in ", seed=3, stop=".", temperature=0.5)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (WHOLE, "stop", None)
    assert answer.object == "text_completion" and answer.usage is not None and answer.usage.total_tokens == 17
    assert (answer.model_extra or {})["kveraser"]["action"] == "append"
    turn = service.turns[0][1]
    assert turn.prompt == "It is in " and turn.messages is None and turn.erasing == Erasing()
    # As in OpenAI's API, completions are short unless asked otherwise.
    assert turn.sampling == Sampling(16, 0.5, seed=3, stop=(".",))


@pytest.mark.parametrize(
    ("given", "asked"),
    [("text", "text"), (["text"], "text"), ([5, 0, 7], (5, 0, 7)), ([[5, 6]], (5, 6))],
)
async def test_a_prompt_is_text_or_tokens(given: Any, asked: Any) -> None:
    service = FakeService()
    async with client_of(service) as client:
        await client.completions.create(model=MODEL, prompt=given, max_tokens=3)
    assert service.turns[0][1].prompt == asked and service.turns[0][1].sampling.max_tokens == 3


async def test_a_stream_says_the_same_in_pieces() -> None:
    async with client_of(FakeService()) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="a", stream=True, logprobs=1, stream_options={"include_usage": True}
        )
        *pieces, last, spent = [chunk async for chunk in stream]
        whole = await client.completions.create(model=MODEL, prompt="a", logprobs=1)
    assert [piece.choices[0].text for piece in pieces] == list(PIECES)
    assert last.choices[0].finish_reason == "stop" and (last.model_extra or {})["kveraser"]["exact"] is True
    assert spent.usage is not None and spent.usage.completion_tokens == 5
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == list(PIECES) and logprobs.token_logprobs == [-0.5] * 5
    offsets = logprobs.text_offset or []
    assert [WHOLE[offset:].startswith(piece) for offset, piece in zip(offsets, PIECES, strict=True)] == [True] * 5
    assert logprobs.top_logprobs == [{piece: -0.5} for piece in PIECES]
    streamed = [piece.choices[0].logprobs for piece in pieces]
    assert [offset for one in streamed if one is not None for offset in one.text_offset or []] == offsets


async def test_logprobs_of_the_chosen_tokens_alone() -> None:
    async with client_of(FakeService()) as client:
        answer = await client.completions.create(model=MODEL, prompt="a", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == list(PIECES) and logprobs.top_logprobs is None


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", "b"]}, "prompt", "2 prompts"),
        ({"prompt": [1, -2]}, "prompt.1", "greater than or equal to 0"),
        ({"prompt": [1, 2**70]}, "prompt.1", "less than or equal"),
        ({"prompt": "a", "echo": True}, "echo", "not echoed"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "can't be inserted"),
        ({"prompt": "a", "best_of": 3}, "best_of", "one answer"),
        ({"prompt": "a", "logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"prompt": "a", "extra_body": {"tools": []}}, "tools", "no such field"),
    ],
)
async def test_a_wrong_request_is_refused_with_the_field(request_: Any, param: str, message: str) -> None:
    service = FakeService()
    async with client_of(service) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(**{"model": MODEL} | request_)
    body: Any = refused.value.body
    assert body["param"] == param and message in body["message"] and not service.turns
