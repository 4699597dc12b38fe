"""Context management: what Anthropic's edit clears of a conversation, and what is left of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from kveraser.serve.rendering import read_messages
from kveraser.serve.schemas import ClearToolUses
from kveraser.serve.tool_results import ToolResultEdit, ToolUse, tool_uses
from tests.templates import TEMPLATES, THINKING, tokenizer_with
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


def test_all_but_the_last_uses_are_cleared_from_the_oldest_on() -> None:
    edit = ToolResultEdit(trigger_input_tokens=50, keep=2)
    assert [use.result for use in edit.chosen(agent(), 51)] == [2, 4, 6]
    assert edit.chosen(agent(), 50) == []
    by_uses = ToolResultEdit(trigger_input_tokens=None, trigger_tool_uses=4, keep=0)
    assert len(by_uses.chosen(agent(5), 1)) == 5
    assert by_uses.chosen(agent(4), 10**9) == []
    assert ToolResultEdit(trigger_input_tokens=0, keep=9).chosen(agent(), 100) == []


def test_excluded_tools_stay_and_count_among_the_last() -> None:
    edit = ToolResultEdit(trigger_input_tokens=0, keep=2, exclude_tools=frozenset({"search"}))
    assert [use.name for use in edit.chosen(agent(), 1)] == ["weather"]


def test_a_result_without_its_call_has_no_name() -> None:
    messages = [*agent(1), {"role": "tool", "tool_call_id": "lost", "content": "?"}]
    assert tool_uses(messages) == [ToolUse("search", (1, 0), 2), ToolUse(None, None, 4)]
    every = ToolResultEdit(trigger_input_tokens=0, keep=0, clear_tool_inputs=True)
    assert [every.clears_inputs(use) for use in tool_uses(messages)] == [True, False]
    named = ToolResultEdit(clear_tool_inputs=frozenset({"weather"}))
    assert [named.clears_inputs(use) for use in tool_uses(agent(2))] == [False, True]


@pytest.mark.parametrize("name", ["chatml", "dated", "thinking"])
@pytest.mark.parametrize("inputs", [False, True])
def test_what_is_cleared_is_taken_out_of_the_tokens(name: str, inputs: bool) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    whole = read_messages(tokenizer, agent())
    edit = ToolResultEdit(trigger_input_tokens=0, keep=1, clear_tool_inputs=inputs)
    reading = read_messages(tokenizer, agent(), edits=[edit])
    left = tokenizer.decode(list(reading.wanted))
    assert [f"result {number}" in left for number in range(5)] == [False] * 4 + [True]
    assert [f"part {number} of many" in left for number in range(5)] == [not inputs] * 4 + [True]
    assert all(left.count(word) == whole.text.count(word) for word in ("Find my parcel.", "search", "So where is it?"))
    # Nothing is written in their place: the tokens are the whole's, some of them gone.
    assert [whole.wanted[place] for place in reading.stays] == list(reading.wanted)
    cleared = len(whole.wanted) - len(reading.wanted)
    assert reading.applied == (
        {"type": "clear_tool_uses_20250919", "cleared_tool_uses": 4, "cleared_input_tokens": cleared},
    )
    assert cleared > 4 * 30
    rendered = reading.rest(0)
    assert rendered.tokens == reading.wanted and rendered.text == left
    assert "".join(rendered.text[start:end] for start, end in rendered.offsets) == left


def test_too_little_is_not_cleared() -> None:
    tokenizer = tiny_tokenizer()
    clearing = read_messages(tokenizer, agent(), edits=[ToolResultEdit(trigger_input_tokens=0)])
    enough = clearing.applied[0]["cleared_input_tokens"]
    for least, applied in [(enough, 1), (enough + 1, 0)]:
        edit = ToolResultEdit(trigger_input_tokens=0, clear_at_least=least)
        reading = read_messages(tokenizer, agent(), edits=[edit])
        assert len(reading.applied) == applied
        assert reading.wanted == (clearing if applied else read_messages(tokenizer, agent())).wanted


def test_a_second_edit_sees_what_the_first_left() -> None:
    tokenizer = tiny_tokenizer()
    first = ToolResultEdit(trigger_input_tokens=0, keep=3)
    alone = read_messages(tokenizer, agent(), edits=[first])
    second = ToolResultEdit(trigger_input_tokens=len(alone.wanted), keep=0)
    assert read_messages(tokenizer, agent(), edits=[first, second]).applied == alone.applied
    both = read_messages(tokenizer, agent(), edits=[first, ToolResultEdit(trigger_input_tokens=0, keep=1)])
    assert [edit["cleared_tool_uses"] for edit in both.applied] == [2, 2]
    assert len(both.wanted) == len(read_messages(tokenizer, agent()).wanted) - sum(
        edit["cleared_input_tokens"] for edit in both.applied
    )


def test_where_the_template_writes_something_else_the_edited_conversation_is_rendered() -> None:
    template = THINKING.replace("+ content + '\n</result>'", "+ (content or 'nothing') + '\n</result>'")
    assert template != THINKING
    tokenizer = tokenizer_with(template)
    edit = ToolResultEdit(trigger_input_tokens=0, keep=3)
    reading = read_messages(tokenizer, agent(), edits=[edit, ToolResultEdit(trigger_input_tokens=0, keep=2)])
    emptied = agent()
    for index in (2, 4, 6):
        emptied[index]["content"] = ""
    assert reading.wanted == read_messages(tokenizer, emptied).wanted
    assert [edit["cleared_tool_uses"] for edit in reading.applied] == [2, 1]
    fewer = len(read_messages(tokenizer, agent()).wanted) - len(reading.wanted)
    assert sum(edit["cleared_input_tokens"] for edit in reading.applied) == fewer


def test_an_edit_is_read_as_anthropic_writes_it() -> None:
    kind = {"type": "clear_tool_uses_20250919"}
    assert ClearToolUses.model_validate(kind).edit() == ToolResultEdit()
    assert ClearToolUses.model_validate(
        {
            **kind,
            "trigger": {"type": "tool_uses", "value": 7},
            "keep": {"type": "tool_uses", "value": 0},
            "clear_at_least": {"type": "input_tokens", "value": 50},
            "exclude_tools": ["web"],
            "clear_tool_inputs": ["search"],
        }
    ).edit() == ToolResultEdit(None, 7, 0, 50, frozenset({"web"}), frozenset({"search"}))
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
