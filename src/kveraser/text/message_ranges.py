"""Locates each message of a conversation in the rendered chat template.

Templates do more than concatenate: they trim content, merge a system prompt into the first user turn, group tool
results, drop earlier reasoning and refuse conversations. Message ranges are therefore found by rendering variants of
the conversation: with a message's content marked, ending after the message, and without the message. A message on which
the variants disagree can't be erased as a turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from kveraser.errors import InputError
from kveraser.text.spans import MessageRange
from kveraser.text.template import DEFAULT_OPTIONS, MARK, REASONING, ChatOptions, Plain, apply
from kveraser.text.tokenized import encode

CONTENT = "\u2063content\u2063"
"""Placeholder content of a message: text that no template alters and no message contains."""

BESIDE_CONTENT = ("tool_calls", *REASONING)
"""Fields of a message that templates render in addition to its content."""

TRIES = 3
"""Failed renderings after which no more are tried for the same kind of message."""

Range = tuple[int, int]


class RenderedChat:
    """A rendered conversation and the character ranges of its messages.

    Args:
        messages: output of `plain`.
        first: index of the first message to locate.
        start: first character of message `first`, if known.
    """

    def __init__(
        self,
        tokenizer: Any,
        messages: list[Plain],
        options: ChatOptions = DEFAULT_OPTIONS,
        first: int = 0,
        start: int | None = None,
    ) -> None:
        self.tokenizer, self.messages, self.options = tokenizer, messages, options
        self.first, self.given_start = first, start
        self.text = apply(tokenizer, messages, options)

    def ranges(self) -> list[MessageRange]:
        """Returns the ranges of the messages from `first` on."""
        found = []
        for index, message in list(enumerate(self.messages))[self.first :]:
            turn, content = self._turn(index), self.contents[index] or (0, 0)
            call, own_turn = message.get("tool_call_id"), turn is not None
            body = self._body(index, turn) or (None, None)
            found.append(MessageRange(message["role"], *(turn or content), *content, call, own_turn, *body))
        return found

    def _body(self, index: int, turn: Range | None) -> Range | None:
        """Range between the role markers of a message with tool calls or reasoning; None if it has neither or the range
        is unknown.
        """
        message, end = self.messages[index], turn[1] if turn is not None else self.ends[index]
        if end is None or not any(message.get(field) for field in BESIDE_CONTENT):
            return None
        key = self._neighbors(index)
        if turn is not None and key in self._bodies:
            lead, tail = self._bodies[key]
            if self.text.startswith(lead, turn[0]) and self.text.endswith(tail, 0, end):
                known = turn[0] + len(lead), end - len(tail)
                return known if known[0] < known[1] else None
        if self._failed["body", *key] == TRIES:
            return None
        earlier = self.messages[:index]
        bare = {name: value for name, value in self._marked(index).items() if name not in BESIDE_CONTENT}
        before, marker, closing = (self._render([*earlier, bare]) or "").partition(CONTENT)
        # Some templates write an empty reasoning block, which the generation prompt does not have.
        openings = [before, self._render(earlier, generation_prompt=True) or ""]
        opening = next((one for one in openings if one and self.text.startswith(one)), None)
        if not marker or opening is None or not self.text.endswith(closing, 0, end):
            self._failed["body", *key] += 1
            return None
        if turn is not None and turn[0] <= len(opening):
            self._bodies[key] = self.text[turn[0] : len(opening)], closing
        return (len(opening), end - len(closing)) if len(opening) < end - len(closing) else None

    @cached_property
    def _bodies(self) -> dict[tuple[Any, ...], tuple[str, str]]:
        """Text of a turn before and after its body, by `_neighbors`."""
        return {}

    def _render(self, messages: Sequence[Plain], generation_prompt: bool = False) -> str | None:
        """Render a variant of the conversation; None if the template refuses it."""
        try:
            return apply(self.tokenizer, messages, self.options, generation_prompt) if messages else None
        except InputError:
            return None

    def _marked(self, index: int) -> Plain:
        return {**self.messages[index], "content": CONTENT}

    @cached_property
    def contents(self) -> list[Range | None]:
        """Range of each message's content, as trimmed by the template; None if it is empty or altered."""
        # A template may drop parts of a content (earlier reasoning, outer spaces), but not rewrite it.
        return [
            place if place is not None and exact and self.text[slice(*place)] in message["content"] else None
            for message, (place, exact) in zip(self.messages, self._affected, strict=True)
        ]

    @cached_property
    def _affected(self) -> list[tuple[Range | None, bool]]:
        """Range that depends on each message's content, and whether it is the content alone."""
        found: list[tuple[Range | None, bool]] = [
            (place, True) if place is not None else (None, False) for place in self._aligned
        ]
        for index, message in enumerate(self.messages):
            if self._aligned[index] is None and message["content"].strip():
                found[index] = self._affected_by(index)
        return found

    @cached_property
    def _aligned(self) -> list[Range | None]:
        """Ranges of contents, from one rendering with all contents marked, aligned with the text from both ends."""
        found: list[Range | None] = [None] * len(self.messages)
        marks = {index: f"\u2063{index}\u2063" for index, one in enumerate(self.messages) if one["content"].strip()}
        marked = self._render(
            [{**one, "content": marks.get(index, one["content"])} for index, one in enumerate(self.messages)]
        )
        # Contents that are reordered, repeated or left out are located one by one.
        order = [int(number) for number in MARK.findall(marked or "")]
        if marked is None or order != list(marks):
            return found
        pieces = MARK.split(marked)[::2]
        place = len(pieces[0])
        front, back = self.text.startswith(pieces[0]), self.text.endswith(pieces[-1])
        for index, literal in zip(order, pieces[1:], strict=True):
            content = self.messages[index]["content"]
            fits = [
                place + len(one)
                for one in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
                if front and self.text.startswith(one, place) and self.text.startswith(literal, place + len(one))
            ]
            if not fits:
                break
            found[index], place = (place, fits[0]), fits[0] + len(literal)
        if found and all(found[index] is not None for index in order):
            return found if place == len(self.text) else [None] * len(self.messages)
        place = len(self.text) - len(pieces[-1])
        for index, literal in zip(order[::-1], pieces[-2::-1], strict=True):
            if not back or found[index] is not None:
                break
            content = self.messages[index]["content"]
            begins = [
                place - len(one)
                for one in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip()))
                if self.text.endswith(one, 0, place) and self.text.endswith(literal, 0, place - len(one))
            ]
            if not begins:
                break
            found[index], place = (begins[0], place), begins[0] - len(literal)
        return found

    def _affected_by(self, index: int) -> tuple[Range | None, bool]:
        marked = self._render([*self.messages[:index], self._marked(index), *self.messages[index + 1 :]])
        if marked is None or not self.messages[index]["content"].strip():
            return None, False
        opening, marker, closing = marked.partition(CONTENT)
        start, end = len(opening), len(self.text) - len(closing)
        if marker and start < end and self.text.startswith(opening) and self.text.endswith(closing):
            return (start, end), True
        return self._changed(marked), False

    def _changed(self, other: str) -> Range | None:
        """Range of the text that differs from a variant."""
        start = _common(self.text, other)
        end = len(self.text) - _common(self.text[::-1], other[::-1])
        return (start, max(start + 1, end)) if other != self.text else None

    @cached_property
    def _tools_place(self) -> Range | None:
        """Range within the tool descriptions, which belong to no message."""
        parameters: dict[str, Any] = {"type": "object", "properties": {}}
        extra = {"type": "function", "function": {"name": "a", "description": "b", "parameters": parameters}}
        try:
            more = replace(self.options, tools=[*self.options.tools, extra])
            return self._changed(apply(self.tokenizer, self.messages, more)) if self.options.tools else None
        except InputError:
            return None

    @cached_property
    def ends(self) -> list[int | None]:
        """End of each turn, from rendering the conversation up to it; None if unknown."""
        return [self._learned_end(index) for index in range(len(self.messages))]

    def _neighbors(self, index: int) -> tuple[Any, ...]:
        """Key of messages whose turns have the same markers: roles and tool calls of this and the next message."""
        pair = self.messages[index : index + 2]
        return *((one["role"], bool(one.get("tool_calls"))) for one in pair), index == 0

    def _learned_end(self, index: int) -> int | None:
        """As `_end`, but rendered once for all messages with the same markers."""
        if index == len(self.messages) - 1:
            return self._end(index)
        content, after, key = self.contents[index], self.contents[index + 1], self._neighbors(index)
        calls = bool(self.messages[index].get("tool_calls"))
        if self._failed[key] == TRIES:
            return None
        closing, opening = self._learned.get(key, (None, None))
        if content is not None and closing is not None and not calls:
            end = content[1] + len(closing)
            if self.text.startswith(closing, content[1]) and (
                after is None or opening is None or self.text[end : after[0]] == opening
            ):
                return end
        elif after is not None and opening is not None and self.text.endswith(opening, 0, after[0]):
            return after[0] - len(opening)
        found = self._end(index)
        self._failed[key] += found is None
        if found is not None:
            self._learned[key] = (
                self.text[content[1] : found] if content is not None and not calls else closing,
                self.text[found : after[0]] if after is not None else opening,
            )
        return found

    @cached_property
    def _learned(self) -> dict[tuple[Any, ...], tuple[str | None, str | None]]:
        """Text that closes a turn and text that opens the next one, by `_neighbors`."""
        return {}

    @cached_property
    def _failed(self) -> Counter[tuple[Any, ...]]:
        """Number of renderings that did not show where a message ends, by `_neighbors`."""
        return Counter()

    def _end(self, index: int) -> int | None:
        if index == len(self.messages) - 1:
            return len(self.text)
        part = self._render(self.messages[: index + 1])
        if part is not None and self.text.startswith(part):
            return len(part)
        # A later message can change this one (drop its reasoning), but not the text that closes its turn.
        content, marked = self.contents[index], self._render([*self.messages[:index], self._marked(index)])
        if content is None or marked is None or marked.count(CONTENT) != 1:
            return None
        closing = marked.partition(CONTENT)[2]
        return content[1] + len(closing) if self.text.startswith(closing, content[1]) else None

    def _start(self, index: int) -> int | None:
        if index > self.first:
            return self.ends[index - 1]
        return self.given_start if self.given_start is not None else self.preamble

    @cached_property
    def preamble(self) -> int | None:
        """Number of characters that the template writes before the first message; None if unknown."""
        first, once = self.messages[0], self._render(self.messages[:1])
        for between in ([], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}]):
            base, twice = self._render([first, *between]), self._render([first, *between, first])
            if once is None or base is None or twice is None or not twice.startswith(base):
                continue
            turn = twice[len(base) :]
            if turn and once.endswith(turn) and self.text.startswith(once):
                return len(once) - len(turn)
        marker = getattr(self.tokenizer, "bos_token", None) or ""
        # A BOS token that occurs once does not belong to a turn.
        return len(marker) if marker and self.text.startswith(marker) and self.text.count(marker) == 1 else None

    def _removable(self, index: int) -> tuple[int, int, int] | None:
        """Compare the text with a rendering without the message: number of removed characters, first and last start.

        The start is ambiguous if text repeats at the boundaries: removing from any of them gives the same text.
        """
        rest = self._render([*self.messages[:index], *self.messages[index + 1 :]])
        if rest is None or len(rest) >= len(self.text):
            return None
        low = len(rest) - _common(self.text[::-1], rest[::-1])
        high = _common(self.text, rest)
        return (len(self.text) - len(rest), low, high) if low <= high else None

    def _turn(self, index: int) -> Range | None:
        start, end = self._start(index), self.ends[index]
        turn = (start, end) if start is not None and end is not None and self._holds_only(index, start, end) else None
        if turn is not None and index > 0:
            return turn
        key, message = self._neighbors(index), self.messages[index]
        after = self.contents[index + 1] if index + 1 < len(self.messages) else None
        own, before = self.contents[index], self.contents[index - 1] if index > 0 else None
        if message.get("tool_calls"):
            own = None
        # Turns with the same markers have the same distances to the nearest contents.
        low = own[0] if own is not None else before[1] if before is not None else None
        high = own[1] if own is not None else after[0] if after is not None else None
        if key in self._removed and low is not None and high is not None:
            known = low + self._removed[key][0], high + self._removed[key][1]
            edges = (
                self.text[min(known[0], low) : max(known[0], low)],
                self.text[min(known[1], high) : max(known[1], high)],
            )
            if edges == self._removed[key][2:] and self._holds_only(index, *known):
                return known
        # The first turn may also hold the template's own text, which is still rendered without the message.
        removed = self._removable(index)
        if removed is None:
            return turn
        length, least, most = removed
        first, last = self.contents[index] or (most, least + length)
        least, most = max(least, last - length), min(most, first)

        def merit(place: int) -> tuple[bool, bool, int]:
            """Prefer a known boundary of the turn, then whole tokens, then equal margins around the content."""
            cut = place not in self._borders or place + length not in self._borders
            return place in (start, (end or 0) - length), not cut, min(first - place, place + length - last)

        place = max(range(least, most + 1), key=merit, default=None)
        fits = place is not None and self._holds_only(index, place, place + length)
        if place is None or not fits:
            return turn
        if index > 0 and low is not None and high is not None:
            end = place + length
            edges = self.text[min(place, low) : max(place, low)], self.text[min(end, high) : max(end, high)]
            self._removed[key] = place - low, end - high, *edges
        return place, place + length

    @cached_property
    def _removed(self) -> dict[tuple[Any, ...], tuple[int, int, str, str]]:
        """For turns located by `_removable`: distances to the nearest contents and the text in between."""
        return {}

    @cached_property
    def _borders(self) -> set[int]:
        """Token boundaries, in characters."""
        return {border for offsets in encode(self.tokenizer, self.text)[1] for border in offsets}

    def _holds_only(self, index: int, start: int, end: int) -> bool:
        """Whether `[start, end)` holds this message's content and none of another message or a tool description."""
        own, _ = self._affected[index]
        others = [place for other, (place, _) in enumerate(self._affected) if other != index]
        return (
            start < end
            and (own is None or (start <= own[0] and own[1] <= end))
            and all(other is None or other[1] <= start or end <= other[0] for other in [*others, self._tools_place])
        )


def _common(one: str, other: str) -> int:
    """Length of the common prefix of two texts."""
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda size: one[:size] != other[:size])
