"""What the server asks of an engine: hold contexts, prefill, erase, decode a step, snapshot, drop. Nothing else.

Every call comes from one thread, the scheduler's, and is short: long work is cut into calls. In process an engine
runs the backbone itself (`kveraser.serve.embedded`); another may drive a separate server behind the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit, Receipt
from kveraser.session.erase import Change
from kveraser.text.spans import Transcript
from kveraser.text.tokenized import TokenizedText


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded. Greedy at temperature 0.

    Attributes:
        max_tokens: most tokens of the answer; None: as many as the context has room for.
        temperature, top_p: as in OpenAI's API.
        frequency_penalty, presence_penalty: likewise, over the answer's own tokens.
        seed: the same seed gives the same answer; None draws one.
        stop: texts at which the answer ends; they are not part of it.
        top_k, min_p, repetition_penalty: as in vLLM; 0, 0 and 1 do nothing. The penalty counts the prompt too.
        ignore_eos: go on where the model would end.
        show_special: special tokens are part of the answer's text.
        logprobs: how many of the likeliest tokens to report at each place; None reports none, 0 the chosen one alone.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    show_special: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token with its log-probability in nats, and the likeliest ones at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """What one decode step gave one stream.

    Attributes:
        text: new text that can be shown: never half a character, never the beginning of a stop text.
        tokens: chosen tokens whose text it is, with log-probabilities where the sampling asks for them.
        finish_reason: `stop` or `length` with the last step, else None.
    """

    text: str
    tokens: tuple[TokenLogprob, ...]
    finish_reason: str | None = None


class Held(Protocol):
    """A context that an engine holds: what the server may read of it."""

    @property
    def transcript(self) -> Transcript:
        """All text and tokens ever read or said, which of them are live, and where messages stand."""

    @property
    def receipts(self) -> list[Receipt]:
        """Of the erases so far."""

    @property
    def pending(self) -> int:
        """Tokens at the end of the transcript that are not in the cache yet; the last one waits for `begin`."""

    @property
    def exact(self) -> bool:
        """Whether the cache equals a fresh prefill of the live tokens in it."""

    @property
    def undo_steps(self) -> int:
        """How many edits can be undone."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes: buffers whole, and what undo keeps."""


class Stream(Protocol):
    """An answer that is being decoded from a context."""

    @property
    def held(self) -> Held:
        """The context; it takes no other call until `finish`."""

    @property
    def tokens(self) -> Sequence[int]:
        """The answer's tokens so far."""


class Engine(Protocol):
    """One model that holds many contexts.

    All methods raise what the library raises (`SpanError`, `MethodError`, `ContextLengthError`, `SessionError`, ...)
    and leave the context as it was then.
    """

    name: str
    tokenizer: Any
    max_positions: int | None
    bytes_per_token: int
    """Of keys and values."""
    spare_tokens: int
    """What a context may have room for beside its tokens, at most."""

    def share_time(self, between: Callable[[], None], chunk: int) -> None:
        """Call `between` between the passes of long works, which prefill in chunks of `chunk` tokens.

        It may use other contexts than the work's, on the same thread.
        """

    def methods(self) -> Sequence[str]:
        """Methods that it can erase by; first the one that it takes where no method is named."""

    def hold(self, text: TokenizedText) -> Held:
        """A new context of `text`, all of it pending."""

    def append(self, held: Held, text: TokenizedText) -> None:
        """Add text to the end of a context; it is pending."""

    def prefill(self, held: Held, most: int) -> int:
        """Run up to `most` pending tokens; the context's last token stays for `begin`. Returns how many are left."""

    def truncate(self, held: Held, tokens: int) -> None:
        """Forget the transcript from token `tokens` on, as if it had never been read; undo steps behind it go too."""

    def edit(
        self, held: Held, changes: Sequence[Change], method: str | None, max_kl: float | None, undoable: bool
    ) -> Receipt:
        """Erase token spans of the transcript and put text in their places; only the last token may be pending.

        Args:
            changes: in the order of the transcript.
            method: as `Session.erase` takes it; None: the engine's default.
            max_kl: the budget of `auto`, nats per token.
            undoable: False overwrites the states that went, so that no buffer holds them.
        """

    def undo(self, held: Held, steps: int) -> None:
        """Take back the last edits; every bit is as it was."""

    def forget_undo(self, held: Held, keep: int) -> None:
        """Keep only the last `keep` undo steps, and overwrite what the others held."""

    def fork(self, held: Held) -> Held:
        """An independent copy."""

    def exact_copy(self, held: Held) -> Held:
        """A context of the live tokens alone with the same transcript and receipts, all pending: made in idle time."""

    def audit(self, held: Held, probes: Sequence[str | Probe] | None, secrets: Sequence[str] | None) -> Audit:
        """Measure what the erases achieved; see `Session.audit`."""

    def begin(self, held: Held, sampling: Sampling) -> Stream:
        """Start an answer; only the context's last token is pending, and goes in with the first step."""

    def step(self, streams: Sequence[Stream]) -> list[Step]:
        """One token for every stream, in one pass where the contexts allow."""

    def finish(self, stream: Stream, keep: bool) -> None:
        """End a stream, finished or not. Kept, the answer's tokens are part of the context; else it is as before."""

    def save(self, held: Held, path: Path) -> None:
        """Write a snapshot, atomically. What undo needs is not written."""

    def load(self, path: Path) -> Held:
        """Read a snapshot of `save`."""

    def drop(self, held: Held, wipe: bool) -> None:
        """Let a context go; `wipe` overwrites its buffers first."""
