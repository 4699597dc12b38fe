"""A context in a live cache: what has been read and said, which slots hold it, and how to go back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from kveraser import chat
from kveraser.backbone import DEFAULT_BACKBONE, SHIPPED_ERASER, Backbone, Progress
from kveraser.cache import EditableCache, Journal
from kveraser.errors import InputError, SessionError
from kveraser.receipt import Receipt
from kveraser.spans import Erasable, MessageRange, Span, Transcript, resolve


@dataclass(frozen=True)
class Piece:
    """Text with its tokens and their offsets in it."""

    text: str
    tokens: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Marks:
    """How far a session had got: what undo goes back to."""

    length: int
    slots: tuple[int, ...]
    live: tuple[bool, ...]
    tokens: int
    characters: int
    messages: int
    receipts: int
    turn_open: bool
    journal: Journal | None


class Context:
    """A context and its live KV cache.

    Args:
        backbone: a loaded backbone, or what `Backbone.load` takes.
        text: a document; with a chat model it opens the first user turn, and questions continue that turn.
        messages: a conversation in the OpenAI format, rendered by the model's own chat template.
        tools: tool descriptions for the template.
        eraser: PEFT LoRA folder or hub id, loaded into the backbone. Default: for a backbone given by name the eraser
            that ships for it, if there is one; a ready one stays as it is. None: none.
        device, dtype: see `Backbone.load`; only with a backbone given by name.
        progress: called with tokens done and in all during prefill.

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
        eraser: str | Path | None = SHIPPED_ERASER,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
        if (text is None) == (messages is None):
            raise InputError("give a session either text or messages")
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise InputError(f"the text is empty or no text ({text!r}): give the context to read")
        if isinstance(backbone, Backbone):
            if device is not None or dtype is not None:
                raise InputError("device and dtype are chosen when a backbone is loaded: give them to Backbone.load")
            if eraser is not None and eraser != SHIPPED_ERASER:
                backbone.load_eraser(eraser)
        else:
            backbone = Backbone.load(backbone, device=device, dtype=dtype, eraser=eraser)
        self.backbone = backbone
        self.tools = list(tools) if tools else None
        self.transcript = Transcript()
        self.receipts: list[Receipt] = []
        self.turn_open = text is not None and chat.has_template(backbone.tokenizer)
        self._history: list[Marks] = []
        self._streaming = False
        ranges: list[MessageRange] = []
        if messages is not None:
            text, ranges = chat.render_with_ranges(backbone.tokenizer, messages, tools)
            offset = min((place.start for place in ranges if place.start < place.end), default=0)
        else:
            opening = chat.first_turn_frame(backbone.tokenizer).opening if self.turn_open else ""
            text, offset = opening + (text or ""), len(opening)
        tokens, offsets = self._tokenize(text, special=not self.turn_open and messages is None)
        self.cache = backbone.prefill(tokens, progress)
        self.transcript.append(text, tokens, offsets)
        self.transcript.messages = ranges
        self.transcript.body_start = offset
        self.slots = list(range(len(tokens)))

    @classmethod
    def restore(
        cls,
        backbone: Backbone,
        cache: EditableCache,
        transcript: Transcript,
        *,
        slots: Sequence[int],
        receipts: Sequence[Receipt],
        turn_open: bool,
        tools: list[Mapping[str, Any]] | None,
        history: Sequence[Marks] = (),
    ) -> Self:
        """A session over an existing cache, with nothing prefilled: how forks and files come back."""
        session = object.__new__(cls)
        session.backbone, session.cache, session.transcript = backbone, cache, transcript
        session.slots, session.receipts, session._history = list(slots), list(receipts), list(history)
        session.turn_open, session.tools = turn_open, tools
        session._streaming = False
        return session

    # Reading

    @property
    def text(self) -> str:
        """The live text: everything read or said that has not been erased."""
        return self.transcript.live_text(0, len(self.transcript.tokens))

    @property
    def live_tokens(self) -> list[int]:
        """Ids of the tokens that have not been erased, in order."""
        return [token for token, live in zip(self.transcript.tokens, self.transcript.live, strict=True) if live]

    @property
    def exact(self) -> bool:
        """Whether the cache equals a fresh prefill of the live tokens."""
        return self.cache.exact_length == self.cache.length == len(self.live_tokens)

    def find(self, what: Erasable) -> list[tuple[Span, str]]:
        """The token spans that `what` points at, and their snapped text, without erasing anything.

        Raises:
            SpanError: see `kveraser.spans`.
        """
        return [(span, self.transcript.text_of(span)) for span in resolve(self.transcript, what)]

    # Adding context

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
        self._check_idle()
        if (text is None) == (messages is None):
            raise InputError("append either text or messages")
        if text is not None and not isinstance(text, str):
            raise InputError(f"the text is {text!r}: give the context to add")
        tokenizer = self.backbone.tokenizer
        ranges: list[MessageRange] = []
        if text is not None:
            if chat.has_template(tokenizer) and not self.turn_open:
                raise InputError("this is a conversation: append messages, not text")
            added = text
        else:
            if self.turn_open or not chat.has_template(tokenizer):
                raise InputError("this is a text session: append text, not messages")
            added, ranges = chat.continuation(tokenizer, messages or ())
            ranges = [chat.moved(place, len(self.transcript.text)) for place in ranges]
        if not added:
            raise InputError("nothing to append: give some text or messages")
        piece, marks = Piece(added, *self._tokenize(added, follows=True)), self._marks()
        self.backbone.extend(self.cache, piece.tokens, progress)
        self._adopt([piece], ranges)
        self._history.append(marks)

    # Going back

    def undo(self, steps: int = 1) -> None:
        """Take back the last `steps` erases, appends or kept answers; every bit is as it was.

        Raises:
            SessionError: there are not so many; nothing is undone then.
        """
        self._check_idle()
        if not 1 <= steps <= len(self._history):
            raise SessionError(f"can't undo {steps} steps: {len(self._history)} can be undone")
        for _ in range(steps):
            marks = self._history.pop()
            if marks.journal is not None:
                self.cache.revert(marks.journal)
            self._restore(marks)

    def fork(self) -> Self:
        """An independent session over a copy of the cache; what happens in one never touches the other."""
        self._check_idle()
        transcript = replace(
            self.transcript,
            tokens=list(self.transcript.tokens),
            offsets=list(self.transcript.offsets),
            live=list(self.transcript.live),
            messages=list(self.transcript.messages),
        )
        return type(self).restore(
            self.backbone, self.cache.fork(), transcript, slots=self.slots, receipts=self.receipts,
            turn_open=self.turn_open, tools=self.tools, history=self._history,
        )  # fmt: skip

    # Bookkeeping

    def _tokenize(
        self, text: str, special: bool = False, follows: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As `Backbone.tokenize`, but text that no tokenizer takes is an `InputError`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has half a character at {error.start} ({text[error.start]!r}): repair or leave it out"
            ) from error
        return self.backbone.tokenize(text, special, follows)

    def _marks(self) -> Marks:
        transcript = self.transcript
        return Marks(
            self.cache.length, tuple(self.slots), tuple(transcript.live), len(transcript.tokens),
            len(transcript.text), len(transcript.messages), len(self.receipts), self.turn_open, None,
        )  # fmt: skip

    def _restore(self, marks: Marks) -> None:
        if self.cache.length > marks.length:
            self.cache.truncate(marks.length)
        self.slots = list(marks.slots)
        self.transcript.truncate(marks.tokens, marks.characters, marks.messages)
        self.transcript.live = list(marks.live)
        del self.receipts[marks.receipts :]
        self.turn_open = marks.turn_open

    def _check_idle(self) -> None:
        if self._streaming:
            raise SessionError("an answer is being streamed: exhaust or close its generator first, or fork before")

    def _adopt(self, pieces: Sequence[Piece], messages: Sequence[MessageRange]) -> None:
        """Enter text whose tokens are in the cache into the transcript."""
        for piece in pieces:
            self.slots += range(len(self.transcript.tokens), len(self.transcript.tokens) + len(piece.tokens))
            self.transcript.append(piece.text, piece.tokens, piece.offsets)
        self.transcript.messages += messages
