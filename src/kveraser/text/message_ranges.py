"""Where each message of a conversation stands in the text that the chat template makes of it.

Templates do more than concatenate: they trim, merge a system prompt into the first user turn, group tool results, drop
earlier reasoning, refuse conversations. So nothing is assumed about them. Where a message stands is found by rendering
the conversation with that message marked, ending there, and left out; what these don't agree on is not erasable as a
turn.
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
"""A text that no template alters and no message contains: marks where content goes."""

BESIDE_CONTENT = ("tool_calls", *REASONING)
"""What a message may say beside its content."""

TRIES = 3
"""How often the same kind of message is rendered anew where that does not tell where it ends."""

Range = tuple[int, int]


class RenderedChat:
    """A rendered conversation that can be asked where its messages stand.

    Args:
        messages: the messages, after `plain`.
        start: where the message numbered `first` begins, when that is known.
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
        """Where the messages from `first` on stand."""
        found = []
        for index, message in list(enumerate(self.messages))[self.first :]:
            turn, content = self._turn(index), self.contents[index] or (0, 0)
            call, own_turn = message.get("tool_call_id"), turn is not None
            body = self._body(index, turn) or (None, None)
            found.append(MessageRange(message["role"], *(turn or content), *content, call, own_turn, *body))
        return found

    def _body(self, index: int, turn: Range | None) -> Range | None:
        """Of a message with more than a content: all that stands between its turn's markers; None: can't be told."""
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
        # Templates that write empty reasoning open a reply without it.
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
        """What stands in a turn before and behind its body, for each pair of neighboring roles."""
        return {}

    def _render(self, messages: Sequence[Plain], generation_prompt: bool = False) -> str | None:
        """The text of a variant of the conversation; None where the template refuses it."""
        try:
            return apply(self.tokenizer, messages, self.options, generation_prompt) if messages else None
        except InputError:
            return None

    def _marked(self, index: int) -> Plain:
        return {**self.messages[index], "content": CONTENT}

    @cached_property
    def contents(self) -> list[Range | None]:
        """Where each message's content stands, as the template trims it; None where it has none or is altered."""
        # A template may leave out parts of a content (earlier reasoning) or its outer spaces, but not write another.
        return [
            place if place is not None and whole and self.text[slice(*place)] in message["content"] else None
            for message, (place, whole) in zip(self.messages, self._places, strict=True)
        ]

    @cached_property
    def _places(self) -> list[tuple[Range | None, bool]]:
        """What changes with each message's content, and whether that is the content and nothing else."""
        found: list[tuple[Range | None, bool]] = [
            (place, True) if place is not None else (None, False) for place in self._aligned
        ]
        for index, message in enumerate(self.messages):
            if self._aligned[index] is None and message["content"].strip():
                found[index] = self._place(index)
        return found

    @cached_property
    def _aligned(self) -> list[Range | None]:
        """Where contents stand, by one rendering with every content marked, compared with the text from both ends."""
        found: list[Range | None] = [None] * len(self.messages)
        marks = {index: f"\u2063{index}\u2063" for index, one in enumerate(self.messages) if one["content"].strip()}
        marked = self._render(
            [{**one, "content": marks.get(index, one["content"])} for index, one in enumerate(self.messages)]
        )
        # Contents that stand in another order, twice or not at all are looked for one by one.
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

    def _place(self, index: int) -> tuple[Range | None, bool]:
        marked = self._render([*self.messages[:index], self._marked(index), *self.messages[index + 1 :]])
        if marked is None or not self.messages[index]["content"].strip():
            return None, False
        opening, marker, closing = marked.partition(CONTENT)
        start, end = len(opening), len(self.text) - len(closing)
        if marker and start < end and self.text.startswith(opening) and self.text.endswith(closing):
            return (start, end), True
        return self._changed(marked), False

    def _changed(self, other: str) -> Range | None:
        """The part of the text that a variant has otherwise."""
        start = _common(self.text, other)
        end = len(self.text) - _common(self.text[::-1], other[::-1])
        return (start, max(start + 1, end)) if other != self.text else None

    @cached_property
    def _tools_place(self) -> Range | None:
        """A part of the tool descriptions, which belong to no message."""
        parameters: dict[str, Any] = {"type": "object", "properties": {}}
        extra = {"type": "function", "function": {"name": "a", "description": "b", "parameters": parameters}}
        try:
            more = replace(self.options, tools=[*self.options.tools, extra])
            return self._changed(apply(self.tokenizer, self.messages, more)) if self.options.tools else None
        except InputError:
            return None

    @cached_property
    def ends(self) -> list[int | None]:
        """Where each turn ends, as far as rendering the conversation up to it tells."""
        return [self._learned_end(index) for index in range(len(self.messages))]

    def _neighbors(self, index: int) -> tuple[Any, ...]:
        """What messages have in common whose turns end alike: roles and calls of this and the next, and the first."""
        pair = self.messages[index : index + 2]
        return *((one["role"], bool(one.get("tool_calls"))) for one in pair), index == 0

    def _learned_end(self, index: int) -> int | None:
        """As `_end`, which is asked only once for messages with the same text between them and the next."""
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
        """What closes a turn and what opens the next, for each pair of neighboring roles."""
        return {}

    @cached_property
    def _failed(self) -> Counter[tuple[Any, ...]]:
        """How often rendering up to a message did not tell where it ends, for each pair of neighboring roles."""
        return Counter()

    def _end(self, index: int) -> int | None:
        if index == len(self.messages) - 1:
            return len(self.text)
        part = self._render(self.messages[: index + 1])
        if part is not None and self.text.startswith(part):
            return len(part)
        # Rewritten by what follows (reasoning dropped): the turn still ends as it would have ended the conversation.
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
        """How many characters the template writes in front of the first message; None where that can't be told."""
        first, once = self.messages[0], self._render(self.messages[:1])
        for between in ([], [{"role": "assistant", "content": "a"}], [{"role": "user", "content": "a"}]):
            base, twice = self._render([first, *between]), self._render([first, *between, first])
            if once is None or base is None or twice is None or not twice.startswith(base):
                continue
            turn = twice[len(base) :]
            if turn and once.endswith(turn) and self.text.startswith(once):
                return len(once) - len(turn)
        marker = getattr(self.tokenizer, "bos_token", None) or ""
        # One that opens the text and no turn.
        return len(marker) if marker and self.text.startswith(marker) and self.text.count(marker) == 1 else None

    def _removable(self, index: int) -> tuple[int, int, int] | None:
        """How rendering without a message relates to the text: the length of what goes, and its possible starts.

        What goes may begin at several places when text repeats at its borders; removing it is the same from each.
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
        # Turns alike begin and end alike, counted from a content of their own or of their neighbors.
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
        # The first message may share its turn with the template's own words: without it, those stay.
        removed = self._removable(index)
        if removed is None:
            return turn
        length, least, most = removed
        first, last = self.contents[index] or (most, least + length)
        least, most = max(least, last - length), min(most, first)

        def merit(place: int) -> tuple[bool, bool, int]:
            """A turn's known border; no token cut; as much of the markers before the content as behind it."""
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
        """Of turns found by leaving them out: distances to the nearest contents, and the text between."""
        return {}

    @cached_property
    def _borders(self) -> set[int]:
        """Where tokens begin or end."""
        return {border for offsets in encode(self.tokenizer, self.text)[1] for border in offsets}

    def _holds_only(self, index: int, start: int, end: int) -> bool:
        """Whether `[start, end)` holds this message's content and nothing of the others'."""
        own, _ = self._places[index]
        others = [place for other, (place, _) in enumerate(self._places) if other != index]
        return (
            start < end
            and (own is None or (start <= own[0] and own[1] <= end))
            and all(other is None or other[1] <= start or end <= other[0] for other in [*others, self._tools_place])
        )


def _common(one: str, other: str) -> int:
    """Length of the common beginning of two texts."""
    return bisect_left(range(1, min(len(one), len(other)) + 1), True, key=lambda size: one[:size] != other[:size])
