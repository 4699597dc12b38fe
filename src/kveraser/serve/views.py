"""What clients are shown of sessions."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from kveraser.serve.entries import Entry
from kveraser.serve.exchange import MessageView, SessionView, TokenView
from kveraser.spans import Transcript


def summary(
    entry: Entry,
    messages: tuple[MessageView, ...] = (),
    text: str | None = None,
    receipts: tuple[dict[str, Any], ...] = (),
) -> SessionView:
    """A session as far as is known without asking the engine, and what the engine said."""
    measured = entry.measured
    return SessionView(
        id=entry.id, created=entry.created, expires=entry.expires, messages=messages, text=text,
        tokens=measured.tokens, live_tokens=measured.live_tokens, exact=measured.exact,
        undo_steps=len(entry.undoable), receipts=receipts, bytes=entry.bytes, revision=entry.revision,
    )  # fmt: skip


def message_views(transcript: Transcript, contents: bool) -> tuple[MessageView, ...]:
    """The messages; texts with `contents` alone. A message without a content of its own is shown as its turn."""
    views = []
    for index, message in enumerate(transcript.messages):
        start, end = message.content_start, message.content_end
        if start >= end:
            start, end = message.start, message.end
        live = False
        if start < end:
            span = transcript.snap(start, end)
            live = any(transcript.live[span.start : span.end])
        text = transcript.live_text(span.start, span.end) if contents and start < end else None
        views.append(MessageView(index, message.role, end - start, text, live))
    return tuple(views)


def token_views(transcript: Transcript) -> list[TokenView]:
    """All tokens, each with the text that it adds."""
    views, reached = [], 0
    starts = [message.start for message in transcript.messages]
    for (start, end), live in zip(transcript.offsets, transcript.live, strict=True):
        index = bisect_right(starts, start) - 1
        inside = index >= 0 and start < transcript.messages[index].end
        # Several tokens may share a character: the first shows it.
        views.append(TokenView(transcript.text[max(start, reached) : end], live, index if inside else None))
        reached = max(reached, end)
    return views
