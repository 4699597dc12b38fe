"""Conversion of messages or a prompt to the tokens that a context should hold, with message boundaries."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kveraser.errors import InputError
from kveraser.model.decode import text_with_offsets
from kveraser.serve.context_edits import ContextEdit, apply_edits, without_messages
from kveraser.text import chat
from kveraser.text.spans import MessageRange
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions
from kveraser.text.tokenized import TokenizedText, check_characters, tokenize, unescaped

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reading:
    """The text of a request, with its tokens.

    Attributes:
        text: the rendered conversation with the opening of its reply, or the prompt.
        wanted: its tokens, which the context should hold.
        offsets: of the tokens in the text.
        messages: after all edits.
        applied: reports of the applied context edits.
    """

    tokenizer: Any = field(repr=False)
    text: str
    wanted: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    messages: Messages = ()
    options: ChatOptions = DEFAULT_OPTIONS
    applied: tuple[dict[str, Any], ...] = ()

    def rest(self, kept: int, end: int | None = None) -> TokenizedText:
        """The tokens `[kept, end)`, by default to the last one, with their text."""
        offsets = self.offsets[kept:end]
        base = self.offsets[kept - 1][1] if kept else 0
        stop = max((last for _, last in offsets), default=base)
        moved = tuple((max(0, first - base), max(0, last - base)) for first, last in offsets)
        return TokenizedText(self.text[base:stop], tuple(self.wanted[kept:end]), moved)

    def borders(self, first: int, last: int) -> list[int]:
        """Indices in `[first, last]` of the tokens at which a message begins.

        Only prefixes of the conversation that end near these indices are rendered.
        """
        starts = [*(start for start, _ in self.offsets), len(self.text)]
        if not self.messages or first >= len(starts):
            return []
        low, high = starts[first], starts[min(last, len(starts) - 1)]
        ends: dict[int, str] = {}

        def end(count: int) -> int:
            if count not in ends:
                try:
                    ends[count] = unescaped(chat.render(self.tokenizer, self.messages[:count], self.options))
                except InputError:
                    # The template can't end the conversation here: use the end of the next message.
                    return end(count + 1) if count < len(self.messages) else len(self.text)
            return len(ends[count])

        found = []
        for count in range(bisect_left(range(1, len(self.messages) + 1), low, key=end) + 1, len(self.messages) + 1):
            if end(count) > high:
                break
            place = bisect_left(starts, end(count), first, min(last, len(starts) - 1) + 1)
            whole = count in ends and self.text.startswith(ends[count])
            if whole and place < len(starts) and starts[place] == end(count):
                found.append(place)
        return found


def read_messages(
    tokenizer: Any,
    messages: Messages,
    options: ChatOptions = DEFAULT_OPTIONS,
    edits: Sequence[ContextEdit] = (),
    dropped: Sequence[int] = (),
) -> Reading:
    """Render a conversation with the opening of its reply, without the `dropped` messages and after `edits`.

    Raises:
        InputError: the conversation is empty, or as in `chat.render` and `without_messages`.
    """
    if not messages:
        raise InputError("the conversation is empty: give at least one message")

    def read(conversation: Messages) -> TokenizedText:
        return tokenize(tokenizer, chat.render(tokenizer, conversation, options, generation_prompt=True))

    left, text, applied = apply_edits(without_messages(messages, dropped), edits, read)
    return Reading(tokenizer, text.text, text.tokens, text.offsets, left, options, applied)


def read_prompt(tokenizer: Any, prompt: str | Sequence[int]) -> Reading:
    """Read a prompt of text or token ids. Text gets the beginning-of-text token of the tokenizer, if it has one.

    Raises:
        InputError: the prompt is empty, contains unpaired surrogates, or unknown token ids.
    """
    if not prompt:
        raise InputError("the prompt is empty: give some text or tokens")
    if isinstance(prompt, str):
        # Clients of completions write control tokens themselves.
        check_characters(prompt, "the prompt")
        read = tokenize(tokenizer, prompt, special=True)
        return Reading(tokenizer, read.text, read.tokens, read.offsets)
    outside = [token for token in prompt if not 0 <= token < len(tokenizer)]
    if outside:
        raise InputError(f"the prompt has token {outside[0]}, but the model's tokens are 0 to {len(tokenizer) - 1}")
    text, offsets = text_with_offsets(tokenizer, prompt)
    return Reading(tokenizer, text, tuple(prompt), offsets)


def exchanged(
    tokenizer: Any, question: str, prompt: str, said: int, before: int, body_start: int | None
) -> TokenizedText:
    """The text that closes the turn of an answer, with the message ranges of question and answer at negative offsets.

    Args:
        prompt: the rendered question.
        said: number of characters of the answer.
        before: number of characters of the context before the question.
        body_start: offset of the text whose open turn the question continues; None: the question has its own turn.
    """
    opening = chat.reply_opening(tokenizer)
    asked = -said - len(prompt)
    if body_start is None:
        user = chat.moved(chat.continuation(tokenizer, [{"role": "user", "content": question}])[1][0], asked)
    else:
        words = body_start - before + asked, asked + prompt.index(question) + len(question)
        start = chat.first_turn_start(tokenizer)
        turn = words if start is None else (start - before + asked, -said - len(opening))
        user = MessageRange("user", *turn, *words, None, start is not None)
    closing = chat.reply_closing(tokenizer)
    answer = MessageRange("assistant", -said - len(opening), len(closing), -said, 0)
    return tokenize(tokenizer, closing, follows=True, messages=[user, answer])
