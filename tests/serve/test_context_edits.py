"""Context edits: what they clear of a conversation, and what they report."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kveraser.errors import InputError
from kveraser.serve.context_edits import (
    CLEARED,
    ClearThinking,
    ClearToolUses,
    InputTokens,
    Messages,
    ThinkingTurns,
    ToolUse,
    ToolUses,
    tool_uses,
    without_messages,
)
from kveraser.serve.rendering import read_messages
from kveraser.text import chat
from tests.templates import TEMPLATES, tokenizer_with
from tests.tiny import tiny_tokenizer

NAMES = ["search", "weather", "search", "notes", "search"]


def agent(results: int = 5, size: int = 30) -> list[dict[str, Any]]:
    """An agent that calls a tool, reads the result, and calls the next."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Find my parcel."}]
    for number in range(results):
        arguments = f'{{"query": "part {number} of many"}}'
        call = {"id": f"call_{number}", "type": "function", "function": {"name": NAMES[number], "arguments": arguments}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"call_{number}", "content": f"result {number}: " + "shelf " * size},
        ]
    return [*messages, {"role": "user", "content": "So where is it?"}]


def clear(keep: int = 3, above: int = 0, **fields: Any) -> ClearToolUses:
    return ClearToolUses(trigger=InputTokens(value=above), keep=ToolUses(value=keep), **fields)


def cleared(edit: ClearToolUses, messages: Messages, tokens: int = 10**6) -> list[int]:
    """Indices of the messages that the edit changes."""
    changed, _ = edit.change(messages, tokens)
    return [index for index, (one, other) in enumerate(zip(messages, changed, strict=True)) if one != other]


def test_all_but_the_last_uses_are_cleared_above_the_trigger() -> None:
    assert cleared(clear(2, above=50), agent(), 51) == [2, 4, 6]
    assert cleared(clear(2, above=50), agent(), 50) == []
    by_uses = ClearToolUses(trigger=ToolUses(value=4), keep=ToolUses(value=0))
    assert len(cleared(by_uses, agent(5), 1)) == 5 and cleared(by_uses, agent(4)) == []
    assert cleared(clear(9), agent()) == []
    assert cleared(ClearToolUses(), agent(), 100_001) == [2, 4] and cleared(ClearToolUses(), agent(), 100_000) == []


def test_excluded_tools_stay_and_count_among_the_last() -> None:
    assert cleared(clear(2, exclude_tools=["search"]), agent()) == [4]


def test_a_result_without_its_call_has_no_name_and_keeps_no_arguments() -> None:
    messages = [*agent(1), {"role": "tool", "tool_call_id": "lost", "content": "A long result."}]
    assert tool_uses(messages) == [ToolUse("search", (1, 0), 2), ToolUse(None, None, 4)]
    assert cleared(clear(0, clear_tool_inputs=True), messages) == [1, 2, 4]
    assert cleared(clear(0, clear_tool_inputs=["weather"]), agent(2)) == [2, 3, 4]


def test_what_is_shorter_than_the_placeholder_or_cleared_already_stays() -> None:
    messages = agent(2)
    messages[2]["content"] = "ok"
    changed, counts = clear(0).change(messages, 1)
    assert [changed[index]["content"] for index in (2, 4)] == ["ok", CLEARED] and counts == {"cleared_tool_uses": 1}
    assert clear(0).change(changed, 1) == (changed, {"cleared_tool_uses": 0})


