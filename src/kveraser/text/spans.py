"""Selectors (text, pattern, character range, message, tool call) and the token spans that they resolve to."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Protocol, TypeAlias

from kveraser.errors import AmbiguousSpanError, SpanError

SHOWN_OCCURRENCES = 12
SHOWN_CONTEXT = 20


@dataclass(frozen=True, order=True)
class Span:
    """A half-open range of tokens or slots, `[start, end)`, never empty."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise SpanError(f"the span [{self.start}, {self.end}) is empty: give at least one token to erase")

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class MessageRange:
    """Character ranges of a chat message in the transcript.

    Attributes:
        start, end: the whole turn, role markers included.
        content_start, content_end: the content; empty if the message has none or the template alters it.
        own_turn: False if the template merges the message into another turn, such as a system prompt into the first
            user turn; `start` and `end` are then those of the content.
        body_start, body_end: content, tool calls and reasoning, without role markers; None if the body is the content.
    """

    role: str
    start: int
    end: int
    content_start: int
    content_end: int
    tool_call_id: str | None = None
    own_turn: bool = True
    body_start: int | None = None
    body_end: int | None = None


@dataclass(frozen=True)
class Place(Span):
    """An insertion point: an empty range before the token or slot `start`."""

    def __post_init__(self) -> None:
        if self.start != self.end:
            raise SpanError(f"the place [{self.start}, {self.end}) is not empty: give a Span")


