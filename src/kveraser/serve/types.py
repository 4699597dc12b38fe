"""What the API hands to the service, and what comes back: plain values, checked before they are made."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from kveraser.methods import make_method
from kveraser.serve.engine import Sampling, TokenLogprob
from kveraser.serve.entries import Entry
from kveraser.serve.tool_results import ToolResultEdit
from kveraser.text.spans import Transcript
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions

Action = Literal["prefill", "append", "erase", "edit", "recompute", "prefix"]
Caches = Literal["edited", "unerased", "exact"]


@dataclass(frozen=True)
class Erasing:
    """How removed parts of a history are erased.

    Attributes:
        method: as `Session.erase` takes it; `recompute` asks for an exact answer; None: the server's own choice.
        max_kl: budget in nats per answer token, with method None or `auto`: the cheapest method within it.
        now_then_exact: answer from the edited cache now, and put an exact one in its place in idle time.
    """

    method: str | None = None
    max_kl: float | None = None
    now_then_exact: bool = False

    @property
    def allows_approximate(self) -> bool:
        """Whether the client chose how to edit, and so allows answers that are not exact."""
        return self.method is not None or self.max_kl is not None or self.now_then_exact


@dataclass(frozen=True)
class Turn:
    """One request for an answer: either messages or a prompt.

    Attributes:
        messages: a conversation in the OpenAI format.
        prompt: a text, or token ids.
        options: tools and further variables for the chat template.
        context_management: tool results to clear before the model sees the conversation.
        warnings: what of the request has no effect.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    options: ChatOptions = DEFAULT_OPTIONS
    sampling: Sampling = field(default_factory=Sampling)
    erasing: Erasing = field(default_factory=Erasing)
    context_management: tuple[ToolResultEdit, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Happened:
    """What a request did to the cache that answered it.

    Attributes:
        action: `prefill`: nothing cached was used; `append`: what was cached is used, and text added; `erase`: spans
            were erased from what was cached; `edit`: text was replaced or inserted in it; `recompute`: everything from
            the first difference on was run, though some of it had been cached; `prefix`: the common prefix was used,
            and nothing after it had been cached.
        context: id of the cached context.
        erased_tokens: tokens erased from the cache for this request.
        recomputed_tokens: tokens that the cache had held and that were run again, by the method or from the first
            difference on.
        prefilled_tokens: tokens run for the first time.
        exact: whether the cache that answered equals a fresh prefill of its live tokens.
        receipts: of this request's erases.
        applied_edits: of the request's context management, as Anthropic reports them.
        exact_pending: whether an exact cache is being made in idle time.
        warnings: what of the request had no effect, and special tokens in messages.
    """

    action: Action
    context: str
    erased_tokens: int = 0
    recomputed_tokens: int = 0
    prefilled_tokens: int = 0
    exact: bool = True
    receipts: tuple[dict[str, Any], ...] = ()
    applied_edits: tuple[dict[str, Any], ...] = ()
    exact_pending: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """The cache is ready, the answer begins. `cached_tokens` of the `prompt_tokens` were taken from the cache."""

    prompt_tokens: int
    cached_tokens: int
    what: Happened


@dataclass(frozen=True)
class Delta:
    """A piece of the answer."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    finish_reason: Literal["stop", "length"]
    completion_tokens: int
    what: Happened


Event = Started | Delta | Finished


@dataclass(frozen=True)
class ModelCard:
    """A model that the server has; `created` in seconds since 1970, `context_length` in tokens, None: no limit."""

    id: str
    created: int
    context_length: int | None


@dataclass(frozen=True)
class MethodCard:
    """A method that the engine can erase by.

    Attributes:
        name: as `erase` takes it.
        exact: it runs all that follows the span again.
        removes_text: False where the erased text stays in the cache and is only taken back.
        parameters: those that are numbers, with their values where none is given; None: the method chooses.
        default: what erases where no method is named.
    """

    name: str
    summary: str
    cost: str
    source: str
    exact: bool
    removes_text: bool
    parameters: Mapping[str, float | None]
    default: bool


@dataclass(frozen=True)
class MessageView:
    """A message of a session: its place, size in characters, text if contents were asked for, whether any is live."""

    index: int
    role: str
    characters: int
    text: str | None
    live: bool


@dataclass(frozen=True)
class TokenView:
    """A token of a session, for display.

    Attributes:
        text: what it adds to the text.
        message: in which it stands.
        start, end: its characters, counted as spans count them; below 0 is what a template puts in front.
        content: it stands in what a message says, or in a text, and not in what the template writes around them.
    """

    text: str
    live: bool
    message: int | None
    start: int
    end: int
    content: bool


@dataclass(frozen=True)
class SessionView:
    """What a session is. Times in seconds since 1970; in a list, `messages` and `receipts` are empty.

    Attributes:
        text: the live text, if contents were asked for.
        tokens, live_tokens: tokens ever read or said, and those not erased.
        exact: whether the cache equals a fresh prefill of the live tokens.
        undo_steps: operations that can be undone.
        bytes: of keys and values in memory; 0 while the session lies on disk.
        revision: grows with every change.
        warnings: what of the request that made this view had no effect, and special tokens in it.
    """

    id: str
    created: float
    expires: float
    messages: tuple[MessageView, ...]
    text: str | None
    tokens: int
    live_tokens: int
    exact: bool
    undo_steps: int
    receipts: tuple[dict[str, Any], ...]
    bytes: int
    revision: int
    warnings: tuple[str, ...] = ()


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