@pytest.mark.parametrize("name", ["chatml", "dated", "thinking"])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("placeholder", ["", CLEARED])
def test_the_edited_conversation_is_read(name: str, inputs: bool, placeholder: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages, edit = agent(), clear(1, clear_tool_inputs=inputs, placeholder=placeholder)
    reading = read_messages(tokenizer, messages, edits=[edit])
    for index in (2, 4, 6, 8):
        messages[index]["content"] = placeholder
        if inputs:
            messages[index - 1]["tool_calls"][0]["function"]["arguments"] = "{}"
    assert list(reading.messages) == messages
    assert reading.text == chat.render(tokenizer, messages, generation_prompt=True)
    removed = len(read_messages(tokenizer, agent()).wanted) - len(reading.wanted)
    assert removed > 4 * 30
    assert reading.applied == (
        {"type": "clear_tool_uses_20250919", "cleared_tool_uses": 4, "cleared_input_tokens": removed},
    )


def test_too_little_is_not_cleared() -> None:
    tokenizer = tiny_tokenizer()
    clearing = read_messages(tokenizer, agent(), edits=[clear()])
    enough = clearing.applied[0]["cleared_input_tokens"]
    for least, applied in [(enough, 1), (enough + 1, 0)]:
        reading = read_messages(tokenizer, agent(), edits=[clear(clear_at_least=InputTokens(value=least))])
        assert len(reading.applied) == applied
        assert reading.wanted == (clearing if applied else read_messages(tokenizer, agent())).wanted


def test_a_second_edit_sees_what_the_first_left() -> None:
    tokenizer = tiny_tokenizer()
    alone = read_messages(tokenizer, agent(), edits=[clear(3)])
    second = clear(0, above=len(alone.wanted))
    assert read_messages(tokenizer, agent(), edits=[clear(3), second]).applied == alone.applied
    both = read_messages(tokenizer, agent(), edits=[clear(3), clear(1)])
    assert [edit["cleared_tool_uses"] for edit in both.applied] == [2, 2]
    assert len(both.wanted) == len(read_messages(tokenizer, agent()).wanted) - sum(
        edit["cleared_input_tokens"] for edit in both.applied
    )


def thinker() -> list[dict[str, Any]]:
    """Three turns with reasoning, the second of them over a tool call."""
    messages = agent(1)
    messages[1]["reasoning_content"] = "I should search for it. " * 5
    return [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!", "reasoning_content": "A greeting. " * 5},
        *messages[:3],
        {"role": "assistant", "content": "On the shelf.", "reasoning_content": "The result says so. " * 5},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Still there.", "reasoning_content": "Nothing changed. " * 5},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize(
    ("keep", "left", "turns"),
    [(None, [7], 2), (ThinkingTurns(value=2), [3, 5, 7], 1), (ThinkingTurns(value=3), [1, 3, 5, 7], 0)],
)
def test_the_reasoning_of_the_last_turns_stays(keep: ThinkingTurns | None, left: list[int], turns: int) -> None:
    # This template writes the reasoning of all turns.
    template = "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content or '' }}{{ m.content }}\n{% endfor %}"
    tokenizer = tokenizer_with(template + "{% if add_generation_prompt %}<assistant>{% endif %}")
    reading = read_messages(tokenizer, thinker(), edits=[ClearThinking(keep=keep)])
    assert [index for index, message in enumerate(reading.messages) if "reasoning_content" in message] == left
    assert [edit["cleared_thinking_turns"] for edit in reading.applied] == ([turns] if turns else [])
    whole = read_messages(tokenizer, thinker())
    assert len(whole.wanted) - len(reading.wanted) == sum(edit["cleared_input_tokens"] for edit in reading.applied)
    assert read_messages(tokenizer, thinker(), edits=[ClearThinking(keep="all")]).wanted == whole.wanted


def test_reasoning_that_the_template_leaves_out_is_not_reported() -> None:
    tokenizer = tiny_tokenizer()
    reading = read_messages(tokenizer, thinker(), edits=[ClearThinking()])
    assert reading.applied == () and reading.wanted == read_messages(tokenizer, thinker()).wanted


def test_dropped_messages_are_not_read() -> None:
    tokenizer, messages = tiny_tokenizer(), agent()
    reading = read_messages(tokenizer, messages, dropped=[1, 2, -1])
    assert reading.wanted == read_messages(tokenizer, [messages[0], *messages[3:-1]]).wanted
    # A result may go without its call, as clients do it.
    assert len(without_messages(messages, [2, 2])) == len(messages) - 1


@pytest.mark.parametrize(
    ("dropped", "message"),
    [([12], "has 12, but there are 12 messages: give -12 to 11"), ([1], "not its result, message 2"),
     ([*range(12)], "all 12 messages")],
)  # fmt: skip
def test_messages_that_can_not_be_dropped(dropped: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_messages(tiny_tokenizer(), agent(), dropped=dropped)


def test_an_edit_is_read_as_anthropic_writes_it() -> None:
    kind = {"type": "clear_tool_uses_20250919"}
    given = {
        **kind,
        "trigger": {"type": "tool_uses", "value": 7},
        "keep": {"type": "tool_uses", "value": 0},
        "clear_at_least": None,
        "exclude_tools": ["web"],
        "clear_tool_inputs": ["search"],
    }
    read = ClearToolUses.model_validate(given)
    assert read.model_dump() == {**given, "placeholder": CLEARED}
    for wrong in (
        "clear",
        {"type": "other"},
        {**kind, "kep": 1},
        {**kind, "keep": 3},
        {**kind, "keep": {"type": "input_tokens", "value": 1}},
        {**kind, "trigger": {"type": "tool_uses", "value": -1}},
        {**kind, "trigger": {"type": "tool_uses", "value": True}},
        {**kind, "exclude_tools": "web"},
        {**kind, "clear_tool_inputs": [1]},
    ):
        with pytest.raises(ValidationError):
            ClearToolUses.model_validate(wrong)
    for keep in ("some", {"type": "thinking_turns", "value": 0}, {"type": "tool_uses", "value": 1}):
        with pytest.raises(ValidationError):
            ClearThinking.model_validate({"type": "clear_thinking_20251015", "keep": keep})