@dataclass
class Transcript:
    """The text of a session with its tokens, erased ones included.

    Erasing only clears `live`, so indices do not change. Inserting text shifts the indices after it.

    Attributes:
        text: all text, special tokens included as text.
        tokens: token ids.
        offsets: `(start, end)` of every token in `text`, in characters; both non-decreasing.
        live: for every token, whether it has not been erased.
        inserted: for every token, whether an edit inserted it.
        messages: the chat messages, in order.
        body_start: first character of the user's own text. Selectors ignore what the chat template writes before it.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    live: list[bool] = field(default_factory=list)
    inserted: list[bool] = field(default_factory=list)
    messages: list[MessageRange] = field(default_factory=list)
    body_start: int = 0

    def append(self, text: str, tokens: Sequence[int], offsets: Sequence[tuple[int, int]]) -> None:
        """Append `text` with its tokens; `offsets` are relative to `text`."""
        base = len(self.text)
        self.text += text
        self.tokens += tokens
        self.offsets += [(base + start, base + end) for start, end in offsets]
        self.live += [True] * len(tokens)
        self.inserted += [False] * len(tokens)

    def insert(
        self, index: int, text: str, tokens: Sequence[int], offsets: Sequence[tuple[int, int]], replaced: int = 0
    ) -> None:
        """Insert `text` with its tokens before token `index`.

        Args:
            offsets: character ranges of the tokens, relative to `text`.
            replaced: number of tokens before `index` that the text replaces; it is inserted into their message.
        """
        place = self.offsets[index - 1][1] if index else 0
        anchor = self.offsets[index - replaced][0] if replaced else place
        size, count = len(text), len(tokens)
        moved = [(start + size, end + size) for start, end in self.offsets[index:]]
        self.text = self.text[:place] + text + self.text[place:]
        self.offsets[index:] = [(place + start, place + end) for start, end in offsets] + moved
        self.tokens[index:index] = tokens
        self.live[index:index] = [True] * count
        self.inserted[index:index] = [True] * count
        self.messages[:] = [_widened(message, anchor, place, size) for message in self.messages]

    def copy(self) -> Transcript:
        """An independent copy."""
        return replace(
            self,
            tokens=list(self.tokens),
            offsets=list(self.offsets),
            live=list(self.live),
            inserted=list(self.inserted),
            messages=list(self.messages),
        )

    @property
    def original(self) -> list[int]:
        """Token ids before all edits: with erased tokens, without inserted ones."""
        return [token for token, inserted in zip(self.tokens, self.inserted, strict=True) if not inserted]

    def truncate(self, tokens: int, characters: int, messages: int) -> None:
        """Truncate to the given numbers of tokens, characters and messages."""
        self.text = self.text[:characters]
        del self.tokens[tokens:], self.offsets[tokens:], self.live[tokens:], self.inserted[tokens:]
        del self.messages[messages:]

    def live_text(self, start: int, end: int) -> str:
        """The text of the live tokens among tokens `[start, end)`."""
        pieces, reached = [], 0
        for live, (first, last) in zip(self.live[start:end], self.offsets[start:end], strict=True):
            # Several tokens may share a character.
            if live:
                pieces.append(self.text[max(first, reached) : last])
            reached = max(reached, last)
        return "".join(pieces)

    def text_of(self, span: Span) -> str:
        """The text of the tokens of `span`."""
        return self.text[self.offsets[span.start][0] : self.offsets[span.end - 1][1]]

    def snap(self, start: int, end: int) -> Span:
        """Returns the tokens that overlap the characters `[start, end)`, snapped outwards to whole tokens.

        Raises:
            SpanError: the range is empty or outside the text.
        """
        if start >= end:
            raise SpanError(f"the characters [{start}, {end}) are an empty span: give at least one character to erase")
        if start < 0 or end > len(self.text):
            raise SpanError(
                f"the characters [{start}, {end}) lie outside the context, which has {len(self.text)} characters"
            )
        first = bisect_right(self.offsets, start, key=lambda offset: offset[1])
        last = bisect_left(self.offsets, end, key=lambda offset: offset[0])
        # Skip zero-width tokens, such as a BOS token before the text.
        while first < last and self.offsets[first][0] == self.offsets[first][1]:
            first += 1
        if first >= last:
            raise SpanError(f"no token covers the characters [{start}, {end}): choose a longer piece of text")
        return Span(first, last)

    def occurrences(self, found: Iterable[tuple[int, int]]) -> list[tuple[tuple[int, int], Span]]:
        """Filter the character ranges in `found` to those whose tokens are all live, with their token spans."""
        spans = [((start, end), self.snap(start, end)) for start, end in found if end > start]
        return [(characters, span) for characters, span in spans if all(self.live[span.start : span.end])]


class Selector(Protocol):
    """Selects parts of a transcript."""

    def resolve(self, transcript: Transcript) -> list[Span]:
        """Returns the selected token spans.

        Raises:
            SpanError: nothing matches, the range is outside the context, or the match is erased already.
        """
        ...


@dataclass(frozen=True)
class Tokens:
    """Tokens `[start, end)` of the transcript."""

    start: int
    end: int

    def __post_init__(self) -> None:
        _check(self, start=Integral, end=Integral)

    def resolve(self, transcript: Transcript) -> list[Span]:
        if self.start < 0 or self.end > len(transcript.tokens):
            raise SpanError(
                f"the tokens [{self.start}, {self.end}) lie outside the context, "
                f"which has {len(transcript.tokens)} tokens"
            )
        return [Span(self.start, self.end)]


@dataclass(frozen=True)
class Characters:
    """Characters `[start, end)`, snapped outwards to whole tokens.

    Counted from the beginning of the user's own text, erased characters included.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        _check(self, start=Integral, end=Integral)

    def resolve(self, transcript: Transcript) -> list[Span]:
        base, length = transcript.body_start, len(transcript.text)
        if self.start >= self.end:
            raise SpanError(
                f"the characters [{self.start}, {self.end}) are an empty span: give at least one character to erase"
            )
        if self.start < 0 or base + self.end > length:
            raise SpanError(
                f"the characters [{self.start}, {self.end}) lie outside the context, "
                f"which has {length - base} characters"
            )
        return [transcript.snap(base + self.start, base + self.end)]


