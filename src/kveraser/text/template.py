"""Chat templates: normalizes messages and renders them to text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from kveraser.errors import InputError
from kveraser.text.tokenized import check_characters, escaped, special_tokens

ChatMessage = Mapping[str, Any]
"""An OpenAI chat message: `role` and `content`, with `tool_calls` or `tool_call_id` for tools."""

Plain = dict[str, Any]
"""A message normalized by `plain`."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Field names that templates and clients use for an assistant's reasoning."""

MARK = re.compile("\u2063([0-9]+)\u2063")
"""Numbered placeholder of a content or tool name: text that no template alters."""

DISTINGUISHES_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none")
"""Matches templates that distinguish a missing content from an empty one: with tool calls they expect it missing."""

NAMED_MARKERS = 4
"""Maximum number of special tokens in messages that are warned about: they are sent in HTTP headers."""


@dataclass(frozen=True)
class ChatOptions:
    """Options for rendering a conversation.

    Attributes:
        tools: tool descriptions.
        variables: further variables of the chat template, such as `enable_thinking`.
        allow_special: treat special tokens in messages and tools as control tokens instead of text.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    allow_special: bool = False


DEFAULT_OPTIONS = ChatOptions()


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def mentions(tokenizer: Any, name: str) -> bool:
    """Whether the chat template uses the variable or field `name`."""
    return re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is not None


def render(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    options: ChatOptions = DEFAULT_OPTIONS,
    generation_prompt: bool = False,
) -> str:
    """Normalize and render `messages`; special tokens in them are escaped (`tokenized.escaped`).

    Raises:
        InputError: no template, an invalid message, or the template refuses the conversation or drops a message.
    """
    return apply(tokenizer, plain(tokenizer, messages, options), options, generation_prompt)


def apply(tokenizer: Any, messages: Sequence[Plain], options: ChatOptions, generation_prompt: bool = False) -> str:
    """Render messages that are normalized already.

    Raises:
        InputError: the template refuses the conversation.
    """
    try:
        return _applied(tokenizer, messages, options, generation_prompt)
    except Exception as error:
        # Some templates concatenate arguments with strings, so they need JSON text instead of an object.
        serialized = [_with_json_arguments(message) for message in messages]
        with suppress(Exception):
            if serialized != list(messages):
                return _applied(tokenizer, serialized, options, generation_prompt)
        raise InputError(f"the backbone's chat template refuses this conversation: {error}") from error


def _applied(tokenizer: Any, messages: Sequence[Plain], options: ChatOptions, generation_prompt: bool) -> str:
    tools, variables = list(options.tools), dict(options.variables)
    if (tools or variables) and not options.allow_special:
        tools, variables = escaped([tools, variables], special_tokens(tokenizer))
    conversation = list(messages)
    if DISTINGUISHES_NONE.search(str(tokenizer.chat_template)):
        conversation = [
            {**one, "content": None} if one.get("tool_calls") and not one["content"] else one for one in conversation
        ]
    rendered: str = tokenizer.apply_chat_template(
        conversation, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt, **variables
    )
    return rendered


def _with_json_arguments(message: Plain) -> Plain:
    """Serialize the arguments of a message's tool calls to JSON text."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        serialized = {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}
        calls.append({**call, "function": serialized} if "function" in call else serialized)
    return {**message, "tool_calls": calls} if calls else message


# Normalized messages


def plain(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    options: ChatOptions = DEFAULT_OPTIONS,
    lead: Sequence[Plain] = (),
) -> list[Plain]:
    """Normalize messages for the chat template: text content, parsed tool call arguments, no empty fields.

    A legacy `function_call` becomes a tool call, reasoning is stored under the field names that the template uses, and
    the role `developer` becomes `system` unless the template supports it. Messages that the template would drop are
    rewritten: system messages as user messages, tool results as user messages in `<tool_response>` markers, tool calls
    as text after the content.

    Args:
        lead: normalized messages that precede these.

    Raises:
        InputError: no template, an invalid message, a reserved template variable, or a message that the template drops
            even when rewritten.
    """
    if not has_template(tokenizer):
        raise InputError("the backbone's tokenizer has no chat template: pass the context as text instead of messages")
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is {messages!r}: give a list of messages, each with a role and content")
    reserved = sorted(_reserved(tokenizer) & set(options.variables)) if options.variables else []
    if reserved:
        raise InputError(f"{reserved[0]} is a reserved name and can't be a template variable: leave it out")
    read = [_plain_message(tokenizer, index, message) for index, message in enumerate(messages)]
    if not options.allow_special:
        markers = special_tokens(tokenizer)
        read = [escaped(message, markers) for message in read]
    lost = _lost(tokenizer, read, options, lead) or []
    for _ in range(2):
        if lost:
            read = [_written_out(one) if index in lost else one for index, one in enumerate(read)]
            left = _lost(tokenizer, read, options, lead)
            if left is None:
                # Templates refuse a tool result without its call, so rewrite both.
                tools = [one["role"] == "tool" or bool(one.get("tool_calls")) for one in read]
                read = [_written_out(one) if of_tool else one for one, of_tool in zip(read, tools, strict=True)]
                left = _lost(tokenizer, read, options, lead)
            lost = lost if left is None else left
    if lost:
        raise InputError(
            f"the chat template leaves out the content of message {lost[0]} ({messages[lost[0]]['role']}) in this "
            "conversation: leave the message out, put its words into another one, or end with a user's message"
        )
    return read


def _reserved(tokenizer: Any) -> frozenset[str]:
    """Parameters of `apply_chat_template` and names that it passes to templates itself."""
    return frozenset(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "conversation"}


