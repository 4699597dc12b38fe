"""Requests, events and views that the API and the service exchange. All are plain validated values."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from kveraser.methods import make_method
from kveraser.serve.context_edits import ContextEdit
from kveraser.serve.engine import Sampling, TokenLogprob
from kveraser.serve.entries import Entry
from kveraser.text.spans import Transcript
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions

Action = Literal["prefill", "append", "erase", "edit", "recompute", "prefix"]
Caches = Literal["edited", "unerased", "exact"]


@dataclass(frozen=True)
class Erasing:
    """How parts removed from a history are erased.

    Attributes:
        method: see `Session.erase`; `recompute` requests an exact answer; None: the server's default.
        max_kl: budget in nats per answer token, for method None or `auto`: the cheapest method within it is used.
        now_then_exact: answer from the edited cache, and replace it with an exact one in idle time.
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
    """A request for an answer, with either messages or a prompt.

    Attributes:
        messages: a conversation in OpenAI's format.
        prompt: text or token ids.
        options: tools and other variables of the chat template.
        context_edits: applied before the model reads the conversation.
        dropped: indices of messages that are left out.
        warnings: parts of the request that have no effect.
    """

    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | tuple[int, ...] | None = None
    options: ChatOptions = DEFAULT_OPTIONS
    sampling: Sampling = field(default_factory=Sampling)
    erasing: Erasing = field(default_factory=Erasing)
    context_edits: tuple[ContextEdit, ...] = ()
    dropped: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Happened:
    """The cache operations of a request.

    Attributes:
        action: `prefill`: no cached tokens were used; `append`: all cached tokens were used and text was added;
            `erase`: spans were erased from the cache; `edit`: text was replaced or inserted in it; `recompute`: cached
            tokens after the first difference were run again; `prefix`: a common prefix was used, and no tokens after
            it had been cached.
        context: id of the cached context.
        erased_tokens: tokens erased from the cache for this request.
        recomputed_tokens: cached tokens that were run again, by the method or after the first difference.
        prefilled_tokens: tokens that were run for the first time.
        exact: whether the cache equals a fresh prefill of its live tokens.
        receipts: of the erases of this request.
        applied_edits: the context edits, in Anthropic's format.
        exact_pending: whether an exact cache is being computed in idle time.
        warnings: parts of the request without effect, and special tokens in messages.
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
    """The prompt has been processed. `cached_tokens` of its `prompt_tokens` came from the cache."""

    prompt_tokens: int
    cached_tokens: int
    what: Happened


@dataclass(frozen=True)
class Delta:
    """A part of the answer."""

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
    """A served model; `created` in seconds since 1970, `context_length` in tokens, None: no limit."""

    id: str
    created: int
    context_length: int | None


@dataclass(frozen=True)
class MethodCard:
    """An erasing method that the engine supports.

    Attributes:
        name: for `erase`.
        exact: whether all tokens after the span are run again.
        removes_text: False if the erased text stays in the cache and is only retracted.
        parameters: the numeric ones, with their default values; None: the method chooses.
        default: whether it is used when a request names no method.
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
    """A message of a session; `text` only if contents were requested, `live` if any of its tokens is live."""

    index: int
    role: str
    characters: int
    text: str | None
    live: bool


@dataclass(frozen=True)
class TokenView:
    """A token of a session, for display.

    Attributes:
        text: the characters that it adds.
        message: index of the message that contains it.
        start, end: character offsets, as in spans; negative in text that the template adds at the start.
        content: whether it belongs to the content of a message or text, not to the template.
    """

    text: str
    live: bool
    message: int | None
    start: int
    end: int
    content: bool


@dataclass(frozen=True)
class SessionView:
    """The state of a session. Times in seconds since 1970; in a list, `messages` and `receipts` are empty.

    Attributes:
        text: the live text, if contents were requested.
        tokens, live_tokens: all tokens read or generated, and those not erased.
        exact: whether the cache equals a fresh prefill of the live tokens.
        undo_steps: operations that can be undone.
        bytes: of keys and values in memory; 0 while the session is on disk.
        revision: increases with every change.
        warnings: parts of the request without effect, and special tokens in it.
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
    """A view of a session from its entry, with the parts that only the engine knows as arguments."""
    measured = entry.measured
    return SessionView(
        id=entry.id, created=entry.created, expires=entry.expires, messages=messages, text=text,
        tokens=measured.tokens, live_tokens=measured.live_tokens, exact=measured.exact,
        undo_steps=len(entry.undoable), receipts=receipts, bytes=entry.bytes, revision=entry.revision,
    )  # fmt: skip


def message_views(transcript: Transcript, contents: bool) -> tuple[MessageView, ...]:
    """Views of the messages; texts only with `contents`. A message without content is shown as its whole turn."""
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
    """Descriptions of the methods; the first name is the default."""
    cards: dict[str, MethodCard] = {}
    # `auto` chooses among the others.
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
    """Views of all tokens."""
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
        # Several tokens may share a character; the first one shows it.
        shown = transcript.text[max(start, reached) : end]
        place = None if message is None else index
        views.append(TokenView(shown, live, place, start - base, end - base, first < end and start < last))
        reached = max(reached, end)
    return views
