"""The tokenizer's chat template: messages in a form that every template takes, and the text it makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kveraser.errors import InputError

ChatMessage = Mapping[str, Any]
"""`{"role", "content"}`, and for tools `tool_calls` or `tool_call_id`, as the OpenAI chat format has them."""

Plain = dict[str, Any]
"""A message as `plain` leaves it."""

PROBE = "\u2063probe\u2063"
"""A content that no template alters: shows whether it is written at all."""


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    tools: Sequence[Mapping[str, Any]] | None = None,
    generation_prompt: bool = False,
) -> str:
    """The text of `messages` by the tokenizer's template.

    Raises:
        InputError: a message of the wrong form, no template, or the template refuses the conversation.
    """
    return apply(tokenizer, plain(tokenizer, messages), tools, generation_prompt)


def apply(
    tokenizer: Any,
    messages: Sequence[Plain],
    tools: Sequence[Mapping[str, Any]] | None,
    generation_prompt: bool = False,
) -> str:
    """The text of messages that are plain already.

    Raises:
        InputError: the template refuses them.
    """
    try:
        return _applied(tokenizer, messages, tools, generation_prompt)
    except Exception as error:
        # Some templates join arguments to text: those take them as JSON text.
        written = [_with_written_arguments(message) for message in messages]
        with suppress(Exception):
            if written != list(messages):
                return _applied(tokenizer, written, tools, generation_prompt)
        raise InputError(f"the backbone's chat template refuses this conversation: {error}") from error


def _applied(tokenizer: Any, messages: Sequence[Plain], tools: Any, generation_prompt: bool) -> str:
    rendered: str = tokenizer.apply_chat_template(
        list(messages),
        tools=list(tools) if tools else None,
        tokenize=False,
        add_generation_prompt=generation_prompt,
    )
    return rendered


def _with_written_arguments(message: Plain) -> Plain:
    """The message with the arguments of its calls as JSON text."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        written = {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}
        calls.append({**call, "function": written} if "function" in call else written)
    return {**message, "tool_calls": calls} if calls else message


def plain(tokenizer: Any, messages: Sequence[ChatMessage]) -> list[Plain]:
    """The messages as templates take them: content a text, tool calls with parsed arguments, nothing empty.

    Raises:
        InputError: no template, or a message of the wrong form.
    """
    if not has_template(tokenizer):
        raise InputError("the backbone's tokenizer has no chat template: pass the context as text instead of messages")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is {messages!r}: give a list of messages, each with a role and content")
    read = [_plain_message(tokenizer, index, message) for index, message in enumerate(messages)]
    lost = {
        role for role in ("tool", "developer") if any(one["role"] == role for one in read) and _drops(tokenizer, role)
    }
    return [_shown_otherwise(message) if message["role"] in lost else message for message in read]


def _drops(tokenizer: Any, role: str) -> bool:
    """Whether the template writes nothing of this role's messages, and says nothing about it."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] if role == "tool" else []
    after = [] if role == "tool" else [{"role": "user", "content": "a"}]
    try:
        return PROBE not in _applied(tokenizer, [*talk, {"role": role, "content": PROBE}, *after], None, False)
    except Exception:
        return False


def _shown_otherwise(message: Plain) -> Plain:
    """A developer's message as the system's, a tool's as the user's between `<tool_response>` markers."""
    if message["role"] == "developer":
        return {**message, "role": "system"}
    return {**message, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}


def _plain_message(tokenizer: Any, index: int, message: ChatMessage) -> Plain:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {index} is {message!r}: a message is an object with a role and content")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"message {index} has content that is not text: only text parts can be read")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"message {index} has content {content!r}: give a text")
    if content is None and not calls:
        raise InputError(f"message {index} ({message['role']}) has neither content nor tool_calls")
    # Templates tell an absent field from an empty one; clients that write every field mean absent.
    cleaned = {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
    cleaned["content"] = content or ""
    if not calls:
        return cleaned
    if not isinstance(calls, list):
        raise InputError(f"message {index} has tool_calls {calls!r}: give a list of calls")
    functions = [_function(index, call) for call in calls]
    if "tool_calls" in str(tokenizer.chat_template):
        cleaned["tool_calls"] = [
            {**call, "function": {**call["function"], **function}} if "function" in call else {**call, **function}
            for call, function in zip(calls, functions, strict=True)
        ]
    else:
        # The template would drop the calls without a word; written out in the widespread form, the model sees them.
        written = [f"<tool_call>\n{json.dumps(function)}\n</tool_call>" for function in functions]
        cleaned["content"] = "\n".join([*([cleaned["content"]] if cleaned["content"] else []), *written])
    return cleaned


def _function(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InputError(f"message {index} has a tool call {call!r}: give it a function with name and arguments")
    arguments = function.get("arguments", {})
    try:
        # The OpenAI format has arguments as JSON text; templates write them as JSON themselves.
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise InputError(f"message {index} has tool call arguments that are not JSON: {arguments!r}") from error
    return {"name": function["name"], "arguments": arguments}
