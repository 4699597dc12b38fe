"""What clients point at to erase: selectors as they write them, none of which can keep the server busy for long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex  # type: ignore[import-untyped]

from kveraser.errors import SpanError
from kveraser.text.spans import Pattern, Selector, Span, Transcript, selector_from_json

PATTERN_SECONDS = 0.5
"""How long a client's regular expression may look."""
MOST_PATTERNS = 8
"""In one request."""
PATTERN_CHARACTERS = 1000
"""Of a client's regular expression, at most."""


@dataclass(frozen=True)
class TimedPattern:
    """A `Pattern` that gives up after a while: some expressions take for ever on some texts."""

    pattern: str
    occurrence: int | None

    def resolve(self, transcript: Transcript) -> list[Span]:
        """As `Pattern.resolve`; also SpanError for one that takes too long."""
        try:
            matches = regex.compile(self.pattern, regex.V0).finditer(
                transcript.text, transcript.body_start, timeout=PATTERN_SECONDS
            )
            found = [match.span() for match in matches]
        except (regex.error, RecursionError, OverflowError) as error:
            raise SpanError(f"the pattern {self.pattern!r} is not a regular expression: {error}") from error
        except TimeoutError as error:
            raise SpanError(f"the pattern {self.pattern!r} takes too long on this text: simplify it") from error
        live = transcript.occurrences(found)
        if not live:
            raise SpanError(f"the pattern {self.pattern!r} matches nothing that is live: try it on the text")
        if self.occurrence is None:
            return [span for _, span in live]
        if not 1 <= self.occurrence <= len(live):
            raise SpanError(
                f"the pattern {self.pattern!r} has no match {self.occurrence}: it matches {len(live)} times"
            )
        return [live[self.occurrence - 1][1]]


def read_selectors(value: Any) -> list[Selector]:
    """One selector as `selector_from_json` reads it, or a list of them; two whole numbers are a range of characters.

    Raises:
        SpanError: none of these forms, too many patterns, or one that is too long.
    """
    several = isinstance(value, list) and not (len(value) == 2 and all(type(bound) is int for bound in value))
    selectors = [selector_from_json(one) for one in (value if several else [value])]
    patterns = [one.pattern for one in selectors if isinstance(one, Pattern)]
    longest = max(map(len, patterns), default=0)
    if len(patterns) > MOST_PATTERNS:
        raise SpanError(f"{len(patterns)} patterns at once: give {MOST_PATTERNS} at most, or join them with |")
    if longest > PATTERN_CHARACTERS:
        raise SpanError(f"a pattern has {longest} characters: give {PATTERN_CHARACTERS} at most")
    return [TimedPattern(one.pattern, one.occurrence) if isinstance(one, Pattern) else one for one in selectors]
