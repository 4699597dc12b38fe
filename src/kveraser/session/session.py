"""A session: a dialogue over a live cache that can be erased from, audited and saved."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import (
    BackboneError,
    ContextLengthError,
    EraserError,
    InputError,
    KVEraserError,
    MethodError,
    SessionError,
)
from kveraser.measure.audit import ANSWER_TOKENS, PreparedProbe, References, audit
from kveraser.measure.probes import Probe, default_probes, default_secrets
from kveraser.measure.receipt import Audit, Receipt
from kveraser.methods import METHODS, NOT_LIVE, Method, default_method, make_method
from kveraser.methods.apply import erase_tokens, plan_erase
from kveraser.model.backbone import Backbone, Progress
from kveraser.session.dialogue import Answer, Dialogue
from kveraser.text import chat
from kveraser.text.spans import Erasable, Span, resolve
from kveraser.text.tokenized import tokenize

AUTO_PROBE_BUDGET = 0.02
"""Default KL budget of method="auto", nats per answer token."""


class Session(Dialogue):
    """A context and its live KV cache, with the verbs that people use. Takes the arguments of `Context`."""

    # Erasing

    def erase(
        self,
        what: Erasable,
        method: str | Method | None = None,
        *,
        max_kl: float | None = None,
        probes: Sequence[str | Probe] | None = None,
        undoable: bool = True,
        force: bool = False,
        **parameters: Any,
    ) -> Receipt:
        """Erase spans from the live cache.

        A method that would run about as many tokens as exact recomputation (three quarters of them or more) is replaced
        by `recompute`; the receipt's `requested` and `reason` then say so.

        Args:
            what: a text, a selector of `kveraser.text.spans`, or several; overlapping spans are merged.
            method: a name in `kveraser.METHODS` such as `repair(32)`, a method, or `auto`: the cheapest whose audit
                meets `max_kl` on `probes`, in the end `recompute`. None: the loaded eraser as it was trained, or
                `recompute` where no eraser is loaded.
            max_kl: budget of `auto`, mean KL(exact || edited) in nats per answer token (default 0.02).
            probes: questions for `auto` to audit with; default: built from the span and its surroundings.
            undoable: keep the old states for `undo`. False keeps nothing to undo with, this step or any earlier one;
                buffer slots that the erase freed hold their old bits until they are written again.
            force: run the method named, whatever exact recomputation would cost: for measurements of it.
            parameters: the method's parameters by name.

        Returns:
            The receipt, also appended to `receipts`.

        Raises:
            SpanError, MethodError, EraserError, BackboneError: the session is as before.
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
        chosen = default_method(self.backbone) if method is None else make_method(method, **parameters)
        return self._erase(spans, chosen, undoable, force)

    def _targets(self, spans: Sequence[Span]) -> set[int]:
        return {token for span in spans for token in range(span.start, span.end) if self.transcript.live[token]}

    def _erase(self, spans: Sequence[Span], method: Method, undoable: bool = True, force: bool = False) -> Receipt:
        targets = self._targets(spans)
        plan = plan_erase(self.backbone, self.cache, method, self.slots, targets, force)
        requested, method, marks = method, plan.method, self._marks()
        self._synchronize()
        started = time.perf_counter()
        try:
            with self.cache.edit() as journal:
                slots, recomputed = erase_tokens(
                    self.backbone, self.cache, method, self.transcript.tokens, self.slots, targets
                )
                self._synchronize()
                seconds = time.perf_counter() - started
                self.slots = slots
                for token in targets:
                    self.transcript.live[token] = False
                receipt = Receipt(
                    method=method.name,
                    parameters=method.given,
                    exact=self.exact,
                    spans=tuple((span.start, span.end) for span in spans),
                    text=tuple(self.transcript.text_of(span) for span in spans),
                    erased=len(targets),
                    recomputed=recomputed,
                    seconds=seconds,
                    bytes_written=journal.bytes_written,
                    undo_bytes=journal.bytes if undoable else 0,
                    next_position=self.cache.next_position,
                    requested=None if plan.reason is None else str(requested),
                    reason=plan.reason,
                )
                self.receipts.append(receipt)
        except BaseException:
            # The cache has put itself back.
            self._restore(marks)
            raise
        if undoable:
            self._history.append(replace(marks, journal=journal))
        else:
            # The states and all that could bring them back are gone together.
            self._history.clear()
        return receipt

    def _erase_auto(
        self, spans: Sequence[Span], max_kl: float, probes: Sequence[str | Probe] | None, undoable: bool
    ) -> Receipt:
        if not max_kl >= 0:
            raise MethodError(f"max_kl is {max_kl}: give a budget of at least 0 nats per token")
        chosen = None if probes is None else _checked(probes)
        if chosen is not None and all(probe.kind != "influence" for probe in chosen):
            raise MethodError("auto chooses by probes of kind influence, and there is none: add a question as text")
        width = sum(sum(self.transcript.live[span.start : span.end]) for span in spans)
        prefix = sum(self.transcript.live[: spans[0].start])
        suffix = len(self.live_tokens) - prefix - width
        candidates, targets = [], self._targets(spans)
        for name, kind in METHODS.items():
            # What can't serve this backbone (no eraser, no rotary positions) is no candidate, nor what costs about as
            # much as the exact one.
            if kind.removes_text:
                with suppress(EraserError, BackboneError):
                    plan = plan_erase(self.backbone, self.cache, make_method(name), self.slots, targets)
                    if plan.reason is None:
                        candidates.append(plan.method)
        # Exact comes last at equal cost, so that it is paid for only when nothing cheaper serves.
        candidates.sort(key=lambda method: (method.estimate(prefix, width, suffix), method.is_reference))
        memory: list[References] = []
        for method in candidates:
            try:
                receipt = self._erase(spans, method, undoable=True)
            except KVEraserError:
                if method.is_reference:
                    raise
                # It can't serve this backbone (too few layers, say); a dearer one can.
                continue
            accepted = False
            try:
                accepted = receipt.exact or self._meets(max_kl, chosen, memory)
            finally:
                if not accepted:
                    self.undo()
            if accepted:
                break
        receipt = self.receipts[-1]
        if not undoable:
            self._history.clear()
            self.receipts[-1] = receipt = replace(receipt, undo_bytes=0)
        return receipt

    def _meets(self, max_kl: float, probes: Sequence[Probe] | None, memory: list[References]) -> bool:
        """Whether the last erase, an approximate one, is within the budget; its receipt carries the audit then."""
        if max_kl == 0:
            return False
        try:
            if not memory:
                memory.append(self.references())
            measured = self._audit(probes, None, memory[0])
        except ContextLengthError:
            # What can't be measured is not within any budget.
            return False
        self.receipts[-1] = self.receipts[-1].with_audit(measured)
        return measured.kl is not None and measured.kl <= max_kl

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
        self._check_idle()
        if not self.receipts:
            raise SessionError("nothing has been erased yet: audit after erase")
        chosen = None if probes is None else _checked(probes)
        if isinstance(secrets, str) or not all(isinstance(secret, str) for secret in secrets or ()):
            raise InputError(f"secrets is {secrets!r}: give a list of texts")
        sizes = len(self.live_tokens), len(self.transcript.tokens)
        if references is not None and (references.exact.length, references.unerased.length) != sizes:
            raise SessionError(
                f"the references are of {references.exact.length} live tokens of {references.unerased.length}, "
                f"the session has {sizes[0]} of {sizes[1]}: take them anew with references()"
            )
        measured = self._audit(chosen, secrets, references or self.references(), answer_tokens)
        self.receipts[-1] = self.receipts[-1].with_audit(measured)
        return measured

    def _audit(
        self,
        probes: Sequence[Probe] | None,
        secrets: Sequence[str] | None,
        references: References,
        answer_tokens: int = ANSWER_TOKENS,
    ) -> Audit:
        erased = [text for receipt in self.receipts for text in receipt.text]
        if probes is None:
            last, body = self.receipts[-1], self._body_token()
            before = self.transcript.live_text(min(body, last.spans[0][0]), last.spans[0][0])
            after = self.transcript.live_text(last.spans[-1][1], len(self.transcript.tokens))
            probes = default_probes(before, " ".join(last.text), after)
        tokenizer = self.backbone.tokenizer
        prepared = [
            PreparedProbe(
                probe,
                self._prompt(probe.question, probe.answer_prefix).tokens,
                None
                if probe.answer is None
                else tokenize(tokenizer, chat.answer_text(probe.answer, probe.answer_prefix), follows=True).tokens,
            )
            for probe in probes
        ]
        if secrets is None:
            secrets = [secret for text in erased for secret in default_secrets(text, self.text)]
        hole = self._hole(references)
        return audit(self.backbone, references, self.cache, prepared, secrets, hole, answer_tokens=answer_tokens)

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
            with cache.edit():
                cache.set_next_position(self.cache.next_position)
            return cache

        return references.remember(("hole", self.cache.next_position, tuple(positions.tolist())), prefill)

    def _body_token(self) -> int:
        """The first token of the user's own text."""
        return bisect_left(self.transcript.offsets, self.transcript.body_start, key=lambda offset: offset[0])

    # Files

    def save(self, path: str | Path) -> None:
        """Write the session to one file; see `kveraser.session.file.save`."""
        from kveraser.session.file import save

        self._check_idle()
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | str | Path | None = None, **loading: Any) -> Session:
        """Read a session from a file; see `kveraser.session.file.load`."""
        from kveraser.session.file import load

        return load(path, backbone, **loading)

    def _synchronize(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize(self.backbone.device)


def _checked(probes: Sequence[str | Probe]) -> list[Probe]:
    """Probes as a user gives them."""
    if isinstance(probes, str) or not isinstance(probes, Sequence) or not probes:
        raise InputError(f"probes is {probes!r}: give a list of questions, at least one")
    for probe in probes:
        if not isinstance(probe, str | Probe):
            raise InputError(f"{probe!r} is not a probe: give a question, or a kveraser.Probe")
    return [Probe(probe) if isinstance(probe, str) else probe for probe in probes]


__all__ = ["AUTO_PROBE_BUDGET", "Answer", "Session"]