@dataclass(frozen=True)
class Text:
    """An exact text. `occurrence`, from 1, is required if it occurs more than once."""

    text: str
    occurrence: int | None = None

    def __post_init__(self) -> None:
        _check(self, text=str, occurrence=(Integral, None))

    def resolve(self, transcript: Transcript) -> list[Span]:
        if not self.text:
            raise SpanError("the text to erase is empty: give the words to erase")
        matches = list(_find_all(transcript.text, self.text, transcript.body_start))
        if not matches:
            matches = list(_find_equivalent(transcript.text, self.text, transcript.body_start))
        live = transcript.occurrences(matches)
        if not live:
            raise SpanError(_not_found(transcript.text[transcript.body_start :], self.text, erased=bool(matches)))
        if self.occurrence is None and len(live) > 1:
            base = transcript.body_start
            shown = [
                transcript.text[max(base, start - SHOWN_CONTEXT) : end + SHOWN_CONTEXT]
                for (start, end), _ in live[:SHOWN_OCCURRENCES]
            ]
            raise AmbiguousSpanError(self.text, [(start - base, end - base) for (start, end), _ in live], shown)
        if self.occurrence is not None and not 1 <= self.occurrence <= len(live):
            raise SpanError(f"{self.text!r} has no occurrence {self.occurrence}: it occurs {len(live)} times")
        return [live[(self.occurrence or 1) - 1][1]]


@dataclass(frozen=True)
class Pattern:
    """A regular expression: all matches, or only match number `occurrence`, from 1."""

    pattern: str
    occurrence: int | None = None

    def __post_init__(self) -> None:
        _check(self, pattern=str, occurrence=(Integral, None))

    def resolve(self, transcript: Transcript) -> list[Span]:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise SpanError(f"the pattern {self.pattern!r} is not a regular expression: {error}") from error
        found = [match.span() for match in compiled.finditer(transcript.text, transcript.body_start)]
        live = transcript.occurrences(found)
        if not live:
            reason = "matches nothing in the context: try it on the text with re.findall"
            if found:
                empty = all(start == end for start, end in found)
                reason = "matches empty text only" if empty else "matches only what is erased already"
            raise SpanError(f"the pattern {self.pattern!r} {reason}")
        if self.occurrence is None:
            return [span for _, span in live]
        if not 1 <= self.occurrence <= len(live):
            raise SpanError(
                f"the pattern {self.pattern!r} has no match {self.occurrence}: it matches {len(live)} times"
            )
        return [live[self.occurrence - 1][1]]


@dataclass(frozen=True)
class Message:
    """A chat message by its index in the conversation; negative indices count from the end.

    Selects the whole turn with its role markers, so the exact reference is the conversation without the message. With
    `keep_turn`, the role markers stay and only content, tool calls and reasoning are selected.
    """

    index: int
    keep_turn: bool = False

    def __post_init__(self) -> None:
        _check(self, index=Integral, keep_turn=bool)

    def resolve(self, transcript: Transcript) -> list[Span]:
        count = len(transcript.messages)
        if not -count <= self.index < count:
            raise SpanError(
                f"no message {self.index}: the conversation has {count} messages"
                + ("" if count else " (text sessions have none: erase by text instead)")
            )
        return [_message_span(transcript, self.index % count, self.keep_turn)]


@dataclass(frozen=True)
class ToolCall:
    """The result of a tool call, by the id of the call; the call itself stays. `keep_turn` as for `Message`."""

    tool_call_id: str
    keep_turn: bool = False

    def __post_init__(self) -> None:
        _check(self, tool_call_id=str, keep_turn=bool)

    def resolve(self, transcript: Transcript) -> list[Span]:
        ids = [message.tool_call_id for message in transcript.messages]
        found = [index for index, known in enumerate(ids) if known == self.tool_call_id]
        if not found:
            listed = ", ".join(repr(known) for known in ids if known) or "none"
            raise SpanError(f"no result of a tool call {self.tool_call_id!r}: the conversation has {listed}")
        if len(found) > 1:
            raise SpanError(
                f"the tool call id {self.tool_call_id!r} occurs in messages {', '.join(map(str, found))}: "
                "say which with Message(index)"
            )
        return [_message_span(transcript, found[0], self.keep_turn)]


Erasable: TypeAlias = "str | Selector | Sequence[str | Selector]"
"""A selector, a text, or a sequence of them."""


