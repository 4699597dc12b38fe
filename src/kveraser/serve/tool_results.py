"""Which tool results of a conversation go: Anthropic's context editing, decided on messages in the OpenAI format.

An edit of type `clear_tool_uses_20250919` clears old tool results once a conversation has grown: from the oldest on,
all but the last few. A cleared result keeps its message, with the content emptied: nothing is written in its place,
since what is only taken away can be erased from a cache, and what is put there would have to be read anew. The
arguments of a cleared call become `{}`.

Source: https://platform.claude.com/docs/en/build-with-claude/context-editing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kveraser.errors import InputError

CLEAR_TOOL_USES = "clear_tool_uses_20250919"

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ToolUse:
    """A tool's call and its result.

    Attributes:
        name: of the tool; None where the conversation does not show the call.
        call: places of the call's message and of the call in it; None likewise.
        result: place of the message with the result.
    """

    name: str | None
    call: tuple[int, int] | None
    result: int


@dataclass(frozen=True)
class ToolResultEdit:
    """One edit of type `clear_tool_uses_20250919`; defaults as Anthropic documents them.

    Attributes:
        trigger_input_tokens: the edit applies when the conversation has more tokens than this; None: no such trigger.
        trigger_tool_uses: the edit applies when the conversation has more tool uses than this; None: no such trigger.
        keep: tool uses at the end that stay, those of excluded tools counted.
        clear_at_least: tokens that must go, else nothing does.
        exclude_tools: names of tools whose uses stay.
        clear_tool_inputs: clear the calls' arguments too: all of them, or those of the tools named.
    """

    trigger_input_tokens: int | None = 100_000
    trigger_tool_uses: int | None = None
    keep: int = 3
    clear_at_least: int = 0
    exclude_tools: frozenset[str] = frozenset()
    clear_tool_inputs: bool | frozenset[str] = False

    def chosen(self, messages: Messages, input_tokens: int) -> list[ToolUse]:
        """The tool uses that this edit clears, oldest first; none where it is not triggered.

        Args:
            input_tokens: of the conversation, with what earlier edits left of it.
        """
        uses = tool_uses(messages)
        triggered = (self.trigger_input_tokens is not None and input_tokens > self.trigger_input_tokens) or (
            self.trigger_tool_uses is not None and len(uses) > self.trigger_tool_uses
        )
        old = uses[: max(0, len(uses) - self.keep)] if triggered else []
        return [use for use in old if use.name not in self.exclude_tools]

    def clears_inputs(self, use: ToolUse) -> bool:
        """Whether the arguments of a chosen use go as well."""
        if isinstance(self.clear_tool_inputs, bool):
            return self.clear_tool_inputs and use.call is not None
        return use.call is not None and use.name in self.clear_tool_inputs

    def applied(self, tool_uses: int, input_tokens: int) -> dict[str, Any]:
        """What the response tells of the edit, as Anthropic does."""
        return {"type": CLEAR_TOOL_USES, "cleared_tool_uses": tool_uses, "cleared_input_tokens": input_tokens}


def tool_uses(messages: Messages) -> list[ToolUse]:
    """The tool results of a conversation, each with its call, in order of the results."""
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
    """The conversation with a result emptied."""
    changed = list(messages)
    changed[use.result] = {**messages[use.result], "content": ""}
    return changed


def without_inputs(messages: Messages, use: ToolUse) -> list[Mapping[str, Any]]:
    """The conversation with the arguments of a call emptied; unchanged where the call is not shown."""
    changed = list(messages)
    if use.call is not None:
        index, number = use.call
        calls = list(messages[index]["tool_calls"])
        call = calls[number]
        function = {**call.get("function", call), "arguments": "{}"}
        calls[number] = {**call, "function": function} if "function" in call else function
        changed[index] = {**messages[index], "tool_calls": calls}
    return changed


def edit_from_json(value: Any) -> ToolResultEdit:
    """An edit as requests write it.

    Raises:
        InputError: another type, an unknown field, or a value of the wrong form.
    """
    if not isinstance(value, Mapping) or value.get("type") != CLEAR_TOOL_USES:
        kind = value.get("type") if isinstance(value, Mapping) else value
        raise InputError(f"no context edit of type {kind!r}: there is {CLEAR_TOOL_USES}")
    known = {"type", "trigger", "keep", "clear_at_least", "exclude_tools", "clear_tool_inputs"}
    unknown = sorted(set(value) - known)
    if unknown:
        raise InputError(f"a context edit has no field {unknown[0]!r}: it has {', '.join(sorted(known))}")
    given = {name: content for name, content in value.items() if content is not None}
    settings: dict[str, Any] = {}
    if "trigger" in given:
        kind, number = _amount("trigger", given["trigger"], ("input_tokens", "tool_uses"))
        settings |= {"trigger_input_tokens": None, "trigger_tool_uses": None, f"trigger_{kind}": number}
    if "keep" in given:
        settings["keep"] = _amount("keep", given["keep"], ("tool_uses",))[1]
    if "clear_at_least" in given:
        settings["clear_at_least"] = _amount("clear_at_least", given["clear_at_least"], ("input_tokens",))[1]
    if "exclude_tools" in given:
        settings["exclude_tools"] = _names("exclude_tools", given["exclude_tools"])
    if "clear_tool_inputs" in given:
        inputs = given["clear_tool_inputs"]
        settings["clear_tool_inputs"] = inputs if isinstance(inputs, bool) else _names("clear_tool_inputs", inputs)
    return ToolResultEdit(**settings)


def _amount(field: str, value: Any, kinds: tuple[str, ...]) -> tuple[str, int]:
    shape = isinstance(value, Mapping) and set(value) == {"type", "value"} and value["type"] in kinds
    if not shape or type(value["value"]) is not int or value["value"] < 0:
        raise InputError(
            f'{field} is {value!r}: give {{"type": {" or ".join(map(repr, kinds))}, "value": a whole number}}'
        )
    return value["type"], value["value"]


def _names(field: str, value: Any) -> frozenset[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise InputError(f"{field} is {value!r}: give a list of tool names")
    return frozenset(value)
