"""Context edits: changes that the server makes to a conversation before the model reads it, as Anthropic's API does.

Clients keep sending the whole history. A cleared tool result keeps its message, whose content becomes a placeholder.

Source: https://platform.claude.com/docs/en/build-with-claude/context-editing
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from kveraser.errors import InputError
from kveraser.serve.body import WHOLE, Request
from kveraser.text.tokenized import TokenizedText

CLEARED = "[cleared]"
"""Default content of a cleared tool result. Anthropic does not document its own text."""

Messages = Sequence[Mapping[str, Any]]


class InputTokens(Request):
    """A number of tokens of the conversation."""

    type: Literal["input_tokens"] = "input_tokens"
    value: int = Field(ge=0, le=WHOLE)


class ToolUses(Request):
    """A number of tool uses."""

    type: Literal["tool_uses"] = "tool_uses"
    value: int = Field(ge=0, le=WHOLE)


class ThinkingTurns(Request):
    """A number of assistant turns with reasoning."""

    type: Literal["thinking_turns"] = "thinking_turns"
    value: int = Field(ge=1, le=WHOLE)


class ClearToolUses(Request):
    """Clear old tool results, as Anthropic's context editing does; here they are replaced in the cache."""

    type: Literal["clear_tool_uses_20250919"] = "clear_tool_uses_20250919"
    trigger: Annotated[InputTokens | ToolUses, Field(discriminator="type")] | None = Field(
        None, description="The edit applies above this; default 100,000 tokens."
    )
    keep: ToolUses | None = Field(None, description="Tool uses at the end that stay; default 3.")
    clear_at_least: InputTokens | None = Field(None, description="When less would go, nothing does.")
    exclude_tools: list[str] | None = Field(None, description="Names of tools whose results stay.")
    clear_tool_inputs: bool | list[str] | None = Field(None, description="Clear the calls' arguments as well.")
    placeholder: str = Field(CLEARED, max_length=1024, description="Content of a cleared result.")

    @property
    def least(self) -> int:
        """Tokens that the edit must remove to be applied."""
        return 1 if self.clear_at_least is None else max(1, self.clear_at_least.value)

    def change(self, messages: Messages, tokens: int) -> tuple[Messages, dict[str, int]]:
        """Clear the results of a conversation of `tokens` tokens; returns it with the counts for the report."""
        uses, trigger = tool_uses(messages), self.trigger or InputTokens(value=100_000)
        if (tokens if isinstance(trigger, InputTokens) else len(uses)) <= trigger.value:
            return messages, {}
        keep = 3 if self.keep is None else self.keep.value
        changed, cleared = list(messages), 0
        for use in uses[: max(0, len(uses) - keep)]:
            if use.name in (self.exclude_tools or ()):
                continue
            before = changed[use.result], changed[use.call[0]] if use.call else None
            if len(str(before[0]["content"] or "")) > len(self.placeholder):
                changed[use.result] = {**changed[use.result], "content": self.placeholder}
            if use.call is not None and self._clears_input(use):
                changed[use.call[0]] = _without_arguments(changed[use.call[0]], use.call[1])
            cleared += (changed[use.result], changed[use.call[0]] if use.call else None) != before
        return changed, {"cleared_tool_uses": cleared}

    def _clears_input(self, use: ToolUse) -> bool:
        inputs = self.clear_tool_inputs
        return use.name in inputs if isinstance(inputs, list) else bool(inputs)


class ClearThinking(Request):
    """Clear the reasoning of older assistant turns, as Anthropic's context editing does."""

    type: Literal["clear_thinking_20251015"] = "clear_thinking_20251015"
    keep: ThinkingTurns | Literal["all"] | None = Field(None, description="Turns whose reasoning stays; default 1.")

    @property
    def least(self) -> int:
        """Tokens that the edit must remove to be applied."""
        return 1

    def change(self, messages: Messages, tokens: int) -> tuple[Messages, dict[str, int]]:
        """Clear the reasoning; returns the conversation with the counts for the report."""
        if self.keep == "all":
            return messages, {}
        turn, turns = 0, dict[int, int]()
        for index, message in enumerate(messages):
            # An assistant's turn goes on over tool calls, up to the user's next message.
            turn += message["role"] == "user"
            if message.get("reasoning_content"):
                turns[index] = turn
        thinking = sorted(set(turns.values()))
        old = set(thinking[: max(0, len(thinking) - (1 if self.keep is None else self.keep.value))])
        changed = [
            {name: value for name, value in message.items() if name != "reasoning_content"}
            if turns.get(index) in old
            else message
            for index, message in enumerate(messages)
        ]
        return changed, {"cleared_thinking_turns": len(old)}


ContextEdit = ClearToolUses | ClearThinking


class ToolUse(NamedTuple):
    """A tool call and its result.

    Attributes:
        name: of the tool; None if the call is not in the conversation.
        call: index of the message with the call, and of the call in it; None if it is not in the conversation.
        result: index of the message with the result.
    """

    name: str | None
    call: tuple[int, int] | None
    result: int


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


def apply_edits(
    messages: Messages, edits: Sequence[ContextEdit], read: Callable[[Messages], TokenizedText]
) -> tuple[Messages, TokenizedText, tuple[dict[str, Any], ...]]:
    """Apply edits in their order; returns the conversation, its text, and reports in Anthropic's format.

    An edit that would remove too few tokens is not applied and not reported.

    Args:
        read: renders and tokenizes a conversation.
    """
    text, applied = read(messages), []
    for edit in edits:
        changed, counts = edit.change(messages, len(text.tokens))
        left = text if changed == messages else read(changed)
        cleared = len(text.tokens) - len(left.tokens)
        if cleared >= edit.least:
            applied.append({"type": edit.type, **counts, "cleared_input_tokens": cleared})
            messages, text = changed, left
    return messages, text, tuple(applied)


def without_messages(messages: Messages, dropped: Sequence[int]) -> Messages:
    """The conversation without the messages at these indices; negative ones count from the end.

    Raises:
        InputError: an index outside of the conversation, a tool result that would lose its call, or nothing left.
    """
    size = len(messages)
    outside = [index for index in dropped if not -size <= index < size]
    if outside:
        raise InputError(f"drop_message has {outside[0]}, but there are {size} messages: give {-size} to {size - 1}")
    gone = {index % size for index in dropped}
    for use in tool_uses(messages):
        if use.call is not None and use.call[0] in gone and use.result not in gone:
            raise InputError(
                f"drop_message has message {use.call[0]} with a tool call, but not its result, message {use.result}: "
                "drop both"
            )
    if len(gone) == size:
        raise InputError(f"drop_message has all {size} messages: leave one at least")
    return [message for index, message in enumerate(messages) if index not in gone]


def _without_arguments(message: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The message with the arguments of its call `number` emptied."""
    calls = list(message["tool_calls"])
    call = calls[number]
    function = {**call.get("function", call), "arguments": "{}"}
    calls[number] = {**call, "function": function} if "function" in call else function
    return {**message, "tool_calls": calls}