def resolve(transcript: Transcript, what: Erasable) -> list[Span]:
    """Returns the token spans that `what` selects, in order; overlapping and adjacent spans are merged.

    Raises:
        SpanError: see the selectors; also if a span is erased already or nothing would remain.
    """
    selectors = [what] if isinstance(what, str) or not isinstance(what, Sequence) else list(what)
    if not selectors:
        raise SpanError("no span given: say what to erase")
    spans: list[Span] = []
    for selector in selectors:
        if not isinstance(selector, str) and not callable(getattr(selector, "resolve", None)):
            raise SpanError(
                f"{selector!r} is not a span: give a text, or a selector such as Characters(10, 20) or Message(3)"
            )
        for span in (Text(selector) if isinstance(selector, str) else selector).resolve(transcript):
            if not any(transcript.live[span.start : span.end]):
                raise SpanError(f"{_shorten(transcript.text_of(span))!r} is erased already")
            spans.append(span)
    erased = {token for span in merge(spans) for token in range(span.start, span.end)}
    # A BOS token and the template's text before the first message do not count as context.
    if not any(
        live and token not in erased and transcript.offsets[token][1] > transcript.body_start
        for token, live in enumerate(transcript.live)
    ):
        raise SpanError("the span is the whole context and nothing would remain: start a new session instead")
    return merge(spans)


def in_turn(selector: Selector) -> Selector:
    """Set `keep_turn` on a selector of a message or tool result; other selectors are returned unchanged."""
    return replace(selector, keep_turn=True) if isinstance(selector, Message | ToolCall) else selector


def margins(transcript: Transcript, selector: Selector, span: Span) -> tuple[str, str]:
    """Returns the text that snapping to whole tokens added before and after the selected characters."""
    text = transcript.text_of(span)
    if isinstance(selector, Text):
        start = text.find(selector.text)
        named = (start, start + len(selector.text)) if start >= 0 else (0, len(text))
    elif isinstance(selector, Pattern):
        match = re.search(selector.pattern, text)
        named = match.span() if match else (0, len(text))
    elif isinstance(selector, Characters):
        first = transcript.offsets[span.start][0] - transcript.body_start
        named = max(0, selector.start - first), selector.end - first
    else:
        named = 0, len(text)
    return text[: named[0]], text[named[1] :]


def replacements(transcript: Transcript, what: Erasable, text: str) -> list[tuple[Span, str]]:
    """Returns the token spans that `what` selects, in order, each with its replacement text.

    The replacement is `text`, between the characters that snapping to whole tokens added. Role markers of messages are
    kept.

    Raises:
        SpanError: see `resolve`.
    """
    found = []
    for one in [what] if isinstance(what, str) or not isinstance(what, Sequence) else what:
        selector = in_turn(Text(one) if isinstance(one, str) else one)
        for span in resolve(transcript, selector):
            before, after = margins(transcript, selector, span)
            found.append((span, before + text + after))
    return sorted(found, key=lambda pair: pair[0].start)


def place_of(transcript: Transcript, position: int) -> Place:
    """Returns the insertion point at character `position`, counted as in `Characters`.

    Raises:
        SpanError: the position is outside the context or inside a token.
    """
    character, length = transcript.body_start + position, len(transcript.text)
    if not transcript.body_start <= character <= length:
        raise SpanError(f"the character {position} lies outside the context, which has {length} characters")
    token = bisect_left(transcript.offsets, character, key=lambda offset: offset[0])
    if token and transcript.offsets[token - 1][1] > character:
        start, end = transcript.offsets[token - 1]
        raise SpanError(
            f"the character {position} lies inside the token {transcript.text[start:end]!r}: insert at "
            f"{start - transcript.body_start} or {end - transcript.body_start}"
        )
    return Place(token, token)


