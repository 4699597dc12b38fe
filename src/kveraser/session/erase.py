"""Edit a session: erase, replace and insert text by a named method, or by the cheapest one within a KL budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from kveraser.errors import BackboneError, ContextLengthError, EraserError, KVEraserError, MethodError
from kveraser.measure.audit import References
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Receipt
from kveraser.methods import METHODS, Method, make_method
from kveraser.methods.apply import edit_tokens, plan_erase
from kveraser.methods.slots import Edit
from kveraser.model.backbone import Backbone
from kveraser.session.audit import audit, make_references
from kveraser.session.state import SessionState
from kveraser.text.spans import Span
from kveraser.text.tokenized import TokenizedText


@dataclass(frozen=True)
class Change:
    """One change of the transcript: erase, replace or insert.

    Attributes:
        span: the tokens to erase; a `Place` for an insertion.
        text: the text to insert; None for an erase.
    """

    span: Span
    text: TokenizedText | None = None


def edit(
    state: SessionState, changes: Sequence[Change], method: Method, undoable: bool = True, force: bool = False
) -> Receipt:
    """Apply changes, in the order of the text, by a method; see `Session.erase`, `Session.replace`, `Session.insert`.

    Raises:
        ContextLengthError: not enough positions for the inserted text.
        MethodError, EraserError, BackboneError: the session is as before.
    """
    cache = state.cache
    inserted = sum(len(change.text.tokens) for change in changes if change.text is not None)
    targets = _targets(state, [change.span for change in changes])
    state.backbone.check_room(cache.next_position, inserted - len(targets))
    plan = plan_erase(state.backbone, cache, method, targets, force, inserted)
    before = state.checkpoint()
    _synchronize(state.backbone)
    started = time.perf_counter()
    try:
        with cache.edit() as journal:
            edits, spans = _write(state, changes)
            transcript = state.transcript
            recomputed = edit_tokens(state.backbone, cache, plan.method, transcript.tokens, edits)
            _synchronize(state.backbone)
            seconds = time.perf_counter() - started
            for edited in edits:
                for token in edited.targets:
                    transcript.live[token] = False
            receipt = Receipt(
                method=plan.method.name,
                parameters=plan.method.given,
                exact=state.exact,
                spans=tuple((span.start, span.end) for span in spans),
                text=tuple(transcript.text_of(span) for span in spans),
                erased=len(targets),
                recomputed=recomputed,
                seconds=seconds,
                bytes_written=journal.bytes_written,
                undo_bytes=journal.bytes if undoable else 0,
                next_position=cache.next_position,
                requested=None if plan.reason is None else str(method),
                reason=plan.reason,
                inserted=inserted,
                inserted_text=tuple(change.text.text for change in changes if change.text is not None),
            )
            state.receipts.append(receipt)
    except BaseException:
        # The cache has restored itself.
        state.restore(before)
        raise
    if undoable:
        state.history.append(replace(before, journal=journal))
    else:
        # No earlier step can be undone either: its journal is of a cache with the erased states.
        state.history.clear()
    return receipt


def erase(
    state: SessionState, spans: Sequence[Span], method: Method, undoable: bool = True, force: bool = False
) -> Receipt:
    """Erase spans by a method; see `Session.erase`."""
    return edit(state, [Change(span) for span in spans], method, undoable, force)


def _write(state: SessionState, changes: Sequence[Change]) -> tuple[list[Edit], list[Span]]:
    """Insert the new text into the transcript, and renumber the cache and earlier receipts.

    Returns:
        The edits and the spans to erase, in the new indices.
    """
    transcript, edits, spans, moved = state.transcript, list[Edit](), list[Span](), 0
    for change in changes:
        start, end = change.span.start + moved, change.span.end + moved
        targets = frozenset(token for token in range(start, end) if transcript.live[token])
        if start < end:
            spans.append(Span(start, end))
        new = range(0)
        if change.text is not None:
            count = len(change.text.tokens)
            transcript.insert(end, change.text.text, change.text.tokens, change.text.offsets, end - start)
            state.cache.renumber(end, count)
            state.receipts[:] = [receipt.moved(end, count) for receipt in state.receipts]
            new, moved = range(end, end + count), moved + count
        edits.append(Edit(targets, new))
    if not any(edited.inserted for edited in edits):
        # Adjacent runs of several spans are erased as one.
        edits = [Edit(frozenset[int]().union(*(edited.targets for edited in edits)))]
    return edits, spans


def edit_auto(
    state: SessionState, changes: Sequence[Change], max_kl: float, probes: Sequence[Probe] | None, undoable: bool
) -> Receipt:
    """Edit by the cheapest method whose audit is within `max_kl`, else by `recompute`; see `Session.erase`.

    Raises:
        MethodError: a negative budget, or no probe that measures influence.
    """
    if not max_kl >= 0:
        raise MethodError(f"max_kl is {max_kl}: give a budget of at least 0 nats per token")
    if probes is not None and all(probe.kind != "influence" for probe in probes):
        raise MethodError("auto chooses by probes of kind influence, and there is none: add a question as text")
    references: list[References] = []
    for method in _candidates(state, changes):
        try:
            receipt = edit(state, changes, method)
        except KVEraserError:
            if method.is_reference:
                raise
            # The method does not support this backbone, for example because it has too few layers.
            continue
        accepted = False
        try:
            accepted = receipt.exact or _meets(state, max_kl, probes, references)
        finally:
            if not accepted:
                state.undo(1)
        if accepted:
            break
    receipt = state.receipts[-1]
    if not undoable:
        state.history.clear()
        state.receipts[-1] = receipt = replace(receipt, undo_bytes=0)
    return receipt


def _candidates(state: SessionState, changes: Sequence[Change]) -> list[Method]:
    """Returns the applicable methods, cheapest first; `recompute` is last among equals."""
    spans = [change.span for change in changes]
    inserted = sum(len(change.text.tokens) for change in changes if change.text is not None)
    live, targets = state.transcript.live, _targets(state, spans)
    width = sum(sum(live[span.start : span.end]) for span in spans)
    prefix = sum(live[: spans[0].start])
    suffix = sum(live) - prefix - width
    candidates = []
    for name, kind in METHODS.items():
        if kind.removes_text and (kind.inserts or not inserted):
            # Skip methods without their eraser or rotary positions, and those that cost as much as `recompute`.
            with suppress(EraserError, BackboneError):
                plan = plan_erase(state.backbone, state.cache, make_method(name), targets, False, inserted)
                if plan.reason is None:
                    candidates.append(plan.method)
    return sorted(candidates, key=lambda method: (method.estimate(prefix, width, suffix), method.is_reference))


def _meets(state: SessionState, max_kl: float, probes: Sequence[Probe] | None, references: list[References]) -> bool:
    """Audit the last edit, store the audit in its receipt, and return whether it is within the budget."""
    if max_kl == 0:
        return False
    try:
        if not references:
            references.append(make_references(state))
        measured = audit(state, probes, None, references[0])
    except ContextLengthError:
        return False
    state.receipts[-1] = state.receipts[-1].with_audit(measured)
    return measured.kl is not None and measured.kl <= max_kl


def _targets(state: SessionState, spans: Sequence[Span]) -> set[int]:
    """Live tokens of the spans."""
    live = state.transcript.live
    return {token for span in spans for token in range(span.start, span.end) if live[token]}


def _synchronize(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
