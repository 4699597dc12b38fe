"""From messages or a prompt to the tokens that a context is to hold, and where messages begin among them."""

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
    """A request as tokens.

    Attributes:
        text: all of it, with what edits clear.
        tokens, offsets: of the whole text.
        stays: places of the tokens that no edit clears.
        applied: what the edits did, as the response tells it.
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
        """The tokens that the context is to hold."""
        return tuple(self.tokens[place] for place in self.stays)

    def rest(self, kept: int, end: int | None = None) -> TokenizedText:
        """The wanted tokens `[kept, end)`, by default to the last one, with their text."""
        text, offsets = "", list[tuple[int, int]]()
        before = self.stays[kept - 1] if kept else -1
        reached = self.offsets[before][1] if kept else 0
        for place in self.stays[kept:end]:
            start, stop = self.offsets[place]
            # Text between tokens goes with the one behind it; behind a cleared token there is none.
            piece = self.text[reached if place == before + 1 else max(start, reached) : stop]
            offsets.append((max(0, len(text) + len(piece) - (stop - start)), len(text) + len(piece)))
            text += piece
            before, reached = place, max(reached, stop)
        return TokenizedText(text, self.wanted[kept:end], tuple(offsets))

    def borders(self, first: int, last: int) -> list[int]:
        """Which of the places `[first, last]` among the wanted tokens are borders of messages.

        Only messages near them are rendered for it, since a border is where rendering the messages before it ends.
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
                    # A conversation that can't stop here ends where the next message does.
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
    """A conversation with the opening of its reply, and what `edits` leave of it.

    What an edit clears is taken out of the tokens of the whole, which are not made anew at the seams, so that a context
    that holds the whole has to be erased from and no more. Where the template writes something else for an emptied
    message, the edited conversation is rendered instead.

    Raises:
        InputError: see `chat.render`; also an empty conversation.
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
    """A prompt as it is, a text with the tokenizer's own beginning-of-text marker in front.

    Raises:
        InputError: empty, half a character, or token ids that the tokenizer does not have.
    """
    if not prompt:
        raise InputError("the prompt is empty: give some text or tokens")
    if isinstance(prompt, str):
        # Clients of completions write the control tokens themselves.
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
    """The text that closes an answer's turn; question and answer stand before it as messages, at negative places.

    Args:
        prompt: the question as it was added.
        said: characters of the answer.
        before: characters of the context before the question.
        body_start: where the text begins whose open turn the question goes on with; None: it has a turn of its own.
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
    """What clearing a use does to the conversation; nothing where there is nothing left of it."""
    steps = [partial(without_result, use=use), *([partial(without_inputs, use=use)] if edit.clears_inputs(use) else [])]
    return [step for step in steps if step(messages) != list(messages)]


def _contents_gone(
    tokenizer: Any, messages: Messages, left: Messages, options: ChatOptions, text: str
) -> list[tuple[int, int]] | None:
    """The gaps that emptied contents leave, found by rendering once for all; None where more than contents changed."""
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
    """The characters of `text` without which it is `shorter`; None where it takes more than one gap."""
    missing = len(text) - len(shorter)
    start = next(
        (place for place, (one, other) in enumerate(zip(text, shorter, strict=False)) if one != other), len(shorter)
    )
    return (start, start + missing) if missing > 0 and text[start + missing :] == shorter[start:] else None


def _touched(transcript: Transcript, gap: tuple[int, int]) -> range:
    span = transcript.snap(*gap)
    return range(span.start, span.end)
