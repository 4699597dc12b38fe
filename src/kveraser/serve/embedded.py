"""The in-process engine: transformers runs the backbone, and each context is a session of the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from kveraser.errors import BackboneError, EraserError, InputError, SessionError
from kveraser.measure.influence import Influence
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit, Receipt
from kveraser.methods import METHODS, default_method, make_method
from kveraser.model.backbone import PREFILL_CHUNK, Backbone
from kveraser.model.decode import AnswerText, Decoding, end_tokens
from kveraser.serve.batch import can_step_together, step_together
from kveraser.serve.engine import Held, Sampling, Step, Stream, TokenLogprob
from kveraser.serve.held import ANSWER_ROOM, NOTICE_ROOM, HeldSession
from kveraser.serve.sampling import Sampler
from kveraser.session.erase import Change
from kveraser.session.state import SessionState
from kveraser.text.spans import Selector
from kveraser.text.tokenized import TokenizedText


class _Answer:
    """The stream of one context."""

    def __init__(self, held: HeldSession, sampling: Sampling) -> None:
        backbone = held.backbone
        self.sampler = Sampler(sampling, held.live_tokens)
        self.decoding = Decoding(stop=sampling.stop)
        self.text = AnswerText(backbone.tokenizer, sampling.stop, sampling.show_special)
        self.held, self.tokens = held, list[int]()
        self.ends = frozenset[int]() if sampling.ignore_eos else end_tokens(backbone)
        self.limit = sampling.max_tokens
        self.marks = held.open_answer()
        self.feed = held.transcript.tokens[held.pending_places(1)[0]]
        self.finish_reason: str | None = None
        self.closed = False
        # Tokens whose text is not yet shown, with the offset of their text.
        self._waiting: list[tuple[TokenLogprob, int]] = []

    def advance(self, chosen: TokenLogprob) -> Step:
        """Add a token to the answer."""
        if chosen.token in self.ends:
            return self._finish("stop", "")
        self._waiting.append((chosen, len(self.text.text.rstrip("\ufffd"))))
        self.tokens.append(chosen.token)
        self.feed = chosen.token
        shown, backbone = self.text.add(chosen.token), self.held.backbone
        if self.text.cut or self.decoding.stops(backbone.tokenizer, self.tokens):
            return self._finish("stop", shown)
        full = backbone.max_positions is not None and self.held.cache.next_position >= backbone.max_positions
        if full or (self.limit is not None and len(self.tokens) >= self.limit):
            return self._finish("length", shown)
        everything = self.text.shown == self.text.text
        return Step(shown, self._said(len(self._waiting) if everything else self._begun()))

    def _finish(self, reason: str, shown: str) -> Step:
        self.finish_reason = reason
        shown += self.text.finish()
        if not self.text.cut:
            return Step(shown, self._said(len(self._waiting)), reason)
        said = self._said(self._begun())
        # Drop the tokens from the beginning of the stop text on.
        del self.tokens[len(self.tokens) - len(self._waiting) :]
        return Step(shown, said, reason)

    def _begun(self) -> int:
        """Number of waiting tokens whose text is at least partly shown."""
        return sum(start < len(self.text.shown) for _, start in self._waiting)

    def _said(self, count: int) -> tuple[TokenLogprob, ...]:
        said = tuple(token for token, _ in self._waiting[:count])
        del self._waiting[:count]
        return said


class TransformersEngine:
    """An `Engine` that runs a backbone in this process. See `kveraser.serve.engine.Engine` for the methods.

    Args:
        backbone: the model. No other thread may edit the contexts of the engine.
        method: the default erasing method; None: see `default_method`.
    """

    def __init__(self, backbone: Backbone, method: str | None = None) -> None:
        self.backbone, self.method = backbone, method
        self.name, self.tokenizer, self.max_positions = backbone.name, backbone.tokenizer, backbone.max_positions
        self.bytes_per_token, self.spare_tokens = backbone.bytes_per_token, NOTICE_ROOM + ANSWER_ROOM
        self._between: Callable[[], None] = lambda: None
        self._chunk = PREFILL_CHUNK
        self._together = can_step_together(backbone)
        self._vocabulary: int = backbone.model.get_input_embeddings().num_embeddings

    def share_time(self, between: Callable[[], None], chunk: int) -> None:
        """Set the callback that audits and erases call between their forward passes."""
        self._between, self._chunk = between, chunk

    def methods(self) -> list[str]:
        """Methods that support this backbone and its loaded eraser."""
        own = self.method or str(default_method(self.backbone))
        found = [own]
        for name in METHODS:
            with suppress(EraserError, BackboneError):
                make_method(name).resolve(self.backbone)
                found.append(name)
        return list(dict.fromkeys(found))

    def hold(self, text: TokenizedText) -> HeldSession:
        """Create a context; no tokens are run.

        Raises:
            ContextLengthError: more tokens than the backbone has positions.
            InputError: no tokens, or ids that the backbone does not have.
        """
        self._check(text)
        cache = self.backbone.new_cache(len(text.tokens) + ANSWER_ROOM)
        turn_open = text.body_start > 0 and not text.messages
        held = HeldSession(state=SessionState(self.backbone, cache, turn_open=turn_open))
        held.add(text)
        return held

    def append(self, held: Held, text: TokenizedText) -> None:
        """Append pending text. Raises as `hold`, with the context unchanged."""
        self._check(text)
        _own(held).add(text)

    def _check(self, text: TokenizedText) -> None:
        if not text.tokens:
            raise InputError("the text has no tokens: give some")
        foreign = [token for token in text.tokens if not 0 <= token < self._vocabulary]
        if foreign:
            raise InputError(f"token {foreign[0]} is none of the {self._vocabulary} of {self.name}: give ids from 0 on")

    def prefill(self, held: Held, most: int) -> int:
        """Returns the number of tokens to run before an answer can begin: 0 if only the last one is pending."""
        session = _own(held)
        session.run_pending(max(0, min(most, session.pending - 1)))
        return max(0, session.pending - 1)

    def truncate(self, held: Held, tokens: int) -> None:
        """Undo steps that refer to removed tokens are removed."""
        _own(held).truncate(tokens)

    def edit(
        self, held: Held, changes: Sequence[Change], method: str | None, max_kl: float | None, undoable: bool
    ) -> Receipt:
        """`max_kl` without a method selects `auto`."""
        session = _own(held)
        if session.pending > 1:
            raise SessionError(f"{session.pending - 1} tokens wait to be run: prefill the context before an erase")
        chosen = method or ("auto" if max_kl is not None else self.method)
        if chosen == "auto":
            # The audits of `auto` compare all live tokens.
            session.run_pending(1)
        session.make_room(NOTICE_ROOM + sum(len(change.text.tokens) for change in changes if change.text is not None))
        with self.backbone.sharing(self._between, self._chunk):
            receipt = session.edit(changes, chosen, max_kl=max_kl)
        if not undoable:
            session.forget_undo(0)
            session.receipts[-1] = receipt = replace(receipt, undo_bytes=0)
        return receipt

    def undo(self, held: Held, steps: int) -> None:
        """See `Session.undo`. Erases, appends and kept answers are one step each."""
        _own(held).undo(steps)

    def forget_undo(self, held: Held, keep: int) -> None:
        """Also overwrites unused slots."""
        _own(held).forget_undo(keep)

    def fork(self, held: Held) -> HeldSession:
        """Copies undo steps, too."""
        return _own(held).fork()

    def exact_copy(self, held: Held) -> HeldSession:
        """No tokens are run here; `prefill` runs them in chunks."""
        return _own(held).exact_copy()

    def audit(self, held: Held, probes: Sequence[str | Probe] | None, secrets: Sequence[str] | None) -> Audit:
        """See `Session.audit`."""
        session = _own(held)
        session.run_pending(session.pending)
        with self.backbone.sharing(self._between, self._chunk):
            return session.audit(probes, secrets=secrets)

    def influence(self, held: Held, what: Sequence[Selector]) -> Influence:
        """See `Session.influence`."""
        with self.backbone.sharing(self._between, self._chunk):
            return _own(held).influence(list(what))

    def begin(self, held: Held, sampling: Sampling) -> Stream:
        """If no token is pending, the last one is run again.

        Raises:
            InputError: the sampling settings are invalid.
            SessionError, ContextLengthError: more than the last token is pending; no position is left.
        """
        return _Answer(_own(held), sampling)

    def step(self, streams: Sequence[Stream]) -> list[Step]:
        """After an exception no stream has advanced."""
        answers = [_open(stream) for stream in streams]
        ended = [answer for answer in answers if answer.finish_reason is not None]
        if ended:
            raise SessionError(f"an answer has ended ({ended[0].finish_reason}): finish it, and begin another")
        caches, tokens = [answer.held.cache for answer in answers], [answer.feed for answer in answers]
        lengths = [cache.length for cache in caches]
        for answer in answers:
            answer.held.make_room(1)
        try:
            if self._together and len(answers) > 1:
                logits = step_together(self.backbone, caches, tokens)
            else:
                alone = zip(caches, tokens, strict=True)
                logits = torch.cat([self.backbone.logits(cache, [token]) for cache, token in alone])
            chosen = [answer.sampler.choose(row) for answer, row in zip(answers, logits.cpu(), strict=True)]
        except BaseException:
            for cache, length in zip(caches, lengths, strict=True):
                if cache.length > length:
                    cache.truncate(length)
            raise
        return [answer.advance(token) for answer, token in zip(answers, chosen, strict=True)]

    def finish(self, stream: Stream, keep: bool) -> None:
        """A kept answer is an undo step, with its last token pending. A second call has no effect."""
        if isinstance(stream, _Answer) and stream.closed:
            return
        answer = _open(stream)
        answer.closed = True
        answer.held.close_answer(answer.marks, answer.tokens, keep)

    def save(self, held: Held, path: Path) -> None:
        """Write a session file of the library.

        Raises:
            SessionFileError: it can't be written; an existing file is kept.
        """
        _own(held).save(path)

    def load(self, path: Path) -> HeldSession:
        """Raises SessionFileError if the file is missing, corrupt, or from another model."""
        return HeldSession.load(path, self.backbone)

    def drop(self, held: Held, wipe: bool) -> None:
        """Free the context; it can't be used afterwards.

        Raises:
            SessionError: an answer is being decoded.
        """
        _own(held).release(wipe)


def _own(held: Held) -> HeldSession:
    if not isinstance(held, HeldSession):
        raise SessionError(f"{type(held).__name__} is no context of this engine: take one from hold or load")
    return held


def _open(stream: Stream) -> _Answer:
    if not isinstance(stream, _Answer) or stream.closed:
        raise SessionError("the answer is finished: begin another")
    return stream
