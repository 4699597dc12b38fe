"""The state of a session: transcript, KV cache, receipts and undo history."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kveraser.cache.editable import EditableCache, Journal
from kveraser.errors import SessionError
from kveraser.measure.receipt import Receipt
from kveraser.model.backbone import Backbone
from kveraser.text import chat
from kveraser.text.spans import Transcript
from kveraser.text.template import DEFAULT_OPTIONS, ChatOptions
from kveraser.text.tokenized import TokenizedText


@dataclass(frozen=True)
class Checkpoint:
    """The session before a step, for undo.

    Attributes:
        length: number of slots of the cache.
        transcript: a copy.
        journal: undo journal of the step's edit; None for an append or a kept answer.
    """

    length: int
    transcript: Transcript
    receipts: tuple[Receipt, ...]
    turn_open: bool
    journal: Journal | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the transcript."""
        return len(self.transcript.tokens)


@dataclass
class SessionState:
    """All state of a session. Token indices of the cache are indices of the transcript.

    Attributes:
        options: options for rendering with the chat template.
        turn_open: the context ends inside the user's turn, which a question continues.
        receipts: receipts of all edits, in order.
        history: a checkpoint for every step that can be undone.
        streaming: an answer is being decoded; other calls are refused.
    """

    backbone: Backbone
    cache: EditableCache
    transcript: Transcript = field(default_factory=Transcript)
    options: ChatOptions = DEFAULT_OPTIONS
    turn_open: bool = False
    receipts: list[Receipt] = field(default_factory=list)
    history: list[Checkpoint] = field(default_factory=list)
    streaming: bool = False

    @property
    def live_tokens(self) -> list[int]:
        """Ids of the tokens that have not been erased, in order."""
        return [token for token, live in zip(self.transcript.tokens, self.transcript.live, strict=True) if live]

    @property
    def exact(self) -> bool:
        """Whether the cache equals a fresh prefill of the live tokens in it."""
        return self.cache.exact_length == self.cache.length == self.cache.token_count

    def check_idle(self) -> None:
        """Raise SessionError while an answer is being streamed."""
        if self.streaming:
            raise SessionError("an answer is being streamed: exhaust or close its generator first, or fork before")

    def checkpoint(self) -> Checkpoint:
        """Returns a checkpoint of the current state."""
        return Checkpoint(self.cache.length, self.transcript.copy(), tuple(self.receipts), self.turn_open)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint. Edits of the cache must have been reverted already."""
        if self.cache.length > checkpoint.length:
            self.cache.truncate(checkpoint.length)
        self.transcript = checkpoint.transcript.copy()
        self.receipts[:] = checkpoint.receipts
        self.turn_open = checkpoint.turn_open

    def adopt(self, *texts: TokenizedText) -> None:
        """Append texts to the transcript; the caller appends their tokens to the cache."""
        for text in texts:
            base = len(self.transcript.text)
            self.transcript.append(text.text, text.tokens, text.offsets)
            self.transcript.messages += [chat.moved(message, base) for message in text.messages]

    def undo(self, steps: int) -> None:
        """Undo the last `steps` steps; the cache is restored bit for bit.

        Raises:
            SessionError: fewer steps can be undone; nothing changes.
        """
        self.check_idle()
        if not 1 <= steps <= len(self.history):
            raise SessionError(f"can't undo {steps} steps: {len(self.history)} can be undone")
        for _ in range(steps):
            checkpoint = self.history.pop()
            if checkpoint.journal is not None:
                self.cache.revert(checkpoint.journal)
            self.restore(checkpoint)

    def fork(self, cache: EditableCache | None = None) -> SessionState:
        """Returns an independent copy, which shares the read-only undo journals.

        Args:
            cache: the copy's cache. Default: a copy of this one.
        """
        self.check_idle()
        return replace(
            self,
            cache=self.cache.fork() if cache is None else cache,
            transcript=self.transcript.copy(),
            receipts=list(self.receipts),
            history=list(self.history),
        )
