"""A session: a context in a live cache that can be asked, erased from, audited and saved."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError, MethodError, SessionError, SpanError
from kveraser.measure.audit import ANSWER_TOKENS, References
from kveraser.measure.influence import Influence, MessageInfluence, measure_influence
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit, Receipt
from kveraser.methods import Method, default_method, make_method
from kveraser.model.backbone import DEFAULT_BACKBONE, SHIPPED_ERASER, Backbone, Progress
from kveraser.model.decode import Decoding
from kveraser.session import answer as answering
from kveraser.session.answer import Answer
from kveraser.session.audit import audit, make_references
from kveraser.session.erase import Change, edit, edit_auto
from kveraser.session.file import load, save
from kveraser.session.state import SessionState
from kveraser.text import chat
from kveraser.text.spans import (
    Erasable,
    Message,
    Span,
    Tokens,
    Transcript,
    place_of,
    replacements,
    resolve,
)
from kveraser.text.template import ChatOptions, notices, special_notices
from kveraser.text.tokenized import TokenizedText

AUTO_PROBE_BUDGET = 0.02
"""Default KL budget of method="auto", nats per answer token."""


class Session:
    """A context and its live KV cache.

    Args:
        backbone: a loaded backbone, or what `Backbone.load` takes.
        text: a document; with a chat model it opens the first user turn, and questions continue that turn.
        messages: a conversation in the OpenAI format, rendered by the model's own chat template.
        tools: tool descriptions for the template; only with messages.
        chat_template_kwargs: further variables of the chat template, such as `{"enable_thinking": False}`.
        allow_special: treat special tokens in the text, messages and questions as control tokens instead of text.
        eraser: PEFT LoRA folder or hub id to load into the backbone. Default: the shipped eraser for a backbone given
            by name, if there is one; a loaded backbone keeps its own. None: no eraser.
        device, dtype: see `Backbone.load`; only with a backbone given by name.
        progress: called during prefill with the number of tokens done and the total.
        state: an existing state to wrap; all other arguments are then ignored.

    Raises:
        InputError: neither or both of text and messages, or invalid messages.
        ContextLengthError: more tokens than the backbone has positions.
        BackboneError, EraserError: see `Backbone.load`.
    """

    def __init__(
        self,
        backbone: Backbone | str | Path = DEFAULT_BACKBONE,
        *,
        text: str | None = None,
        messages: Sequence[chat.ChatMessage] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special: bool = False,
        eraser: str | Path | None = SHIPPED_ERASER,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
        state: SessionState | None = None,
    ) -> None:
        if state is not None:
            self.state = state
            return
        if (text is None) == (messages is None):
            raise InputError("give a session either text or messages")
        if text is not None and tools:
            raise InputError("tools are described in a conversation: give messages instead of a text")
        if isinstance(backbone, Backbone):
            if device is not None or dtype is not None:
                raise InputError("device and dtype are chosen when a backbone is loaded: give them to Backbone.load")
            if eraser is not None and eraser != SHIPPED_ERASER:
                backbone.load_eraser(eraser)
        else:
            backbone = Backbone.load(backbone, device=device, dtype=dtype, eraser=eraser)
        options = ChatOptions(list(tools or ()), dict(chat_template_kwargs or {}), allow_special)
        tokenizer = backbone.tokenizer
        if messages is not None:
            read = chat.conversation(tokenizer, messages, options)
            _warn(notices(tokenizer, messages, options))
        else:
            read = chat.document(tokenizer, text or "", options)
            _warn(special_notices(tokenizer, {"the text": text}, allow_special))
        self.state = SessionState(
            backbone,
            backbone.prefill(read.tokens, progress),
            options=options,
            turn_open=text is not None and chat.has_template(tokenizer),
        )
        self.state.adopt(read)
        self.state.transcript.body_start = read.body_start

    # Reading

    @property
    def backbone(self) -> Backbone:
        """The model, its tokenizer and its eraser."""
        return self.state.backbone

    @property
    def cache(self) -> EditableCache:
        """The live cache."""
        return self.state.cache

    @property
    def options(self) -> ChatOptions:
        """Options for rendering with the chat template."""
        return self.state.options

    @property
    def turn_open(self) -> bool:
        """Whether the context ends inside the user's turn, which a question continues."""
        return self.state.turn_open

    @property
    def transcript(self) -> Transcript:
        """All text and tokens of the session, erased ones included."""
        return self.state.transcript

    @property
    def receipts(self) -> list[Receipt]:
        """Receipts of all edits, in order."""
        return self.state.receipts

    @property
    def text(self) -> str:
        """The text that has not been erased."""
        return self.transcript.live_text(0, len(self.transcript.tokens))

    @property
    def live_tokens(self) -> list[int]:
        """Ids of the tokens that have not been erased, in order."""
        return self.state.live_tokens

    @property
    def exact(self) -> bool:
        """Whether the cache equals a fresh prefill of the live tokens."""
        return self.state.exact

    def find(self, what: Erasable) -> list[tuple[Span, str]]:
        """Returns the token spans that `what` selects, with their text; nothing is erased.

        Raises:
            SpanError: see `kveraser.text.spans`.
        """
        return [(span, self.transcript.text_of(span)) for span in resolve(self.transcript, what)]

    # Asking and appending

    def ask(self, question: str, *, keep: bool = False, **decoding: Any) -> Answer:
        """Ask about the context.

        Args:
            question: the user's text; the chat template's role markers are added.
            keep: append question and answer to the conversation. Otherwise the session does not change.
            decoding: fields of `Decoding`: max_new_tokens, do_sample, temperature, top_p, stop, seed, ...

        Raises:
            ContextLengthError, InputError, SessionError: the session is as before.
        """
        with closing(self.stream(question, keep=keep, **decoding)) as stream:
            while True:
                try:
                    next(stream)
                except StopIteration as finished:
                    answer: Answer = finished.value
                    return answer

    def stream(self, question: str, *, keep: bool = False, **decoding: Any) -> Generator[str, None, Answer]:
        """As `ask`, but yields the answer's text in pieces; the generator returns the `Answer`.

        The session refuses other calls until the generator is exhausted or closed; closing it early keeps nothing.
        """
        try:
            settings = Decoding(**decoding)
        except TypeError as error:
            raise InputError(f"ask takes no such setting: {error}") from error
        self.state.check_idle()
        # Validate the question now: a generator's body only runs at the first `next`.
        answering.question_tokens(self.state, question)
        return answering.stream(self.state, question, keep, settings)

    def append(
        self,
        text: str | None = None,
        *,
        messages: Sequence[chat.ChatMessage] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Append to the context: text to a text session, messages to a conversation.

        Raises:
            InputError, ContextLengthError: the session is as before.
        """
        state, options = self.state, self.state.options
        state.check_idle()
        if (text is None) == (messages is None):
            raise InputError("append either text or messages")
        tokenizer, before = state.backbone.tokenizer, state.checkpoint()
        templated = chat.has_template(tokenizer)
        if text is not None:
            if templated and not state.turn_open:
                raise InputError("this is a conversation: append messages, not text")
            added = chat.added_text(tokenizer, text, options)
            _warn(special_notices(tokenizer, {"the text": text}, options.allow_special))
        else:
            if state.turn_open or not templated:
                raise InputError("this is a text session: append text, not messages")
            added = chat.added_messages(tokenizer, messages or (), options)
            _warn(notices(tokenizer, messages or (), options))
        state.backbone.extend(state.cache, added.tokens, progress)
        first = len(state.transcript.tokens)
        state.cache.set_tokens(before.length, range(first, first + len(added.tokens)))
        state.adopt(added)
        state.history.append(before)

    # Erasing and going back

    def erase(
        self,
        what: Erasable,
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        force: bool = False,
        dependents: float | None = None,
        **parameters: Any,
    ) -> Receipt:
        """Erase spans from the live cache.

        A method that would run at least three quarters of the tokens of exact recomputation is replaced by `recompute`;
        the receipt then has `requested` and `reason`.

        Args:
            what: a text, a selector of `kveraser.text.spans`, or several; overlapping spans are merged.
            method: a name in `kveraser.METHODS` such as `repair(32)`, a method, or `auto`: the cheapest method whose
                audit meets `max_kl` on `probes`, else `recompute`. None: `follow`, or `recompute` if the positions are
                not rotary.
            max_kl: budget of `auto`, mean KL(exact || edited) in nats per answer token (default 0.02).
            probes: questions for `auto` to audit with; default: built from the span and its surroundings.
            undoable: keep the old states for `undo`. False discards them, and those of all earlier steps; freed slots
                of the buffer keep their old bits until they are overwritten.
            force: run the named method even if exact recomputation is as cheap; for measurements.
            dependents: also erase later messages whose `influence` by the spans exceeds this KL, in nats per token;
                repeated until no message exceeds it.
            parameters: the method's parameters by name.

        Returns:
            The receipt, also appended to `receipts`.

        Raises:
            SpanError, MethodError, EraserError, BackboneError: the session is as before.
        """
        self.state.check_idle()
        spans = resolve(self.transcript, what)
        if dependents is not None:
            if not dependents >= 0:
                raise InputError(f"dependents is {dependents!r}: give a KL of at least 0 nats per token")
            # A message may depend on the span only through another message.
            while above := self.influence([Tokens(span.start, span.end) for span in spans]).above(dependents):
                spans = resolve(
                    self.transcript, [*(Tokens(span.start, span.end) for span in spans), *map(self._turn, above)]
                )
        changes = [Change(span) for span in spans]
        return self.edit(changes, method, max_kl=max_kl, probes=probes, undoable=undoable, force=force, **parameters)

    def replace(
        self,
        what: Erasable,
        text: str,
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        force: bool = False,
        **parameters: Any,
    ) -> Receipt:
        """Replace spans with a text; the exact reference is a prefill of the edited text.

        For a `Message` or `ToolCall`, the content is replaced and the role markers stay. Indices after the new text
        shift. For all other arguments and errors see `erase`.

        Args:
            what: as for `erase`; every match is replaced, and spans must not overlap.
            text: the new text; special tokens in it are text unless the session allows them.

        Raises:
            InputError: the text is empty; use `erase`.
            ContextLengthError: more tokens than the backbone has positions.
        """
        self.state.check_idle()
        if not isinstance(text, str) or not text:
            raise InputError(f"the new text is {text!r}: give some text, or use erase")
        changes = [Change(span, self._added(new)) for span, new in replacements(self.transcript, what, text)]
        return self.edit(changes, method, max_kl=max_kl, probes=probes, undoable=undoable, force=force, **parameters)

    def insert(
        self,
        position: int,
        text: str,
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        force: bool = False,
        **parameters: Any,
    ) -> Receipt:
        """Insert a text into the context; the exact reference is a prefill of the edited text.

        Indices after the new text shift. For all other arguments and errors see `erase`.

        Args:
            position: character position, counted as in `Characters`, between two tokens.

        Raises:
            SpanError: the position is outside the context or inside a token.
        """
        self.state.check_idle()
        changes = [Change(place_of(self.transcript, position), self._added(text))]
        return self.edit(changes, method, max_kl=max_kl, probes=probes, undoable=undoable, force=force, **parameters)

    def _added(self, text: str) -> TokenizedText:
        """Tokenize a text to insert, and warn about special tokens in it."""
        _warn(special_notices(self.backbone.tokenizer, {"the text": text}, self.options.allow_special))
        return chat.added_text(self.backbone.tokenizer, text, self.options)

    def edit(
        self,
        changes: Sequence[Change],
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        force: bool = False,
        **parameters: Any,
    ) -> Receipt:
        """Apply several changes in one edit; `erase`, `replace` and `insert` call this.

        Args:
            changes: token spans with their new texts, in the order of the transcript, without overlaps.

        Raises:
            SpanError: the changes overlap or are out of order; for other errors see `erase`.
        """
        self.state.check_idle()
        if any(one.span.end > other.span.start for one, other in pairwise(changes)):
            raise SpanError("the changes overlap or are out of order: give each part of the context once, in order")
        if any(change.span.end > len(self.transcript.tokens) for change in changes):
            raise SpanError(f"a change lies outside the context, which has {len(self.transcript.tokens)} tokens")
        erased = [Tokens(one.span.start, one.span.end) for one in changes if one.span.start < one.span.end]
        if erased:
            # Only for its checks: already erased spans, and edits that leave nothing.
            resolve(self.transcript, erased)
        if method == "auto":
            if parameters:
                raise MethodError(f"auto chooses the parameters itself: leave out {sorted(parameters)}")
            budget = AUTO_PROBE_BUDGET if max_kl is None else max_kl
            return edit_auto(self.state, changes, budget, None if probes is None else _probes(probes), undoable)
        if max_kl is not None or probes is not None:
            raise MethodError("max_kl and probes belong to method='auto': leave them out, or audit afterwards")
        if method is None and parameters:
            raise MethodError(f"parameters {sorted(parameters)} without a method: name the method they are for")
        chosen = default_method(self.backbone) if method is None else make_method(method, **parameters)
        return edit(self.state, changes, chosen, undoable, force)

    def undo(self, steps: int = 1) -> None:
        """Undo the last `steps` edits, appends or kept answers; the cache is restored bit for bit.

        Raises:
            SessionError: fewer steps can be undone; nothing changes.
        """
        self.state.undo(steps)

    def fork(self) -> Self:
        """Returns an independent session over a copy of the cache."""
        return type(self)(state=self.state.fork())

    # Measuring

    def influence(self, what: Erasable, progress: Progress | None = None) -> Influence:
        """Measure how much spans changed each later message and token, in nats per token.

        Scores the live text after the spans on a prefill with them and on one without. Messages that repeat a wrong
        span stay in the context when it is erased; `erase(..., dependents=)` erases them too.

        Args:
            what: as for `erase`.
            progress: called with the number of tokens done and the total.

        Raises:
            SpanError: as for `erase`.
            ContextLengthError: more live tokens than the backbone has positions.
        """
        self.state.check_idle()
        live = self.transcript.live
        spans = resolve(self.transcript, what)
        targets = {token for span in spans for token in range(span.start, span.end) if live[token]}
        return measure_influence(self.backbone, self.transcript, targets, progress)

    def _turn(self, influenced: MessageInfluence) -> Message:
        """Selects a whole message, or its content if the template gives it no turn of its own."""
        return Message(influenced.message, keep_turn=not self.transcript.messages[influenced.message].own_turn)

    def references(self, progress: Progress | None = None) -> References:
        """Prefill the references of an audit: the live tokens (exact), and all original tokens (unerased)."""
        return make_references(self.state, progress)

    def audit(
        self,
        probes: Sequence[str | Probe] | None = None,
        *,
        secrets: Sequence[str] | None = None,
        references: References | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> Audit:
        """Measure fidelity and leaks of the edits so far against exact recomputation; stored in the last receipt too.

        Args:
            probes: questions (texts are influence probes) or `Probe`s; default: built from the spans and the text
                around them.
            secrets: texts that answers must not reveal; default: numbers and names that only the erased text contains.
            references: from `references()`, to share them between audits of the same edit.
            answer_tokens: maximum number of tokens of a greedy answer.

        Raises:
            SessionError: nothing has been erased.
        """
        self.state.check_idle()
        if not self.receipts:
            raise SessionError("nothing has been erased yet: audit after erase")
        chosen = None if probes is None else _probes(probes)
        if isinstance(secrets, str) or not all(isinstance(secret, str) for secret in secrets or ()):
            raise InputError(f"secrets is {secrets!r}: give a list of texts")
        sizes = len(self.live_tokens), len(self.transcript.original)
        if references is not None and (references.exact.length, references.unerased.length) != sizes:
            raise SessionError(
                f"the references are of {references.exact.length} live tokens of {references.unerased.length}, "
                f"the session has {sizes[0]} of {sizes[1]}: take them anew with references()"
            )
        measured = audit(self.state, chosen, secrets, references or self.references(), answer_tokens)
        self.receipts[-1] = self.receipts[-1].with_audit(measured)
        return measured

    # Files

    def save(self, path: str | Path) -> None:
        """Write the session to one file; see `kveraser.session.file.save`."""
        self.state.check_idle()
        save(self.state, path)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | str | Path | None = None, **loading: Any) -> Self:
        """Read a session from a file; see `kveraser.session.file.load`."""
        return cls(state=load(path, backbone, **loading))


def _warn(notices: Sequence[str]) -> None:
    for notice in notices:
        warnings.warn(notice, UserWarning, stacklevel=3)


def _probes(probes: Sequence[str | Probe]) -> list[Probe]:
    """Probes from questions.

    Raises:
        InputError: no list, an empty one, or other values.
    """
    if isinstance(probes, str) or not isinstance(probes, Sequence) or not probes:
        raise InputError(f"probes is {probes!r}: give a list of questions, at least one")
    for probe in probes:
        if not isinstance(probe, str | Probe):
            raise InputError(f"{probe!r} is not a probe: give a question, or a kveraser.Probe")
    return [Probe(probe) if isinstance(probe, str) else probe for probe in probes]


__all__ = ["AUTO_PROBE_BUDGET", "Answer", "Session"]
