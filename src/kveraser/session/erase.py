"""Erase spans from a session's cache, by a named method or by the cheapest one within a KL budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from kveraser.errors import BackboneError, ContextLengthError, EraserError, KVEraserError, MethodError
from kveraser.measure.audit import References
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Receipt
from kveraser.methods import METHODS, Method, make_method
from kveraser.methods.apply import erase_tokens, plan_erase
from kveraser.model.backbone import Backbone
from kveraser.session.audit import audit, make_references
from kveraser.session.state import SessionState
from kveraser.text.spans import Span


def erase(
    state: SessionState, spans: Sequence[Span], method: Method, undoable: bool = True, force: bool = False
) -> Receipt:
    """Erase spans by a method; see `Session.erase`.

    Raises:
        MethodError, EraserError, BackboneError: the session is as before.
    """
    transcript, cache, targets = state.transcript, state.cache, _targets(state, spans)
    plan = plan_erase(state.backbone, cache, method, targets, force)
    before = state.checkpoint()
    _synchronize(state.backbone)
    started = time.perf_counter()
    try:
        with cache.edit() as journal:
            recomputed = erase_tokens(state.backbone, cache, plan.method, transcript.tokens, targets)
            _synchronize(state.backbone)
            seconds = time.perf_counter() - started
            for token in targets:
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


def erase_auto(
    state: SessionState, spans: Sequence[Span], max_kl: float, probes: Sequence[Probe] | None, undoable: bool
) -> Receipt:
    """Erase by the cheapest method whose audit is within `max_kl`, in the end by `recompute`; see `Session.erase`.

    Raises:
        MethodError: a negative budget, or no probe that measures influence.
    """
    if not max_kl >= 0:
        raise MethodError(f"max_kl is {max_kl}: give a budget of at least 0 nats per token")
    if probes is not None and all(probe.kind != "influence" for probe in probes):
        raise MethodError("auto chooses by probes of kind influence, and there is none: add a question as text")
    references: list[References] = []
    for method in _candidates(state, spans):
        try:
            receipt = erase(state, spans, method)
        except KVEraserError:
            if method.is_reference:
                raise
            # It can't serve this backbone (too few layers, say).
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


def _candidates(state: SessionState, spans: Sequence[Span]) -> list[Method]:
    """Methods that can serve, the cheapest first; the exact one last among equals."""
    live, targets = state.transcript.live, _targets(state, spans)
    width = sum(sum(live[span.start : span.end]) for span in spans)
    prefix = sum(live[: spans[0].start])
    suffix = sum(live) - prefix - width
    candidates = []
    for name, kind in METHODS.items():
        if kind.removes_text:
            # A method that needs a missing eraser or rotary positions is no candidate, nor one as costly as exact.
            with suppress(EraserError, BackboneError):
                plan = plan_erase(state.backbone, state.cache, make_method(name), targets)
                if plan.reason is None:
                    candidates.append(plan.method)
    return sorted(candidates, key=lambda method: (method.estimate(prefix, width, suffix), method.is_reference))


def _meets(state: SessionState, max_kl: float, probes: Sequence[Probe] | None, references: list[References]) -> bool:
    """Whether the last erase is within the budget; its receipt then carries the audit."""
    if max_kl == 0:
        return False
    try:
        if not references:
            references.append(make_references(state))
        measured = audit(state, probes, None, references[0])
    except ContextLengthError:
        # What can't be measured is not within the budget.
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
