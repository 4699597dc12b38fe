"""Anthropic's context editing for messages in OpenAI's format: selects the tool results to clear.

An edit of type `clear_tool_uses_20250919` clears all tool results but the last few when a conversation exceeds a
threshold. A cleared result keeps its message with empty content: no placeholder is written, since removed text can be
erased from a cache while new text would have to be prefilled. The arguments of a cleared call become `{}`.

Source: https://platform.claude.com/docs/en/build-with-claude/context-editing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLEAR_TOOL_USES = "clear_tool_uses_20250919"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolUse:
    """A tool call and its result.

    Attributes:
        name: of the tool; None if the call is not in the conversation.
        call: index of the message with the call, and of the call in it; None if it is not in the conversation.
        result: index of the message with the result.
    """

    name: str | None
    call: tuple[int, int] | None
    result: int


@dataclass(frozen=True)
class ToolResultEdit:
    """An edit of type `clear_tool_uses_20250919`, with the defaults that Anthropic documents.

    Attributes:
        trigger_input_tokens: the edit applies above this number of tokens; None: no such trigger.
        trigger_tool_uses: the edit applies above this number of tool uses; None: no such trigger.
        keep: number of last tool uses to keep, including those of excluded tools.
        clear_at_least: minimum number of tokens to clear; otherwise nothing is cleared.
        exclude_tools: names of tools whose uses are kept.
        clear_tool_inputs: whether to clear the arguments of calls, too, or the names of tools to do so for.
    """

    trigger_input_tokens: int | None = 100_000
    trigger_tool_uses: int | None = None
    keep: int = 3
    clear_at_least: int = 0
    exclude_tools: frozenset[str] = frozenset()
    clear_tool_inputs: bool | frozenset[str] = False

    def chosen(self, messages: Messages, input_tokens: int) -> list[ToolUse]:
        """The tool uses that this edit clears, oldest first; empty if it is not triggered.

        Args:
            input_tokens: of the conversation after earlier edits.
        """
        uses = tool_uses(messages)
        triggered = (self.trigger_input_tokens is not None and input_tokens > self.trigger_input_tokens) or (
            self.trigger_tool_uses is not None and len(uses) > self.trigger_tool_uses
        )
        old = uses[: max(0, len(uses) - self.keep)] if triggered else []
        return [use for use in old if use.name not in self.exclude_tools]

    def clears_inputs(self, use: ToolUse) -> bool:
        """Whether the arguments of a chosen use are cleared, too."""
        if isinstance(self.clear_tool_inputs, bool):
            return self.clear_tool_inputs and use.call is not None
        return use.call is not None and use.name in self.clear_tool_inputs

    def applied(self, tool_uses: int, input_tokens: int) -> dict[str, Any]:
        """The report of the edit, in Anthropic's format."""
        return {"type": CLEAR_TOOL_USES, "cleared_tool_uses": tool_uses, "cleared_input_tokens": input_tokens}


def tool_uses(messages: Messages) -> list[ToolUse]:
    """The tool uses of a conversation, in the order of their results."""
    calls: dict[str, tuple[str | None, tuple[int, int]]] = {}
    uses: list[ToolUse] = []
    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            calls[call.get("id", "")] = call.get("function", call).get("name"), (index, number)
        if message.get("role") == "tool":
            name, place = calls.get(message.get("tool_call_id", ""), (message.get("name"), None))
            uses.append(ToolUse(name, place, index))
    return uses


def without_result(messages: Messages, use: ToolUse) -> list[Mapping[str, Any]]:
    """The conversation with the content of a result emptied."""
    changed = list(messages)
    changed[use.result] = {**messages[use.result], "content": ""}
    return changed


def without_inputs(messages: Messages, use: ToolUse) -> list[Mapping[str, Any]]:
    """The conversation with the arguments of a call emptied; unchanged if it does not contain the call."""
    changed = list(messages)
    if use.call is not None:
        index, number = use.call
        calls = list(messages[index]["tool_calls"])
        call = calls[number]
        function = {**call.get("function", call), "arguments": "{}"}
        calls[number] = {**call, "function": function} if "function" in call else function
        changed[index] = {**messages[index], "tool_calls": calls}
    return changed
