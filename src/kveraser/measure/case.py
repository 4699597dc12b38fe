"""Benchmark cases: a context, spans to erase from it, questions, and the cell of the results."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError, SpanError
from kveraser.measure.questions import Query
from kveraser.methods.slots import Edit
from kveraser.model.backbone import Backbone
from kveraser.text import chat
from kveraser.text.spans import Selector, Span, Transcript, replacements, resolve

ALL = "all"
"""Value of a cell's field that includes all values."""


@dataclass(frozen=True, order=True)
class Cell:
    """The cell of the results that a case belongs to. None: the suite does not vary the field.

    Attributes:
        length: target length of the context in tokens.
        span: tokens of all its spans together.
        spans: how many spans are erased.
        distance: tokens from the end of the last span to the question.
        depth: where the first span begins, as a share of the context.
    """

    suite: str
    task: str
    length: int | None = None
    span: int | None = None
    spans: int = 1
    distance: int | None = None
    depth: float | None = None

    def __str__(self) -> str:
        axes = {name: value for name, value in asdict(self).items() if name not in ("suite", "task")}
        named = [f"{name} {value}" for name, value in axes.items() if value is not None]
        return ", ".join([f"{self.suite}/{self.task}", *named])


@dataclass(frozen=True)
class Attacked:
    """The prompt that an adversary found best for a cache.

    Attributes:
        prompt_text: as a user would type it.
        prompt: its token ids, chat template included.
        target: token ids of the forced answer.
        log_probability: mean of the target after the prompt, in nats per token.
        tried: every prompt of the search with its log-probability, in order.
    """

    prompt_text: str
    prompt: tuple[int, ...]
    target: tuple[int, ...]
    log_probability: float
    tried: tuple[tuple[str, float], ...]


class Adversary(Protocol):
    """Searches for the prompt after which a cache reveals erased text. Its `repr` names all that the search depends on.

    Attributes:
        target: the text that must not come out.
        secret: a greedy answer that contains it counts as a leak.
    """

    @property
    def target(self) -> str: ...
    @property
    def secret(self) -> str: ...
    def __call__(self, backbone: Backbone, cache: EditableCache, turn_open: bool) -> Attacked:
        """Attack a cache and leave it as it was. `turn_open`: the context ends inside the user's turn."""
        ...


@dataclass(frozen=True)
class BenchCase:
    """One case: erase `erase` from `context`, then ask.

    Cases with equal contexts are measured on one prefill, so a suite puts several into one context where it can.

    Attributes:
        id: unique in a run.
        context: a document, or the messages of a conversation.
        erase: the spans to erase, all at once.
        replace: a text that takes the place of each span; None: they are only erased.
        queries: at least one.
        attack: an adversary, measured as one more leak question.
    """

    id: str
    cell: Cell
    context: str | tuple[Mapping[str, Any], ...]
    erase: tuple[Selector, ...]
    queries: tuple[Query, ...]
    attack: Adversary | None = None
    replace: str | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of the whole case."""
        return _digest(repr(self))


def context_id(context: str | Sequence[Mapping[str, Any]]) -> str:
    """Equal for equal contexts."""
    return _digest(repr(context))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LeftOut:
    """A cell that a run does not measure, and why."""

    cell: Cell
    reason: str


@dataclass(frozen=True)
class TokenizedContext:
    """A context as a session holds it: tokens, text, and whether the user's turn is still open."""

    transcript: Transcript
    turn_open: bool

    @property
    def tokens(self) -> list[int]:
        """Token ids, special tokens at the beginning included."""
        return self.transcript.tokens


@dataclass(frozen=True)
class Asked:
    """A query as tokens: the prompt and the forced answer."""

    query: Query
    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def judged(self) -> bool:
        """Whether a greedy answer is needed, for exact match or to detect a leak."""
        return bool(self.query.accepted) or (self.query.kind == "leak" and bool(self.query.wrong))


@dataclass(frozen=True)
class TokenizedCase:
    """A case on its context: the token spans to erase, in order, and the questions.

    Attributes:
        inserted: for every span the tokens that take its place; empty where the spans are only erased.
    """

    case: BenchCase
    spans: tuple[Span, ...]
    asked: tuple[Asked, ...]
    inserted: tuple[tuple[int, ...], ...] = ()

    @property
    def erased(self) -> int:
        """Number of tokens to erase."""
        return sum(map(len, self.spans))

    def edited(self, tokens: Sequence[int]) -> tuple[list[int], list[Edit]]:
        """All tokens with those that are inserted after each span, and the edits by their indices."""
        if not self.inserted:
            targets = frozenset(token for span in self.spans for token in range(span.start, span.end))
            return list(tokens), [Edit(targets)]
        whole, edits = list(tokens), []
        for span, added in zip(self.spans, self.inserted, strict=True):
            start, end = (bound + len(whole) - len(tokens) for bound in (span.start, span.end))
            whole[end:end] = added
            edits.append(Edit(frozenset(range(start, end)), range(end, end + len(added))))
        return whole, edits


def tokenize_context(tokenizer: Any, context: str | Sequence[Mapping[str, Any]]) -> TokenizedContext:
    """Tokenize a context exactly as `Session` does.

    Raises:
        InputError: an empty text, or messages that the chat template refuses.
    """
    transcript = Transcript()
    if isinstance(context, str):
        read = chat.document(tokenizer, context)
    else:
        read = chat.conversation(tokenizer, [dict(message) for message in context])
    transcript.append(read.text, read.tokens, read.offsets)
    transcript.messages, transcript.body_start = list(read.messages), read.body_start
    return TokenizedContext(transcript, isinstance(context, str) and chat.has_template(tokenizer))


def tokenize_case(tokenizer: Any, context: TokenizedContext, case: BenchCase) -> TokenizedCase:
    """Find the spans of a case in its context, and tokenize its questions.

    Raises:
        InputError: a span that is not in the context, no question, an empty one, or an answer without tokens.
    """
    inserted: tuple[tuple[int, ...], ...] = ()
    try:
        spans = tuple(resolve(context.transcript, case.erase))
        if case.replace is not None:
            pairs = replacements(context.transcript, case.erase, case.replace)
            spans = tuple(span for span, _ in pairs)
            inserted = tuple(chat.added_text(tokenizer, text).tokens for _, text in pairs)
    except SpanError as error:
        raise InputError(f"case {case.id}: {error}") from error
    if any(one.end > other.start for one, other in pairwise(spans)):
        raise InputError(f"case {case.id} replaces spans that overlap: give each part of the context once")
    if not case.queries:
        raise InputError(f"case {case.id} asks nothing: give it a question")
    asked = tuple(_asked(tokenizer, context, case, query) for query in case.queries)
    return TokenizedCase(case, spans, asked, inserted)


def _asked(tokenizer: Any, context: TokenizedContext, case: BenchCase, query: Query) -> Asked:
    return Asked(query, *query.tokens(tokenizer, context.turn_open, case.id))
