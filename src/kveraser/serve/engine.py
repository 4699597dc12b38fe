"""The interface between the server and an engine that holds and computes contexts.

All calls come from the scheduler's thread and are short: long work is split into several calls.
`kveraser.serve.embedded` runs the backbone in this process; another engine may drive a separate server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kveraser.measure.influence import Influence
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit, Receipt
from kveraser.session.erase import Change
from kveraser.text.spans import Selector, Transcript
from kveraser.text.tokenized import TokenizedText


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded. Greedy at temperature 0.

    Attributes:
        max_tokens: maximum length of the answer; None: limited only by the context.
        temperature, top_p: as in OpenAI's API.
        frequency_penalty, presence_penalty: as in OpenAI's API, over the answer's tokens.
        seed: of the random numbers; None: a random seed.
        stop: texts that end the answer and are not part of it.
        top_k, min_p, repetition_penalty: as in vLLM; 0, 0 and 1 have no effect. The penalty includes the prompt.
        ignore_eos: continue after an end-of-sequence token.
        show_special: include special tokens in the answer's text.
        logprobs: number of most likely tokens to report per position; 0: only the chosen one; None: no logprobs.
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
    """A token with its log-probability in nats, and the most likely tokens at its position."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Step:
    """The output of one decode step for one stream.

    Attributes:
        text: new text to show, without incomplete characters and without the beginning of a stop text.
        tokens: the tokens of that text, with log-probabilities if the sampling requests them.
        finish_reason: `stop` or `length` in the last step, else None.
    """

    text: str
    tokens: tuple[TokenLogprob, ...]
    finish_reason: str | None = None


class Held(Protocol):
    """A context held by an engine, with the attributes that the server reads."""

    @property
    def transcript(self) -> Transcript:
        """All text and tokens read or generated, which of them are live, and the message ranges."""

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts of all erases."""

    @property
    def pending(self) -> int:
        """Number of tokens at the end of the transcript that are not yet in the cache. `begin` runs the last one."""

    @property
    def exact(self) -> bool:
        """Whether the cache equals a fresh prefill of its live tokens."""

    @property
    def undo_steps(self) -> int:
        """Number of edits that can be undone."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory in use: whole buffers and undo states."""


class Stream(Protocol):
    """An answer while it is decoded from a context."""

    @property
    def held(self) -> Held:
        """The context. No other call may use it until `finish`."""

    @property
    def tokens(self) -> Sequence[int]:
        """The answer's tokens so far."""


class Engine(Protocol):
    """A model with many contexts.

    Methods raise the errors of the library (`SpanError`, `MethodError`, `ContextLengthError`, `SessionError`, ...) and
    then leave the context unchanged.
    """

    name: str
    tokenizer: Any
    max_positions: int | None
    bytes_per_token: int
    """Of keys and values."""
    spare_tokens: int
    """Maximum number of spare slots in the buffers of a context."""

    def share_time(self, between: Callable[[], None], chunk: int) -> None:
        """Call `between` between the forward passes of long operations, which prefill in chunks of `chunk` tokens.

        `between` runs on the same thread and may use other contexts.
        """

    def methods(self) -> Sequence[str]:
        """Names of the supported erasing methods, the default first."""

    def hold(self, text: TokenizedText) -> Held:
        """Create a context of `text` with all tokens pending."""

    def append(self, held: Held, text: TokenizedText) -> None:
        """Append text to a context as pending tokens."""

    def prefill(self, held: Held, most: int) -> int:
        """Run up to `most` pending tokens, except the last one, and return how many remain."""

    def truncate(self, held: Held, tokens: int) -> None:
        """Remove all tokens from index `tokens` on from the transcript, and undo steps that refer to them."""

    def edit(
        self, held: Held, changes: Sequence[Change], method: str | None, max_kl: float | None, undoable: bool
    ) -> Receipt:
        """Erase token spans of the transcript and put text in their places; only the last token may be pending.

        Args:
            changes: in the order of the transcript.
            method: see `Session.erase`; None: the engine's default.
            max_kl: budget of `auto` in nats per token.
            undoable: False overwrites the removed states in all buffers.
        """

    def undo(self, held: Held, steps: int) -> None:
        """Undo the last edits bit for bit."""

    def forget_undo(self, held: Held, keep: int) -> None:
        """Keep only the last `keep` undo steps, and overwrite the states of the others."""

    def fork(self, held: Held) -> Held:
        """Make an independent copy."""

    def exact_copy(self, held: Held) -> Held:
        """Create a context with the same transcript and receipts whose live tokens are all pending."""

    def audit(self, held: Held, probes: Sequence[str | Probe] | None, secrets: Sequence[str] | None) -> Audit:
        """Audit the erases; see `Session.audit`."""

    def influence(self, held: Held, what: Sequence[Selector]) -> Influence:
        """Measure what spans changed in later text; see `Session.influence`."""

    def begin(self, held: Held, sampling: Sampling) -> Stream:
        """Start an answer. Only the last token may be pending; the first step runs it."""

    def step(self, streams: Sequence[Stream]) -> list[Step]:
        """Decode one token of every stream, in one forward pass if possible."""

    def finish(self, stream: Stream, keep: bool) -> None:
        """End a stream, complete or not. With `keep` its tokens stay in the context, else they are removed."""

    def save(self, held: Held, path: Path) -> None:
        """Write a snapshot atomically, without undo states."""

    def load(self, path: Path) -> Held:
        """Load a snapshot written by `save`."""

    def drop(self, held: Held, wipe: bool) -> None:
        """Free a context; `wipe` overwrites its buffers first."""
