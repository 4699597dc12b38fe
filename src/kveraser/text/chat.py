"""Contexts and questions as text: documents, conversations and what is added to them, by the model's chat template.

A text made here has special tokens in its user's words escaped; `kveraser.text.tokenized` reads them as text.
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
"""A text that no template alters, for the message in front of the ones that are added to a conversation."""

PLAIN_QUESTION = "\n\nQuestion: {question}\nAnswer:"
"""How a backbone without a chat template is asked."""


@dataclass(frozen=True)
class Frame:
    """The text around a user's words in a first turn: `opening`, the words, `closing`."""

    opening: str
    closing: str


def render_with_ranges(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> tuple[str, list[MessageRange]]:
    """The rendered conversation and where each message stands in it, in characters.

    What the template puts in front of the first message (a default system prompt) belongs to no message.

    Raises:
        InputError: see `render`; also an empty conversation.
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
    """The text that more messages add to a conversation under way, and where each of them stands in that text.

    Args:
        generation_prompt: add the opening of the reply as well.
        options: of the conversation; its tools are described already.

    Raises:
        InputError: see `render`; also a template that gives what follows a turn no fixed form.
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
    """A message's range, `distance` characters further on."""
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
    """The text that one more message adds to a conversation under way, and the opening of the reply if asked for."""
    return continuation(tokenizer, [message], generation_prompt, options)[0]


def first_turn_frame(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> Frame:
    """The text around the words of a first user turn, so that a document can be prefilled and its turn left open.

    Raises:
        InputError: the template does not show a user's words as they are.
    """
    opening, marker, closing = render(tokenizer, [{"role": "user", "content": CONTENT}], options).partition(CONTENT)
    if not marker:
        raise InputError("the chat template does not show a user's words as they are: use a model with another one")
    return Frame(opening, closing)


def first_turn_start(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> int | None:
    """Where the turn begins that `first_turn_frame` opens: behind a default system prompt. None: can't be told."""
    return RenderedChat(tokenizer, [{"role": "user", "content": CONTENT}], options).preamble


def reply_opening(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> str:
    """The text that opens an assistant's turn.

    Raises:
        InputError: the template does not add it at the end.
    """
    message = [{"role": "user", "content": "a"}]
    asked, opened = render(tokenizer, message, options), render(tokenizer, message, options, generation_prompt=True)
    if not opened.startswith(asked):
        raise InputError("the chat template does not open a reply at the end of the text: use a model with another one")
    return opened[len(asked) :]


def reply_closing(tokenizer: Any, options: ChatOptions = DEFAULT_OPTIONS) -> str:
    """The text that closes an assistant's turn."""
    return as_turn(tokenizer, {"role": "assistant", "content": CONTENT}, options=options).partition(CONTENT)[2]


def question_text(
    tokenizer: Any,
    question: str,
    turn_open: bool,
    answer_prefix: str = "",
    options: ChatOptions = DEFAULT_OPTIONS,
) -> str:
    """The text that asks `question`: in the open user turn, as a turn of its own, or plainly without a template.

    Args:
        answer_prefix: text that the assistant's turn begins with; the answer goes on from it.

    Raises:
        InputError: the question is empty, or an answer prefix that is blank or has no assistant's turn to stand in.
    """
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"the question is empty or no text ({question!r}): give some words")
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
    """A forced answer as it stands behind its prefix: with a space between two words."""
    apart = not answer_prefix or answer_prefix[-1].isspace() or answer[:1].isspace()
    return answer if apart else f" {answer}"


def _words(tokenizer: Any, text: str, what: str, options: ChatOptions) -> str:
    """A user's own text, its special tokens escaped unless they are allowed."""
    check_characters(text, what)
    words: str = text if options.allow_special else escaped(text, special_tokens(tokenizer))
    return words


# With their tokens


def document(tokenizer: Any, text: str, options: ChatOptions = DEFAULT_OPTIONS) -> TokenizedText:
    """A text that a context begins with; with a chat template it stands in the first user turn, which stays open.

    Raises:
        InputError: empty, or half a character.
    """
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"the text is empty or no text ({text!r}): give the context to read")
    templated = has_template(tokenizer)
    opening = first_turn_frame(tokenizer, options).opening if templated else ""
    words = _words(tokenizer, text, "the text", options)
    return tokenize(tokenizer, opening + words, special=not templated, body_start=len(opening))


def conversation(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> TokenizedText:
    """A conversation that a context begins with.

    Raises:
        InputError: see `render_with_ranges`.
    """
    text, ranges = render_with_ranges(tokenizer, messages, options)
    body = min((place.start for place in ranges if place.start < place.end), default=0)
    return tokenize(tokenizer, text, messages=ranges, body_start=body)


def added_messages(
    tokenizer: Any, messages: Sequence[ChatMessage], options: ChatOptions = DEFAULT_OPTIONS
) -> TokenizedText:
    """Messages that go on with a conversation.

    Raises:
        InputError: see `continuation`; also no message.
    """
    text, ranges = continuation(tokenizer, messages, options=options)
    if not text:
        raise InputError("nothing to append: give some messages")
    return tokenize(tokenizer, text, follows=True, messages=ranges)


def added_text(tokenizer: Any, text: str, options: ChatOptions = DEFAULT_OPTIONS) -> TokenizedText:
    """A user's text that goes on with a document.

    Raises:
        InputError: no text, or half a character.
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
