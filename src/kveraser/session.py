"""A session: a context that can be asked, erased from, audited, saved; undo and fork come with the context."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kveraser import chat
from kveraser.audit import PreparedProbe, References, audit
from kveraser.backbone import Backbone, Progress
from kveraser.cache import EditableCache
from kveraser.context import Context, Piece
from kveraser.decode import Decoded, Decoding, stream_text
from kveraser.errors import InputError, KVEraserError, MethodError, SessionError
from kveraser.methods import METHODS, NOT_LIVE, Method, default_method, make_method
from kveraser.probes import Probe, default_probes, default_secrets
from kveraser.receipt import Audit, Receipt
from kveraser.spans import Erasable, MessageRange, Span, resolve

AUTO_PROBE_BUDGET = 0.02
"""Default KL budget of method="auto", nats per answer token."""


@dataclass(frozen=True)
class Answer:
    """A decoded answer.

    Attributes:
        text: the answer, without end markers.
        tokens: its token ids.
        finish_reason: `stop` (the model ended, or a stop text came) or `length`.
        prompt_tokens: tokens run before the first one of the answer.
        first_token_seconds, seconds: wall-clock time to the first token, and in all.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    def __str__(self) -> str:
        return self.text


class Session(Context):
    """A context and its live KV cache, with the verbs that people use. Takes the arguments of `Context`."""

    # Asking

    def ask(self, question: str, *, keep: bool = False, **decoding: Any) -> Answer:
        """Ask about the context.

        Args:
            question: the user's words; the chat template's markers are added.
            keep: continue the conversation with question and answer; otherwise the session stays as it was, so that
                one question never colours the next.
            decoding: fields of `Decoding`: max_new_tokens, do_sample, temperature, top_p, stop, seed, ...

        Raises:
            ContextLengthError, InputError, SessionError: the session is as before.
        """
        stream = self.stream(question, keep=keep, **decoding)
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
        self._check_idle()
        text = chat.question_text(self.backbone.tokenizer, question, self.turn_open)
        prompt = Piece(text, *self.backbone.tokenize(text))
        self.backbone.check_room(self.cache.next_position, len(prompt.tokens))
        return self._stream(question, prompt, keep, settings)

    def _stream(self, question: str, prompt: Piece, keep: bool, settings: Decoding) -> Generator[str, None, Answer]:
        self._check_idle()
        self._streaming = True
        marks, started, first, kept = self._marks(), time.perf_counter(), 0.0, False
        try:
            stream = stream_text(self.backbone, self.cache, prompt.tokens, settings)
            while True:
                try:
                    piece = next(stream)
                except StopIteration as finished:
                    decoded: Decoded = finished.value
                    break
                first = first or time.perf_counter() - started
                yield piece
            if keep:
                self._keep(question, prompt, decoded.tokens)
                self._history.append(marks)
                kept = True
        finally:
            if not kept:
                self._restore(marks)
            self._streaming = False
        return Answer(
            text=decoded.text,
            tokens=decoded.tokens,
            finish_reason="stop" if decoded.ended else "length",
            prompt_tokens=len(prompt.tokens),
            first_token_seconds=first,
            seconds=time.perf_counter() - started,
        )

    def _keep(self, question: str, prompt: Piece, tokens: Sequence[int]) -> None:
        """Make the question and answer just decoded part of the conversation."""
        tokenizer = self.backbone.tokenizer
        ends = [len(tokenizer.decode(tokens[: count + 1]).rstrip("\ufffd")) for count in range(len(tokens))]
        offsets = [(min(pair), max(pair)) for pair in zip([0, *ends[:-1]], ends, strict=True)]
        answer = Piece(tokenizer.decode(tokens), list(tokens), offsets)
        closing_text = chat.reply_closing(tokenizer) if chat.has_template(tokenizer) else ""
        closing = Piece(closing_text, *self.backbone.tokenize(closing_text))
        # Decoding leaves its last token out of the cache.
        said = [*prompt.tokens, *answer.tokens, *closing.tokens]
        self.backbone.extend(self.cache, said[self.cache.length - len(self.slots) :])
        messages: list[MessageRange] = []
        if chat.has_template(tokenizer) and not self.turn_open:
            base, opening = len(self.transcript.text), chat.reply_opening(tokenizer)
            asked = prompt.text.removesuffix(opening)
            messages = [
                chat.turn_range({"role": "user", "content": question}, asked, base),
                chat.turn_range(
                    {"role": "assistant", "content": answer.text},
                    opening + answer.text + closing.text,
                    base + len(asked),
                ),
            ]
        self._adopt([prompt, answer, closing], messages)
        self.turn_open = False

    # Erasing

    def erase(
        self,
        what: Erasable,
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        **parameters: Any,
    ) -> Receipt:
        """Erase spans from the live cache.

        Args:
            what: a text, a selector of `kveraser.spans`, or several; overlapping spans are merged.
            method: a name in `kveraser.METHODS` such as `repair(32)`, a method, or `auto`: the cheapest whose audit
                meets `max_kl` on `probes`, in the end `recompute`. None: the loaded eraser as it was trained, or
                `recompute` where no eraser is loaded.
            max_kl: budget of `auto`, mean KL(exact || edited) in nats per answer token (default 0.02).
            probes: questions for `auto` to audit with; default: built from the span and its surroundings.
            undoable: keep the old states for `undo`. False gives the memory back and forgets them for good.
            parameters: the method's parameters by name.

        Returns:
            The receipt, also appended to `receipts`.

        Raises:
            SpanError, MethodError, EraserError, RotationError: the session is as before.
        """
        self._check_idle()
        spans = resolve(self.transcript, what)
        if method == "auto":
            if parameters:
                raise MethodError(f"auto chooses the parameters itself: leave out {sorted(parameters)}")
            return self._erase_auto(spans, AUTO_PROBE_BUDGET if max_kl is None else max_kl, probes, undoable)
        if max_kl is not None or probes is not None:
            raise MethodError("max_kl and probes belong to method='auto': leave them out, or audit afterwards")
        if method is None and parameters:
            raise MethodError(f"parameters {sorted(parameters)} without a method: name the method they are for")
        chosen = default_method(self.backbone.eraser) if method is None else make_method(method, **parameters)
        return self._erase(spans, chosen, undoable)

    def _erase(self, spans: Sequence[Span], method: Method, undoable: bool = True) -> Receipt:
        targets = {token for span in spans for token in range(span.start, span.end) if self.transcript.live[token]}
        method, slots, recomputed, marks = method.settled(self.backbone), list(self.slots), 0, self._marks()
        self._synchronize()
        started = time.perf_counter()
        with self.cache.edit() as journal:
            while runs := _runs(slots, targets):
                # The other spans are no text any more either: what recomputes must not read them again.
                tokens = [
                    NOT_LIVE
                    if source == NOT_LIVE or (source in targets and not runs[0].start <= slot < runs[0].end)
                    else self.transcript.tokens[source]
                    for slot, source in enumerate(slots)
                ]
                erased = method(self.backbone, self.cache, tokens, runs[0])
                recomputed += erased.recomputed
                slots = [NOT_LIVE if slot == NOT_LIVE else slots[slot] for slot in erased.slots]
            self._synchronize()
            seconds = time.perf_counter() - started
        self.slots = slots
        for token in targets:
            self.transcript.live[token] = False
        if undoable:
            self._history.append(replace(marks, journal=journal))
        else:
            # The states and all that could bring them back are gone together.
            self._history.clear()
        receipt = Receipt(
            method=method.name,
            parameters=method.parameters,
            exact=self.exact,
            spans=tuple((span.start, span.end) for span in spans),
            text=tuple(self.transcript.text_of(span) for span in spans),
            erased=len(targets),
            recomputed=recomputed,
            seconds=seconds,
            bytes_written=journal.bytes_written,
            undo_bytes=journal.bytes if undoable else 0,
            next_position=self.cache.next_position,
        )
        self.receipts.append(receipt)
        return receipt

    def _erase_auto(
        self, spans: Sequence[Span], max_kl: float, probes: Sequence[str | Probe] | None, undoable: bool
    ) -> Receipt:
        if max_kl < 0:
            raise MethodError(f"max_kl is {max_kl}: give a budget of at least 0 nats per token")
        prefix, width = spans[0].start, sum(map(len, spans))
        suffix = len(self.transcript.tokens) - prefix - width
        candidates = [
            make_method(name)
            for name, kind in METHODS.items()
            if kind.removes_text and (not kind.needs_eraser or self.backbone.eraser is not None)
        ]
        # Exact comes last at equal cost, so that it is paid for only when nothing cheaper serves.
        candidates.sort(key=lambda method: (method.estimate(prefix, width, suffix), method.is_reference))
        references: References | None = None
        for method in candidates:
            try:
                receipt = self._erase(spans, method, undoable=True)
            except KVEraserError:
                # It can't serve this backbone (no rotary positions, too few layers); a dearer one can.
                continue
            if receipt.exact:
                break
            references = references or self.references()
            receipt = receipt.with_audit(self._audit(probes, None, references))
            self.receipts[-1] = receipt
            assert receipt.audit is not None
            if receipt.audit.kl <= max_kl:
                break
            self.undo()
        if not undoable:
            self._history.clear()
            receipt = replace(receipt, undo_bytes=0)
            self.receipts[-1] = receipt
        return receipt

    # Auditing

    def references(self, progress: Progress | None = None) -> References:
        """Prefill the live tokens afresh, and all tokens, erased ones included: what audits compare with."""
        exact, unerased = self.live_tokens, self.transcript.tokens
        done = 0

        def advance(tokens: int, _: int) -> None:
            if progress is not None:
                progress(done + tokens, len(exact) + len(unerased))

        first = self.backbone.prefill(exact, advance)
        done = len(exact)
        return References(first, self.backbone.prefill(unerased, advance))

    def audit(
        self,
        probes: Sequence[str | Probe] | None = None,
        *,
        secrets: Sequence[str] | None = None,
        references: References | None = None,
    ) -> Audit:
        """Measure what the erases so far achieved, against exact recomputation; the last receipt carries the result.

        Args:
            probes: questions (texts probe influence) or `Probe`s; default: built from the spans and their surroundings.
            secrets: texts that must not come out; default: numbers and names that only the erased text holds.
            references: from `references()`, to use them for several audits of the same erase.

        Raises:
            SessionError: nothing has been erased.
        """
        self._check_idle()
        if not self.receipts:
            raise SessionError("nothing has been erased yet: audit after erase")
        measured = self._audit(probes, secrets, references or self.references())
        self.receipts[-1] = self.receipts[-1].with_audit(measured)
        return measured

    def _audit(
        self, probes: Sequence[str | Probe] | None, secrets: Sequence[str] | None, references: References
    ) -> Audit:
        erased = [text for receipt in self.receipts for text in receipt.text]
        if probes is None:
            body = Span(0, self.receipts[-1].spans[0][0] or 1), Span(self.receipts[-1].spans[-1][1] - 1, self._end())
            before, after = (self._live_text(span) for span in body)
            chosen = default_probes(before, " ".join(self.receipts[-1].text), after)
        else:
            chosen = [Probe(probe) if isinstance(probe, str) else probe for probe in probes]
        prepared, tokenizer = [], self.backbone.tokenizer
        for probe in chosen:
            answer = None if probe.answer is None else tuple(self.backbone.tokenize(probe.answer)[0])
            prepared.append(
                PreparedProbe(
                    probe,
                    tuple(self.backbone.tokenize(chat.question_text(tokenizer, probe.question, self.turn_open))[0]),
                    answer,
                )
            )
        if secrets is None:
            secrets = [secret for text in erased for secret in default_secrets(text, self.text)]
        return audit(self.backbone, references, self.cache, prepared, secrets, self._hole(references))

    def _hole(self, references: References) -> EditableCache | None:
        """The live tokens prefilled at the positions they have in the cache, where those leave a hole."""
        kept = [slot for slot, source in enumerate(self.slots) if source != NOT_LIVE]
        positions = self.cache.positions[kept]
        if bool((positions == torch.arange(len(kept))).all()):
            return None
        tokens = [self.transcript.tokens[self.slots[slot]] for slot in kept]

        def prefill() -> EditableCache:
            cache = self.backbone.new_cache(len(kept))
            with cache.appending(positions):
                self.backbone.forward(tokens, cache, positions)
            return cache

        return references.remember(("hole", tuple(positions.tolist())), prefill)

    def _end(self) -> int:
        return len(self.transcript.tokens)

    def _live_text(self, span: Span) -> str:
        transcript = self.transcript
        return "".join(
            transcript.text[slice(*transcript.offsets[token])]
            for token in range(span.start, span.end)
            if transcript.live[token] and transcript.offsets[token][0] >= self.transcript.body_start
        )

    # Files

    def save(self, path: str | Path) -> None:
        """Write the session to one file; see `kveraser.session_file.save`."""
        from kveraser.session_file import save

        self._check_idle()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | str | Path | None = None, **loading: Any) -> Session:
        """Read a session from a file; see `kveraser.session_file.load`."""
        from kveraser.session_file import load

        return load(path, backbone, **loading)

    def _synchronize(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)


def _runs(slots: Sequence[int], targets: set[int]) -> list[Span]:
    """Runs of neighbouring slots that hold tokens to erase."""
    runs: list[Span] = []
    for slot, source in enumerate(slots):
        if source in targets:
            if runs and runs[-1].end == slot:
                runs[-1] = Span(runs[-1].start, slot + 1)
            else:
                runs.append(Span(slot, slot + 1))
    return runs
