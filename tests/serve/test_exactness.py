"""What a client did not edit is answered exactly: other conversations, full histories, templates, changed tools."""

from __future__ import annotations

from typing import Any

import pytest

from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.rendering import read_messages
from kveraser.text.template import ChatOptions
from tests.served import (
    Answered,
    chat,
    continued,
    conversation,
    leave_no_room_for_copies,
    run,
    said,
    serving,
    uncached,
)
from tests.tiny import tiny_backbone

THINKING = """{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.index0 < ns.last %}{{ message.content.split('</think>')[-1] }}
{%- else %}{{ message.content }}{%- endif %}<|im_end|>
{% endfor -%}
{%- if tools and messages[-1].role == 'user' %}<|im_start|>tools
{% for tool in tools %}{{ tool.function.name }} {{ tool.function.description }}{% endfor %}<|im_end|>
{% endif -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Drops reasoning in front of the last user turn, as Qwen3's template does; tools stand last, as in Mistral's."""


def thinking() -> TransformersEngine:
    backbone = tiny_backbone(seed=3)
    backbone.tokenizer.chat_template = THINKING
    return TransformersEngine(backbone)


def tool(name: str, seed: int) -> dict[str, Any]:
    description = said("user", 40, seed)["content"]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {}}}


def test_an_edited_cache_serves_no_other_conversation() -> None:
    async def test() -> None:
        async with serving(span_tokens=4) as service:
            messages = conversation(11)
            await chat(service, messages)
            trimmed = [*messages[:1], *messages[5:]]
            edited = await chat(service, trimmed)
            assert edited.started.what.action == "erase" and not edited.started.what.exact
            # Nothing but the system prompt and the opening of a turn in common.
            other = [messages[0], said("user", 9, 555)]
            answered = await chat(service, other)
            assert answered.started.what.exact and answered.tokens == uncached(other)
            # The conversation itself goes on from its edited cache.
            going_on = [*trimmed, {"role": "assistant", "content": edited.text}, said("user", 4, 556)]
            further = await chat(service, going_on)
            assert not further.started.what.exact
            assert further.started.cached_tokens >= edited.started.prompt_tokens
            # Put back, what was erased is run again.
            again = await chat(service, messages)
            assert again.started.what.exact and again.tokens == uncached(messages)

    run(test())


def test_only_a_client_that_allows_it_branches_off_behind_an_erase() -> None:
    cached = {}

    async def test(allowed: bool) -> None:
        async with serving(span_tokens=4) as service:
            messages = conversation(11)
            await chat(service, messages)
            leave_no_room_for_copies(service)
            trimmed = [*messages[:1], *messages[5:]]
            await chat(service, trimmed)
            branch = [*trimmed[:-1], said("user", 5, 777)]
            answered = await chat(service, branch, **({"method": "mask"} if allowed else {}))
            cached[allowed] = answered.started.cached_tokens
            assert answered.started.what.exact is not allowed
            assert allowed or answered.tokens == uncached(branch)

    for allowed in (False, True):
        run(test(allowed))
    assert cached[True] > 2 * cached[False] > 0


async def _asked(engine: TransformersEngine, service: Any, messages: list[dict[str, Any]], **asked: Any) -> Answered:
    answered = await chat(service, messages, **asked)
    if answered.started.what.exact:
        tools = asked.get("tools", ())
        wanted = read_messages(engine.tokenizer, messages, ChatOptions(tools)).wanted
        assert answered.tokens == continued(wanted)
    return answered


@pytest.mark.parametrize("allowed", [False, True])
def test_reasoning_that_a_template_drops_is_no_edit_of_the_client(allowed: bool) -> None:
    engine = thinking()
    thought = said("assistant", 60, 1)["content"]
    loop = [
        said("user", 12, 2),
        {"role": "assistant", "content": f"<think>{thought}</think>I look it up."},
        {"role": "tool", "content": said("tool", 60, 3)["content"]},
    ]

    async def test() -> None:
        async with serving(engine=engine, span_tokens=4) as service:
            first = await _asked(engine, service, loop)
            after = [*loop, {"role": "assistant", "content": first.text}, said("user", 6, 4)]
            second = await _asked(engine, service, after, **({"method": "mask"} if allowed else {}))
            assert second.started.what.exact is not allowed
            assert (second.started.what.erased_tokens > 0) is allowed

    run(test())


@pytest.mark.parametrize("left", [0, 1])
def test_tools_that_are_left_out_are_no_edit_of_the_client(left: int) -> None:
    engine, tools = thinking(), [tool("find", 5), tool("send", 6)]

    async def test() -> None:
        async with serving(engine=engine, span_tokens=4) as service:
            messages = [said("user", 30, 7)]
            first = await _asked(engine, service, messages, tools=tools)
            after = [*messages, {"role": "assistant", "content": first.text}, said("user", 60, 8)]
            second = await _asked(engine, service, after, tools=tools[:left])
            assert second.started.what.exact and second.started.what.erased_tokens == 0

    run(test())


def test_a_client_that_takes_something_out_has_it_erased_as_before() -> None:
    engine = thinking()

    async def test() -> None:
        async with serving(engine=engine, span_tokens=4) as service:
            messages = [said(role, 14, seed) for seed, role in enumerate(["user", "assistant"] * 3 + ["user"])]
            await _asked(engine, service, messages)
            second = await _asked(engine, service, [messages[0], *messages[3:]])
            assert second.started.what.action == "erase" and not second.started.what.exact

    run(test())