def merge(spans: Iterable[Span]) -> list[Span]:
    """Sort spans and merge those that overlap or are adjacent."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def selector_from_json(value: Any) -> Selector:
    """Parse a selector of a case file.

    Args:
        value: a text, `[start, end]` in characters, or an object such as `{"message": 3}` or `{"tokens": [12, 40]}`.

    Raises:
        SpanError: the value has another form.
    """
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value):
        return Characters(*value)
    forms: dict[str, type[Any]] = {
        "text": Text, "pattern": Pattern, "message": Message, "tool_call_id": ToolCall, "tokens": Tokens,
    }  # fmt: skip
    if isinstance(value, Mapping):
        for key, form in forms.items():
            if key in value:
                options = {name: option for name, option in value.items() if name != key}
                # A range takes two numbers, everything else one value.
                given = value[key] if form is Tokens and isinstance(value[key], list) else [value[key]]
                try:
                    selector: Selector = form(*given, **options)
                except (TypeError, SpanError) as error:
                    raise SpanError(f"{_shorten(repr(dict(value)), 200)} is not a span: {error}") from error
                return selector
    shown = _shorten(repr(value), 200)
    raise SpanError(f'{shown} is not a span: give a text, [start, end] in characters, or {{"message": index}}')


def _check(selector: Any, **kinds: Any) -> None:
    """Check the types of a selector's fields."""
    names = {Integral: "a whole number", str: "a text", bool: "True or False"}
    for name, kind in kinds.items():
        value = getattr(selector, name)
        optional = isinstance(kind, tuple)
        wanted = kind[0] if optional else kind
        if value is None and optional:
            continue
        if not isinstance(value, wanted) or (wanted is Integral and isinstance(value, bool)):
            shown = _shorten(repr(value), 200)
            raise SpanError(f"{type(selector).__name__}: {name} is {shown}: give {names[wanted]}")


def _find_all(text: str, wanted: str, begin: int) -> Iterable[tuple[int, int]]:
    start = text.find(wanted, begin)
    while start >= 0:
        yield start, start + len(wanted)
        start = text.find(wanted, start + 1)


def _find_equivalent(text: str, wanted: str, begin: int) -> Iterable[tuple[int, int]]:
    """Find canonically equivalent text: the same characters with accents composed in another way (Unicode NFD)."""
    if text.isascii() or wanted.isascii():
        return
    pieces = [unicodedata.normalize("NFD", character) for character in text]
    origins = [index for index, piece in enumerate(pieces) for _ in piece]
    decomposed, sought = "".join(pieces), unicodedata.normalize("NFD", wanted)
    for start, end in _find_all(decomposed, sought, bisect_left(origins, begin)):
        inside = start > 0 and origins[start - 1] == origins[start]
        accented = end < len(decomposed) and unicodedata.combining(decomposed[end])
        if not (inside or accented):
            yield origins[start], origins[end - 1] + 1


def _not_found(text: str, wanted: str, erased: bool) -> str:
    shown = repr(_shorten(wanted))
    if erased:
        return f"{shown} is erased already"
    loose = re.search(r"\s+".join(map(re.escape, wanted.split())), text, re.IGNORECASE) if wanted.strip() else None
    if loose is not None:
        return f"{shown} is not in the context; letters or spaces differ in {_shorten(loose.group())!r}"
    return f"{shown} is not in the context: give the exact text"


def _message_span(transcript: Transcript, index: int, keep_turn: bool) -> Span:
    message = transcript.messages[index]
    has_content = message.content_start < message.content_end
    if not keep_turn and not message.own_turn:
        raise SpanError(
            f"message {index} ({message.role}) has no turn of its own in this model's chat template: "
            + ("erase its content with keep_turn=True, or parts of it by text" if has_content else "erase it by text")
        )
    if not keep_turn:
        return transcript.snap(message.start, message.end)
    if message.body_start is not None and message.body_end is not None:
        return transcript.snap(message.body_start, message.body_end)
    if not has_content:
        raise SpanError(
            f"message {index} ({message.role}) has no content, or the chat template alters it: "
            + ("erase the whole turn" if message.own_turn else "erase it by text")
        )
    return transcript.snap(message.content_start, message.content_end)


def _widened(message: MessageRange, anchor: int, place: int, size: int) -> MessageRange:
    """Shift a message's ranges for `size` characters inserted at `place`; ranges that hold `anchor` grow instead."""

    def moved(start: int | None, end: int | None) -> tuple[int | None, int | None]:
        if start is None or end is None:
            return start, end
        if start <= anchor <= end and place <= end and (anchor < end or start == end or anchor == place):
            return start, end + size
        return (start + size, end + size) if start >= place else (start, end)

    start, end = moved(message.start, message.end)
    content_start, content_end = moved(message.content_start, message.content_end)
    body_start, body_end = moved(message.body_start, message.body_end)
    assert start is not None and end is not None and content_start is not None and content_end is not None
    return replace(
        message, start=start, end=end, content_start=content_start, content_end=content_end,
        body_start=body_start, body_end=body_end,
    )  # fmt: skip


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
