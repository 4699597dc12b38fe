"""Renders documents, conversations, appended messages and questions with the model's chat template.

Special tokens in user text are escaped, so that `kveraser.text.tokenized` reads them as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kveraser.errors import InputError
from kveraser.text.message_ranges import CONTENT, RenderedChat
from kveraser.text.spans import MessageRange
from kveraser.text.template import DEFAULT_OPTIONS, ChatMessage, ChatOptions, Plain, apply, has_template, plain, render
from kveraser.text.tokenized import TokenizedText, check_characters, escaped, special_tokens, tokenize

LEAD = "\u2063lead\u2063"
"""Placeholder content of the message before those that continue a conversation: text that no template alters."""

PLAIN_QUESTION = "\n\nQuestion: {question}\nAnswer:"
"""Prompt for a backbone without a chat template."""


@dataclass(frozen=True)
class Frame:
    """The template's text before (`opening`) and after (`closing`) the content of a first user turn."""

    opening: str
    closing: str


def render_with_ranges(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> tuple[str, list[MessageRange]]:
    """Render a conversation; returns the text and the character ranges of its messages.

    Text that the template writes before the first message (a default system prompt) belongs to no message.

    Raises:
        InputError: see `render`; also if there are no messages.
    """
    if not messages:
        raise InputError("the conversation is empty: give at least one message")
    rendered = RenderedChat(tokenizer, plain(tokenizer, messages, options), options)
    return rendered.text, rendered.ranges()


def continuation(
    tokenizer: Any,
    messages: Sequence[ChatMessage],
    generation_prompt: bool = False,
    options: ChatOptions = DEFAULT_OPTIONS,
) -> tuple[str, list[MessageRange]]:
    """Render messages that continue a conversation; returns the added text and the message ranges in it.

    Args:
        generation_prompt: append the opening of the assistant's turn.
        options: options of the conversation; its tools are not described again.

    Raises:
        InputError: see `render`; also if the template changes earlier turns when messages follow.
    """
    if isinstance(messages, Sequence) and not messages:
        return "", []
    options = replace(options, tools=())
    first = messages[0].get("role") if isinstance(messages, Sequence) and isinstance(messages[0], Mapping) else None
    lead: list[Plain] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": LEAD}]
    if first == "assistant":
        lead = [{"role": "user", "content": LEAD}]
    added = plain(tokenizer, messages, options, lead)
    closing = apply(tokenizer, lead, options).partition(LEAD)[2]
    text = apply(tokenizer, [*lead, *added], options, generation_prompt)
    before, marker, after = text.partition(LEAD)
    if not marker or not after.startswith(closing):
        raise InputError(
            "the chat template rewrites earlier messages, so a conversation can't be continued in place: "
            "start a new session with all messages"
        )
    base = len(before) + len(marker) + len(closing)
    if base == len(text):
        raise InputError("the chat template writes nothing for a message that continues a conversation")
    ranges = RenderedChat(tokenizer, [*lead, *added], options, first=len(lead), start=base).ranges()
    return text[base:], [moved(place, -base) for place in ranges]


def moved(place: MessageRange, distance: int) -> MessageRange:
    """Shift a message's ranges by `distance` characters."""
    return replace(
        place,
        start=place.start + distance,
        end=place.end + distance,
        content_start=place.content_start + distance,
        content_end=place.content_end + distance,
        body_start=None if place.body_start is None else place.body_start + distance,
        body_end=None if place.body_end is None else place.body_end + distance,
    )


def as_turn(
    tokenizer: Any, message: ChatMessage, generation_prompt: bool = False, options: ChatOptions = DEFAULT_OPTIONS
) -> str:
    """Render one message that continues a conversation, optionally with the opening of the assistant's turn."""
    return continuation(tokenizer, [message], generation_prompt, options)[0]


def first_turn_frame(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> Frame:
    """Returns the text around the content of a first user turn, for prefilling a document in an open turn.

    Raises:
        InputError: the template alters the content.
    """
    opening, marker, closing = render(tokenizer, [{"role": "user", "content": CONTENT}], options).partition(CONTENT)
    if not marker:
        raise InputError("the chat template does not show a user's words as they are: use a model with another one")
    return Frame(opening, closing)


def first_turn_start(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> int | None:
    """Returns the first character of the turn in `first_turn_frame`, after a default system prompt; None if unknown."""
    return RenderedChat(tokenizer, [{"role": "user", "content": CONTENT}], options).preamble


def reply_opening(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> str:
    """Returns the text that opens an assistant's turn.

    Raises:
        InputError: the template's generation prompt is not at the end of the text.
    """
    message = [{"role": "user", "content": "a"}]
    asked, opened = render(tokenizer, message, options), render(tokenizer, message, options, generation_prompt=True)
    if not opened.startswith(asked):
        raise InputError("the chat template does not open a reply at the end of the text: use a model with another one")
    return opened[len(asked) :]


def reply_closing(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> str:
    """Returns the text that closes an assistant's turn."""
    return as_turn(tokenizer, {"role": "assistant", "content": CONTENT}, options=options).partition(CONTENT)[2]


def question_text(
    tokenizer: Any,
    question: str,
    turn_open: bool,
    answer_prefix: str = "",
    options: ChatOptions = DEFAULT_OPTIONS,
) -> str:
    """Render a question: in the open user turn, as a new turn, or with `PLAIN_QUESTION` without a template.

    Args:
        turn_open: the context ends inside the user's turn.
        answer_prefix: text at the beginning of the assistant's turn, which the answer continues.

    Raises:
        InputError: the question is empty, or the answer prefix is blank or the model has no chat template for it.
    """
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"the question is empty or not a text ({question!r}): give some words")
    if answer_prefix and not answer_prefix.strip():
        raise InputError(f"the answer prefix is {answer_prefix!r}: give some words, or none")
    asked = _words(tokenizer, question, "the question", options)
    answer_prefix = _words(tokenizer, answer_prefix, "the answer prefix", options)
    if not has_template(tokenizer):
        if answer_prefix:
            raise InputError(
                f"the answer prefix {answer_prefix!r} begins the assistant's turn, and this model has no chat "
                "template: leave it out, or use a model with a template"
            )
        return PLAIN_QUESTION.format(question=asked)
    if turn_open:
        closing, opening = first_turn_frame(tokenizer, options).closing, reply_opening(tokenizer, options)
        return f"\n\n{asked}{closing}{opening}{answer_prefix}"
    return as_turn(tokenizer, {"role": "user", "content": question}, True, options) + answer_prefix


def answer_text(answer: str, answer_prefix: str) -> str:
    """Returns a forced answer as it follows its prefix: separated by a space unless one of them has it."""
    separated = not answer_prefix or answer_prefix[-1].isspace() or answer[:1].isspace()
    return answer if separated else f" {answer}"


def _words(tokenizer: Any, text: str, what: str, options: ChatOptions) -> str:
    """Check a user's text and escape special tokens in it unless they are allowed."""
    check_characters(text, what)
    words: str = text if options.allow_special else escaped(text, special_tokens(tokenizer))
    return words


# Tokenized


def document(tokenizer: Any, text: str, options: ChatOptions = DEFAULT_OPTIONS) -> TokenizedText:
    """Tokenize a document at the beginning of a context; with a chat template, in a first user turn that stays open.

    Raises:
        InputError: the text is empty or has a lone surrogate.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the text is empty or not a text ({text!r}): give the context to read")
    templated = has_template(tokenizer)
    opening = first_turn_frame(tokenizer, options).opening if templated else ""
    words = _words(tokenizer, text, "the text", options)
    return tokenize(tokenizer, opening + words, special=not templated, body_start=len(opening))


def conversation(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> TokenizedText:
    """Tokenize a conversation at the beginning of a context.

    Raises:
        InputError: see `render_with_ranges`.
    """
    text, ranges = render_with_ranges(tokenizer, messages, options)
    body = min((place.start for place in ranges if place.start < place.end), default=0)
    return tokenize(tokenizer, text, messages=ranges, body_start=body)


def added_messages(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> TokenizedText:
    """Tokenize messages that continue a conversation.

    Raises:
        InputError: see `continuation`; also if there are no messages.
    """
    text, ranges = continuation(tokenizer, messages, options=options)
    if not text:
        raise InputError("nothing to append: give some messages")
    return tokenize(tokenizer, text, follows=True, messages=ranges)


def added_text(tokenizer: Any, text: str, options: ChatOptions = DEFAULT_OPTIONS) -> TokenizedText:
    """Tokenize text that continues a document.

    Raises:
        InputError: the text is empty or has a lone surrogate.
    """
    if not isinstance(text, str):
        raise InputError(f"the text is {text!r}: give the context to add")
    if not text:
        raise InputError("nothing to append: give some text")
    return tokenize(tokenizer, _words(tokenizer, text, "the text", options), follows=True)


__all__ = [
    "CONTENT", "PLAIN_QUESTION", "ChatMessage", "ChatOptions", "Frame", "added_messages", "added_text", "answer_text",
    "as_turn", "continuation", "conversation", "document", "first_turn_frame", "first_turn_start", "has_template",
    "moved", "question_text", "render", "render_with_ranges", "reply_closing", "reply_opening",
]  # fmt: skip
