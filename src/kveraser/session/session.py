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
        allow_special: special tokens in the text, messages and questions act as control tokens. False: they are read
            as text.
        eraser: PEFT LoRA folder or hub id, loaded into the backbone. Default: for a backbone given by name the eraser
            that ships for it, if there is one; a ready one stays as it is. None: none.
        device, dtype: see `Backbone.load`; only with a backbone given by name.
        progress: called with tokens done and in all during prefill.
        state: the state of another session, to be used as it is; all else is ignored then.

    Raises:
        InputError: neither or both of text and messages, or messages of the wrong form.
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
        """How the chat template renders."""
        return self.state.options

    @property
    def turn_open(self) -> bool:
        """Whether the context ends inside the user's turn, which a question continues."""
        return self.state.turn_open

    @property
    def transcript(self) -> Transcript:
        """All text and tokens that were ever read, and which of them are live."""
        return self.state.transcript

    @property
    def receipts(self) -> list[Receipt]:
        """Of all erases, the last one last."""
        return self.state.receipts

    @property
    def text(self) -> str:
        """The live text: everything read or said that has not been erased."""
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
        """The token spans that `what` selects, and their text snapped to whole tokens, without erasing anything.

        Raises:
            SpanError: see `kveraser.text.spans`.
        """
        return [(span, self.transcript.text_of(span)) for span in resolve(self.transcript, what)]

    # Asking and appending

    def ask(self, question: str, *, keep: bool = False, **decoding: Any) -> Answer:
        """Ask about the context.

        Args:
            question: the user's words; the chat template's markers are added.
            keep: continue the conversation with question and answer. Otherwise the session stays as it was, so that
                one question never influences the next.
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
        """As `ask`, yielding the answer's text in pieces; the generator's return value is the `Answer`.

        Until it is exhausted or closed, the session takes no other call. Closed early, nothing is kept.
        """
        try:
            settings = Decoding(**decoding)
        except TypeError as error:
            raise InputError(f"ask takes no such setting: {error}") from error
        self.state.check_idle()
        # A bad question is refused here, not when the generator starts.
        answering.question_tokens(self.state, question)
        return answering.stream(self.state, question, keep, settings)

    def append(
        self,
        text: str | None = None,
        *,
        messages: Sequence[chat.ChatMessage] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Add to the context: text to a text session, messages to a conversation.

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

        A method that would run about as many tokens as exact recomputation (three quarters of them or more) is replaced
        by `recompute`; the receipt's `requested` and `reason` then say so.

        Args:
            what: a text, a selector of `kveraser.text.spans`, or several; overlapping spans are merged.
            method: a name in `kveraser.METHODS` such as `repair(32)`, a method, or `auto`: the cheapest whose audit
                meets `max_kl` on `probes`, in the end `recompute`. None: `follow`, or `recompute` where keys can't be
                moved.
            max_kl: budget of `auto`, mean KL(exact || edited) in nats per answer token (default 0.02).
            probes: questions for `auto` to audit with; default: built from the span and its surroundings.
            undoable: keep the old states for `undo`. False keeps nothing to undo with, this step or any earlier one;
                buffer slots that the erase freed hold their old bits until they are written again.
            force: run the named method even where exact recomputation costs the same: for measurements.
            dependents: erase later messages too, whose `influence` by the spans is above this, in nats per token;
                then those that are influenced by these, and so on.
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
            # A message may lean on the span only through another one that leans on it.
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
        """Erase spans and put a text in the place of each; the exact reference is a prefill of the edited text.

        Of a `Message` or a `ToolCall` the content is replaced and the turn stays. Indices of tokens, characters and
        messages after the new text move. All other arguments and errors are those of `erase`.

        Args:
            what: as for `erase`, every match; spans must not overlap.
            text: the new text; special tokens in it are text unless the session allows them.

        Raises:
            InputError: an empty text (that is `erase`).
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

        Indices of tokens, characters and messages after the new text move. All other arguments and errors are those of
        `erase`.

        Args:
            position: in characters, counted as by `Characters`; it must be between two tokens.

        Raises:
            SpanError: outside the context, or inside a token.
        """
        self.state.check_idle()
        changes = [Change(place_of(self.transcript, position), self._added(text))]
        return self.edit(changes, method, max_kl=max_kl, probes=probes, undoable=undoable, force=force, **parameters)

    def _added(self, text: str) -> TokenizedText:
        """The tokens of a text that is put into the context."""
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
        """Apply several changes at once; `erase`, `replace` and `insert` are its cases.

        Args:
            changes: spans of tokens and texts, in the order of the transcript, without overlaps.

        Raises:
            SpanError: changes out of order.
            Otherwise those of `erase`.
        """
        self.state.check_idle()
        if any(one.span.end > other.span.start for one, other in pairwise(changes)):
            raise SpanError("the changes overlap or are out of order: give each part of the context once, in order")
        if any(change.span.end > len(self.transcript.tokens) for change in changes):
            raise SpanError(f"a change lies outside the context, which has {len(self.transcript.tokens)} tokens")
        erased = [Tokens(one.span.start, one.span.end) for one in changes if one.span.start < one.span.end]
        if erased:
            # Refuses what is erased already, and an edit after which nothing would remain.
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
        """Take back the last `steps` erases, appends or kept answers; every bit is as it was.

        Raises:
            SessionError: there are not so many; nothing is undone then.
        """
        self.state.undo(steps)

    def fork(self) -> Self:
        """An independent session over a copy of the cache; a change to one never touches the other."""
        return type(self)(state=self.state.fork())

    # Measuring

    def influence(self, what: Erasable, progress: Progress | None = None) -> Influence:
        """Measure how much spans changed each later message and token, in nats per token.

        The live text after the spans is scored on a prefill with them and on one without, which costs two prefills.
        Messages that were answered from a wrong span still carry it after its erase; `erase(..., dependents=)` erases
        them too.

        Args:
            what: as of `erase`.
            progress: called with tokens done and in all.

        Raises:
            SpanError: as of `erase`.
            ContextLengthError: more live tokens than the backbone has positions.
        """
        self.state.check_idle()
        live = self.transcript.live
        spans = resolve(self.transcript, what)
        targets = {token for span in spans for token in range(span.start, span.end) if live[token]}
        return measure_influence(self.backbone, self.transcript, targets, progress)

    def _turn(self, influenced: MessageInfluence) -> Message:
        """The selector of a whole message, or of its content where the template gives it no turn of its own."""
        return Message(influenced.message, keep_turn=not self.transcript.messages[influenced.message].own_turn)

    def references(self, progress: Progress | None = None) -> References:
        """Prefill the live tokens afresh, and all tokens, erased ones included: what audits compare with."""
        return make_references(self.state, progress)

    def audit(
        self,
        probes: Sequence[str | Probe] | None = None,
        *,
        secrets: Sequence[str] | None = None,
        references: References | None = None,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> Audit:
        """Measure what the erases so far achieved, against exact recomputation; the last receipt carries the result.

        Args:
            probes: questions (texts probe influence) or `Probe`s; default: built from the spans and their surroundings.
            secrets: texts that must not come out; default: numbers and names that only the erased text holds.
            references: from `references()`, to use them for several audits of the same erase.
            answer_tokens: most tokens of a greedy answer.

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
