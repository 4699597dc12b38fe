"""Chat messages through the model's own template, and where each of them stands in the rendered text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kveraser.errors import InputError
from kveraser.spans import MessageRange

ChatMessage = Mapping[str, Any]
"""`{"role", "content"}`, and for tools `tool_calls` or `tool_call_id`, as the OpenAI chat format has them."""

CONTENT = "\u2063content\u2063"
"""A text that no template alters and no message contains: marks where content goes."""

PLAIN_QUESTION = "\n\nQuestion: {question}\nAnswer:"
"""How a backbone without a chat template is asked."""


@dataclass(frozen=True)
class Frame:
    """The text around a user's words in a first turn: `opening`, the words, `closing`."""

    opening: str
    closing: str


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
    if not has_template(tokenizer):
        raise InputError("the backbone's tokenizer has no chat template: pass the context as text instead of messages")
    plain = [_plain(tokenizer, index, message) for index, message in enumerate(messages)]
    try:
        rendered: str = tokenizer.apply_chat_template(
            plain, tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=generation_prompt
        )
    except Exception as error:
        raise InputError(f"the backbone's chat template refuses this conversation: {error}") from error
    return rendered


def _plain(tokenizer: Any, index: int, message: ChatMessage) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"message {index} is {message!r}: a message is an object with a role and content")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"message {index} has content that is not text: only text parts can be read")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise InputError(f"message {index} has content {content!r}: give a text")
    plain = {**message, "content": content or ""}
    calls = message.get("tool_calls")
    if content is None and not calls:
        raise InputError(f"message {index} ({message['role']}) has neither content nor tool_calls")
    if calls and "tool_calls" not in str(tokenizer.chat_template):
        # The template would drop the calls without a word; written out in the widespread form, the model sees them.
        written = [f"<tool_call>\n{json.dumps(_function(index, call))}\n</tool_call>" for call in calls]
        plain["content"] = "\n".join([*([plain["content"]] if plain["content"] else []), *written])
        del plain["tool_calls"]
    return plain


def _function(index: int, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InputError(f"message {index} has a tool call {call!r}: give it a function with name and arguments")
    arguments = function.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise InputError(f"message {index} has tool call arguments that are not JSON: {arguments!r}") from error
    return {"name": function["name"], "arguments": arguments}


def render_with_ranges(
    tokenizer: Any, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[str, list[MessageRange]]:
    """The rendered conversation and where each message stands in it, in characters.

    Message `i` is what rendering it adds to the messages before it. What the template puts in front of the first
    message (a default system prompt) belongs to no message.

    Raises:
        InputError: see `render`; also a template that rewrites earlier messages, where message ranges mean nothing.
    """
    if not messages:
        raise InputError("the conversation is empty: give at least one message")
    text = render(tokenizer, messages, tools)
    ends: list[int | None] = []
    for count in range(1, len(messages)):
        try:
            part = render(tokenizer, messages[:count], tools)
        except InputError:
            # Some templates refuse to stop here (a lone system message): the next message takes it along.
            ends.append(None)
            continue
        if not text.startswith(part):
            raise InputError(
                f"the chat template rewrites earlier messages when message {count} follows, so messages have no fixed "
                "place: render the conversation yourself and pass it as text"
            )
        ends.append(len(part))
    ends.append(len(text))
    start = len(_preamble(tokenizer, messages, tools))
    ranges: list[MessageRange] = []
    for index, message in enumerate(messages):
        end = ends[index]
        if end is None:
            end = start
        ranges.append(turn_range(_plain(tokenizer, index, message), text[start:end], start))
        start = end
    return text, ranges


def _preamble(tokenizer: Any, messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """What the template writes before the first message: found by writing that message twice."""
    first = messages[0]
    for between in ([], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}]):
        try:
            once = render(tokenizer, [first], tools)
            base = render(tokenizer, [first, *between], tools)
            twice = render(tokenizer, [first, *between, first], tools)
        except InputError:
            continue
        turn = twice[len(base) :]
        if twice.startswith(base) and turn and once.endswith(turn):
            return once[: -len(turn)]
    return ""


def as_turn(tokenizer: Any, message: ChatMessage, generation_prompt: bool = False) -> str:
    """The text that one more message adds to a conversation under way, and the opening of the reply if asked for."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if message.get("role") == "assistant":
        before = before[:1]
    base = render(tokenizer, before)
    extended = render(tokenizer, [*before, message], generation_prompt=generation_prompt)
    if not extended.startswith(base):
        raise InputError("the chat template rewrites earlier messages, so a conversation can't be continued in place")
    return extended[len(base) :]


def first_turn_frame(tokenizer: Any) -> Frame:
    """The text around the words of a first user turn, so that a document can be prefilled and its turn left open."""
    rendered = render(tokenizer, [{"role": "user", "content": CONTENT}])
    opening, _, closing = rendered.partition(CONTENT)
    return Frame(opening, closing)


def reply_opening(tokenizer: Any) -> str:
    """The text that opens an assistant's turn."""
    message = [{"role": "user", "content": "a"}]
    return render(tokenizer, message, generation_prompt=True)[len(render(tokenizer, message)) :]


def reply_closing(tokenizer: Any) -> str:
    """The text that closes an assistant's turn."""
    return as_turn(tokenizer, {"role": "assistant", "content": CONTENT}).partition(CONTENT)[2]


def question_text(tokenizer: Any, question: str, turn_open: bool) -> str:
    """The text that asks `question`: in the open user turn, as a turn of its own, or plainly without a template.

    Raises:
        InputError: the question is empty.
    """
    if not question.strip():
        raise InputError("the question is empty: give some text")
    if not has_template(tokenizer):
        return PLAIN_QUESTION.format(question=question)
    if turn_open:
        return f"\n\n{question}{first_turn_frame(tokenizer).closing}{reply_opening(tokenizer)}"
    return as_turn(tokenizer, {"role": "user", "content": question}, generation_prompt=True)


def turn_range(message: ChatMessage, turn: str, start: int) -> MessageRange:
    """Where a message stands whose rendered `turn` begins at character `start`."""
    content = message.get("content")
    words = content.strip() if isinstance(content, str) else ""
    place = turn.find(words) if words else -1
    end = start + len(turn)
    inside = (start + place, start + place + len(words)) if place >= 0 else (end, end)
    return MessageRange(str(message["role"]), start, end, *inside, message.get("tool_call_id"))
