"""What clients are shown of sessions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from kveraser.methods import make_method
from kveraser.serve.entries import Entry
from kveraser.serve.exchange import MessageView, MethodCard, SessionView, TokenView
from kveraser.text.spans import Transcript


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


def method_cards(names: Sequence[str]) -> list[MethodCard]:
    """What there is to know of the methods named, the first of which is taken where a request names none."""
    cards: dict[str, MethodCard] = {}
    # `auto` is a choice among them.
    for method in (make_method(name) for name in names if name != "auto"):
        kinds = get_type_hints(type(method))
        numbers = {
            name: value
            for name, value in method.parameters.items()
            if {int, float} & {kinds[name], *get_args(kinds[name])}
        }
        card = MethodCard(
            name=method.name, summary=method.summary, cost=method.cost, source=method.source,
            exact=method.is_reference, removes_text=method.removes_text, parameters=numbers,
            default=not cards and names[0] != "auto",
        )  # fmt: skip
        cards.setdefault(method.name, card)
    return list(cards.values())


def token_views(transcript: Transcript) -> list[TokenView]:
    """All tokens, each with the text that it adds."""
    views, reached, base = [], 0, transcript.body_start
    starts = [message.start for message in transcript.messages]
    for (start, end), live in zip(transcript.offsets, transcript.live, strict=True):
        index = bisect_right(starts, start) - 1
        message = transcript.messages[index] if index >= 0 else None
        if message is not None and start >= message.end:
            message = None
        first, last = (base, len(transcript.text)) if not starts else (0, 0)
        if message is not None:
            first, last = message.content_start, message.content_end
        # Several tokens may share a character: the first shows it.
        shown = transcript.text[max(start, reached) : end]
        place = None if message is None else index
        views.append(TokenView(shown, live, place, start - base, end - base, first < end and start < last))
        reached = max(reached, end)
    return views
