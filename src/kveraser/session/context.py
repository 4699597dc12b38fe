"""A context in a live cache: what has been read and said, which slots hold it, and how to go back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from kveraser.cache.editable import EditableCache, Journal
from kveraser.errors import InputError, SessionError
from kveraser.measure.receipt import Receipt
from kveraser.model.backbone import DEFAULT_BACKBONE, SHIPPED_ERASER, Backbone, Progress
from kveraser.text import chat
from kveraser.text.spans import Erasable, Span, Transcript, resolve
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions, notices, special_notices
from kveraser.text.tokenized import TokenizedText


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
        tools: tool descriptions for the template; only with messages.
        chat_template_kwargs: further variables of the chat template, such as `{"enable_thinking": False}`.
        allow_special: special tokens in the text, messages and questions act as control tokens. False: they are read
            as text.
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special: bool = False,
        eraser: str | Path | None = SHIPPED_ERASER,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> None:
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
        self.backbone = backbone
        self.options = ChatOptions(list(tools or ()), dict(chat_template_kwargs or {}), allow_special)
        self.transcript = Transcript()
        self.receipts: list[Receipt] = []
        self.turn_open = text is not None and chat.has_template(backbone.tokenizer)
        self._history: list[Marks] = []
        self._streaming = False
        tokenizer = backbone.tokenizer
        if messages is not None:
            read = chat.conversation(tokenizer, messages, self.options)
            self._warn(notices(tokenizer, messages, self.options))
        else:
            read = chat.document(tokenizer, text or "", self.options)
            self._warn(special_notices(tokenizer, {"the text": text}, allow_special))
        self.cache = backbone.prefill(read.tokens, progress)
        self.transcript.append(read.text, read.tokens, read.offsets)
        self.transcript.messages = list(read.messages)
        self.transcript.body_start = read.body_start
        self.slots = list(range(len(read.tokens)))

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
        options: ChatOptions = DEFAULT_OPTIONS,
        history: Sequence[Marks] = (),
    ) -> Self:
        """A session over an existing cache, with nothing prefilled: how forks and files come back."""
        session = object.__new__(cls)
        session.backbone, session.cache, session.transcript = backbone, cache, transcript
        session.slots, session.receipts, session._history = list(slots), list(receipts), list(history)
        session.turn_open, session.options = turn_open, options
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
            SpanError: see `kveraser.text.spans`.
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
        tokenizer, marks = self.backbone.tokenizer, self._marks()
        templated = chat.has_template(tokenizer)
        if text is not None:
            if templated and not self.turn_open:
                raise InputError("this is a conversation: append messages, not text")
            added = chat.added_text(tokenizer, text, self.options)
            self._warn(special_notices(tokenizer, {"the text": text}, self.options.allow_special))
        else:
            if self.turn_open or not templated:
                raise InputError("this is a text session: append text, not messages")
            added = chat.added_messages(tokenizer, messages or (), self.options)
            self._warn(notices(tokenizer, messages or (), self.options))
        self.backbone.extend(self.cache, added.tokens, progress)
        self._adopt(added)
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
            turn_open=self.turn_open, options=self.options, history=self._history,
        )  # fmt: skip

    # Bookkeeping

    @staticmethod
    def _warn(notices: Sequence[str]) -> None:
        for notice in notices:
            warnings.warn(notice, UserWarning, stacklevel=3)

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

    def _adopt(self, *texts: TokenizedText) -> None:
        """Enter text whose tokens are in the cache into the transcript."""
        for text in texts:
            base = len(self.transcript.text)
            self.slots += range(len(self.transcript.tokens), len(self.transcript.tokens) + len(text.tokens))
            self.transcript.append(text.text, text.tokens, text.offsets)
            self.transcript.messages += [chat.moved(message, base) for message in text.messages]
