"""Selectors from clients: the library's, and patterns that can't look for ever."""

from __future__ import annotations

import random

import pytest

from kveraser.errors import SpanError
from kveraser.serve import sessions
from kveraser.serve.sessions import TimedPattern, read_selectors
from kveraser.text.spans import Characters, Pattern, Text, Transcript, resolve
from tests.sessions import TEXT


def transcript(text: str = TEXT, erased: tuple[int, int] = (0, 0)) -> Transcript:
    """A token a character."""
    offsets = [(place, place + 1) for place in range(len(text))]
    return Transcript(
        text, [1] * len(text), offsets, [not erased[0] <= place < erased[1] for place in range(len(text))]
    )


def test_one_selector_or_several() -> None:
    assert read_selectors("Ada") == [Text("Ada")]
    assert read_selectors([3, 9]) == [Characters(3, 9)]
    assert read_selectors([[3, 9], "Ada", {"pattern": "x", "occurrence": 2}]) == [
        Characters(3, 9), Text("Ada"), TimedPattern("x", 2),
    ]  # fmt: skip
    for wrong in (None, 3, [3, 9, 12], [[3]], {"span": 1}):
        with pytest.raises(SpanError):
            read_selectors(wrong)


def test_a_pattern_finds_what_the_librarys_does() -> None:
    draw = random.Random(1)
    for pattern in (r"\w+ship", r"[A-Z]\w+", r"s(?:he|hip)\b", r"(?i)THE \w+", r"\d+", r"^The", r"(\w)\1"):
        for _ in range(6):
            start = draw.randrange(len(TEXT) - 30)
            text = transcript(erased=(start, start + 25))
            for occurrence in (None, 1, 2):
                try:
                    expected = resolve(text, Pattern(pattern, occurrence))
                except SpanError:
                    with pytest.raises(SpanError):
                        resolve(text, TimedPattern(pattern, occurrence))
                else:
                    assert resolve(text, TimedPattern(pattern, occurrence)) == expected


def test_a_pattern_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PATTERN_SECONDS", 0.05)
    with pytest.raises(SpanError, match="too long"):
        resolve(transcript("a" * 5000 + "b"), TimedPattern(r"(a|aa)+$", None))
    with pytest.raises(SpanError, match="not a regular expression"):
        resolve(transcript(), TimedPattern("(", None))


def test_patterns_that_would_keep_the_server_busy_are_refused() -> None:
    for wrong, told in (([{"pattern": "a"}] * 9, "9 patterns"), ({"pattern": "a" * 1001}, "1001 characters")):
        with pytest.raises(SpanError, match=told):
            read_selectors(wrong)
    assert len(read_selectors([{"pattern": "a" * 1000}] * 8)) == 8
    # Nested deeper than it can be read.
    with pytest.raises(SpanError, match="not a regular expression"):
        resolve(transcript(), TimedPattern("(" * 20_000 + ")" * 20_000, None))