def _lost(tokenizer: Any, messages: Sequence[Plain], options: ChatOptions, lead: Sequence[Plain]) -> list[int] | None:
    """Returns the indices of messages whose content or tool calls the template drops; None if it refuses them all."""
    numbers = count()
    wanted: list[set[str]] = []

    def marked(message: Plain) -> Plain:
        marks = [str(next(numbers)) for _ in range(1 + len(message.get("tool_calls", ())))]
        own, *calls = (f"\u2063{number}\u2063" for number in marks)
        spoken = bool(message["content"].strip())
        wanted.append(set(marks if spoken else marks[1:]))
        one = {**message, "content": own if spoken else message["content"]}
        if calls:
            one["tool_calls"] = [_renamed(*pair) for pair in zip(message["tool_calls"], calls, strict=True)]
        return one

    try:
        shown = set(MARK.findall(apply(tokenizer, [*lead, *map(marked, messages)], options)))
    except InputError:
        return None
    return [index for index, marks in enumerate(wanted) if not marks <= shown]


def _renamed(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": {**call["function"], "name": name}}
    return {**call, "name": name}


def _written_out(message: Plain) -> Plain:
    """Rewrite a message that the template drops as one that it renders."""
    content = message["content"]
    if message.get("tool_calls"):
        functions = [call.get("function", call) for call in message["tool_calls"]]
        rest = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**rest, "content": "\n".join([*([content] if content else []), *map(_call_text, functions)])}
    if message["role"] == "developer":
        return {**message, "role": "system"}
    if message["role"] == "tool":
        return {**message, "role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    return {**message, "role": "user"} if message["role"] == "system" else message


def _call_text(function: Mapping[str, Any]) -> str:
    """Write a tool call as text in the Hermes format."""
    call = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _plain_message(tokenizer: Any, index: int, message: ChatMessage) -> Plain:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {index} is {message!r}: a message is an object with a role and content")
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        other = next(
            (part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))), None
        )
        if other is not None:
            kind = other.get("type") if isinstance(other, Mapping) else type(other).__name__
            raise InputError(f"message {index} has content that is not text ({kind}): only text parts can be read")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"message {index} has content {content!r}: give a text")
    if message.get("function_call") is not None:
        if calls:
            raise InputError(f"message {index} has both tool_calls and function_call: give one of them")
        calls = [{"type": "function", "function": message["function_call"]}]
    if content is None and not calls:
        raise InputError(f"message {index} ({message['role']}) has neither content nor tool_calls")
    # Templates distinguish missing from null fields; clients that send null mean missing.
    left_out = {"tool_calls", "function_call", *REASONING}
    cleaned = {name: value for name, value in message.items() if value is not None and name not in left_out}
    cleaned["role"] = "tool" if message["role"] == "function" else message["role"]
    if message["role"] == "developer" and not mentions(tokenizer, "developer"):
        # A template that renders any role would render one that the model was not trained on.
        cleaned["role"] = "system"
    cleaned["content"] = content or ""
    check_characters(cleaned["content"], f"message {index}")
    reasoning = next((message[name] for name in REASONING if message.get(name)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise InputError(f"message {index} has reasoning {reasoning!r}: give a text")
        check_characters(reasoning, f"the reasoning of message {index}")
        cleaned |= {name: reasoning for name in reasoning_fields(tokenizer)}
    if not calls:
        return cleaned
    if not isinstance(calls, list):
        raise InputError(f"message {index} has tool_calls {calls!r}: give a list of calls")
    functions = [_function(index, call) for call in calls]
    cleaned["tool_calls"] = [
        {**call, "function": {**call["function"], **function}} if "function" in call else {**call, **function}
        for call, function in zip(calls, functions, strict=True)
    ]
    return cleaned


def reasoning_fields(tokenizer: Any) -> list[str]:
    """The fields from which the template reads an assistant's reasoning."""
    template = str(tokenizer.chat_template)
    # Match fields of a message only: prompts contain the word `reasoning` too.
    return [name for name in REASONING if re.search(rf"\.{name}\b|['\"]{name}['\"]", template)]


def _function(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InputError(f"message {index} has a tool call {call!r}: give it a function with name and arguments")
    arguments = function.get("arguments", {})
    try:
        # In the OpenAI format arguments are JSON text; templates serialize them themselves.
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise InputError(f"message {index} has tool call arguments that are not JSON: {arguments!r}") from error
    return {"name": function["name"], "arguments": arguments}


# Warnings


def notices(tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS) -> list[str]:
    """Returns warnings about parts of a conversation that the template ignores, and about special tokens in it."""
    said = [
        f"the chat template has no variable {name}, so it has no effect"
        for name in options.variables
        if not mentions(tokenizer, name)
    ]
    if options.tools and not mentions(tokenizer, "tools"):
        said.append("the chat template writes no tools, so the model does not see them: describe them in a message")
    if not reasoning_fields(tokenizer):
        index = next((index for index, one in enumerate(messages) if any(one.get(name) for name in REASONING)), None)
        if index is not None:
            said.append(f"the chat template writes no reasoning, so the model does not see that of message {index}")
    texts = {f"message {index}": one for index, one in enumerate(messages)} | {"a tool": options.tools}
    return said + special_notices(tokenizer, texts, options.allow_special)


def special_notices(tokenizer: Any, texts: Mapping[str, Any], allow_special: bool) -> list[str]:
    """Returns a warning for each special token in `texts` (at most `NAMED_MARKERS`), naming the first key it is in."""
    found: dict[str, str] = {}
    markers = special_tokens(tokenizer)
    for name, value in texts.items():
        for text in _texts(value):
            for marker in markers:
                if marker in text:
                    found.setdefault(marker, name)
    how = "which acts as a control token" if allow_special else "which is read as text and not as a control token"
    return [f"{name} has {marker}, {how}" for marker, name in list(found.items())[:NAMED_MARKERS]]


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
