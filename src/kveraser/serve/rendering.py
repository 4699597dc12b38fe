"""Conversion of messages or a prompt to the tokens that a context should hold, with message boundaries."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from kveraser.errors import InputError
from kveraser.model.decode import text_with_offsets
from kveraser.serve.tool_results import ToolResultEdit, ToolUse, without_inputs, without_result
from kveraser.text import chat
from kveraser.text.spans import MessageRange, Transcript
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions
from kveraser.text.tokenized import TokenizedText, check_characters, encode, tokenize, unescaped

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Reading:
    """The tokens of a request.

    Attributes:
        text: the whole text, including cleared parts.
        tokens, offsets: of the whole text.
        stays: indices of the tokens that no edit clears.
        applied: reports of the applied edits.
    """

    tokenizer: Any = field(repr=False)
    text: str
    tokens: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    stays: Sequence[int]
    messages: Messages = ()
    options: ChatOptions = DEFAULT_OPTIONS
    applied: tuple[dict[str, Any], ...] = ()

    @cached_property
    def wanted(self) -> tuple[int, ...]:
        """The tokens that the context should hold."""
        return tuple(self.tokens[place] for place in self.stays)

    def rest(self, kept: int, end: int | None = None) -> TokenizedText:
        """The wanted tokens `[kept, end)`, by default to the last one, with their text."""
        text, offsets = "", list[tuple[int, int]]()
        before = self.stays[kept - 1] if kept else -1
        reached = self.offsets[before][1] if kept else 0
        for place in self.stays[kept:end]:
            start, stop = self.offsets[place]
            # Text between tokens belongs to the next one, except after a cleared token.
            piece = self.text[reached if place == before + 1 else max(start, reached) : stop]
            offsets.append((max(0, len(text) + len(piece) - (stop - start)), len(text) + len(piece)))
            text += piece
            before, reached = place, max(reached, stop)
        return TokenizedText(text, self.wanted[kept:end], tuple(offsets))

    def borders(self, first: int, last: int) -> list[int]:
        """Indices in `[first, last]` of the wanted tokens at which a message begins.

        Only prefixes of the conversation that end near these indices are rendered.
        """
        starts = [*(self.offsets[place][0] for place in self.stays), len(self.text)]
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
    tokenizer: Any, messages: Messages, options: ChatOptions = DEFAULT_OPTIONS, edits: Sequence[ToolResultEdit] = ()
) -> Reading:
    """Render a conversation with the opening of its reply, and apply `edits`.

    Cleared text is removed from the tokens of the whole conversation without tokenizing again at the span boundaries,
    so that a context with the whole conversation only needs an erase. If the template writes other text for an emptied
    message, the edited conversation is rendered instead.

    Raises:
        InputError: the conversation is empty, or as in `chat.render`.
    """
    if not messages:
        raise InputError("the conversation is empty: give at least one message")

    def rendered(conversation: Messages) -> str:
        return chat.render(tokenizer, conversation, options, generation_prompt=True)

    text = rendered(messages)
    read = tokenize(tokenizer, text)
    transcript = Transcript(read.text, list(read.tokens), list(read.offsets), [True] * len(read.tokens))
    applied: list[dict[str, Any]] = []
    edited: Messages = messages
    for number, edit in enumerate(edits):
        changes = [made for use in edit.chosen(edited, sum(transcript.live)) if (made := _changes(edit, edited, use))]
        left, gaps = edited, list[tuple[int, int] | None]()
        steps = [change for made in changes for change in made]
        for change in steps:
            left = change(left)
        gaps.extend(_contents_gone(tokenizer, messages, left, options, text) or ())
        if not gaps:
            gaps.extend(_gap(text, rendered(change(messages))) for change in steps)
        places = {
            place for gap in gaps if gap is not None for place in _touched(transcript, gap) if transcript.live[place]
        }
        anew = None if None not in gaps else read_messages(tokenizer, left, options, edits[number + 1 :])
        cleared = len(places) if anew is None else sum(transcript.live) - len(encode(tokenizer, rendered(left))[0])
        if cleared < max(1, edit.clear_at_least):
            continue
        applied.append(edit.applied(len(changes), cleared))
        if anew is not None:
            return replace(anew, applied=(*applied, *anew.applied))
        edited = left
        for place in places:
            transcript.live[place] = False
    stays = [place for place, live in enumerate(transcript.live) if live]
    return Reading(tokenizer, read.text, read.tokens, read.offsets, stays, messages, options, tuple(applied))


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
        return Reading(tokenizer, read.text, read.tokens, read.offsets, range(len(read.tokens)))
    outside = [token for token in prompt if not 0 <= token < len(tokenizer)]
    if outside:
        raise InputError(f"the prompt has token {outside[0]}, but the model's tokens are 0 to {len(tokenizer) - 1}")
    text, offsets = text_with_offsets(tokenizer, prompt)
    return Reading(tokenizer, text, tuple(prompt), offsets, range(len(prompt)))


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


def _changes(edit: ToolResultEdit, messages: Messages, use: ToolUse) -> list[Callable[[Messages], Messages]]:
    """The changes that clear a tool use; empty if it is already cleared."""
    steps = [partial(without_result, use=use), *([partial(without_inputs, use=use)] if edit.clears_inputs(use) else [])]
    return [step for step in steps if step(messages) != list(messages)]


def _contents_gone(
    tokenizer: Any, messages: Messages, left: Messages, options: ChatOptions, text: str
) -> list[tuple[int, int]] | None:
    """The character ranges of emptied contents, from a single rendering; None if the rest of the text changed, too."""
    pairs = enumerate(zip(messages, left, strict=True))
    gone = [index for index, (one, other) in pairs if one["content"] != other["content"]]
    places = set(gone)
    emptied = [{**one, "content": ""} if index in places else one for index, one in enumerate(messages)]
    if not gone or list(left) != emptied:
        return None
    whole, ranges = chat.render_with_ranges(tokenizer, messages, options)
    gaps = [(ranges[index].content_start, ranges[index].content_end) for index in gone]
    if not text.startswith(whole) or any(start >= end for start, end in gaps):
        return None
    kept, reached = "", 0
    for start, end in gaps:
        kept, reached = kept + text[reached:start], end
    shorter = chat.render(tokenizer, left, options, generation_prompt=True)
    return gaps if kept + text[reached:] == shorter else None


def _gap(text: str, shorter: str) -> tuple[int, int] | None:
    """The single range of characters whose removal from `text` gives `shorter`; None if there is none."""
    missing = len(text) - len(shorter)
    start = next(
        (place for place, (one, other) in enumerate(zip(text, shorter, strict=False)) if one != other), len(shorter)
    )
    return (start, start + missing) if missing > 0 and text[start + missing :] == shorter[start:] else None


def _touched(transcript: Transcript, gap: tuple[int, int]) -> range:
    span = transcript.snap(*gap)
    return range(span.start, span.end)
