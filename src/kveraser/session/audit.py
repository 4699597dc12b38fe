"""Audits a session against a fresh prefill without the erased text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.errors import InputError
from kveraser.measure import audit as measure
from kveraser.measure.audit import ANSWER_TOKENS, PreparedProbe, References
from kveraser.measure.probes import Probe, default_probes, default_secrets
from kveraser.measure.receipt import Audit
from kveraser.model.backbone import Progress
from kveraser.session.answer import question_tokens
from kveraser.session.state import SessionState
from kveraser.text import chat
from kveraser.text.tokenized import tokenize


def make_references(state: SessionState, progress: Progress | None = None) -> References:
    """Prefill the references of an audit: the live tokens (exact) and the tokens before all edits (unerased)."""
    exact, unerased = state.live_tokens, state.transcript.original
    done = 0

    def advance(tokens: int, _: int) -> None:
        if progress is not None:
            progress(done + tokens, len(exact) + len(unerased))

    first = state.backbone.prefill(exact, advance)
    done = len(exact)
    return References(first, state.backbone.prefill(unerased, advance))


def audit(
    state: SessionState,
    probes: Sequence[Probe] | None,
    secrets: Sequence[str] | None,
    references: References,
    answer_tokens: int = ANSWER_TOKENS,
) -> Audit:
    """Measure fidelity and leaks of the edits so far; see `Session.audit`.

    Args:
        probes: None: built from the last erased text and the text around it.
        secrets: None: numbers and names that only the erased text contains.
    """
    transcript, tokenizer = state.transcript, state.backbone.tokenizer
    if probes is None:
        last = state.receipts[-1]
        if not last.spans:
            raise InputError("nothing was erased to build default probes from: give probes")
        body = bisect_left(transcript.offsets, transcript.body_start, key=lambda offset: offset[0])
        before = transcript.live_text(min(body, last.spans[0][0]), last.spans[0][0])
        after = transcript.live_text(last.spans[-1][1], len(transcript.tokens))
        probes = default_probes(before, " ".join(last.text), after)
    prepared = [
        PreparedProbe(
            probe,
            question_tokens(state, probe.question, probe.answer_prefix).tokens,
            None
            if probe.answer is None
            else tokenize(tokenizer, chat.answer_text(probe.answer, probe.answer_prefix), follows=True).tokens,
        )
        for probe in probes
    ]
    if secrets is None:
        text = transcript.live_text(0, len(transcript.tokens))
        erased = [part for receipt in state.receipts for part in receipt.text]
        secrets = [secret for part in erased for secret in default_secrets(part, text)]
    gap = _position_gap(state, references)
    return measure.audit(state.backbone, references, state.cache, prepared, secrets, gap, answer_tokens=answer_tokens)


def _position_gap(state: SessionState, references: References) -> EditableCache | None:
    """Prefill the live tokens at their positions in the cache; None if these have no position gap."""
    cache = state.cache
    kept = torch.nonzero(cache.slot_to_token != NO_TOKEN)[:, 0]
    positions = cache.positions[kept]
    if bool((positions == torch.arange(len(kept))).all()):
        return None
    tokens = [state.transcript.tokens[token] for token in cache.slot_to_token[kept].tolist()]

    def prefill() -> EditableCache:
        filled = state.backbone.new_cache(len(tokens))
        with filled.appending(positions):
            state.backbone.forward(tokens, filled, positions)
        with filled.edit():
            filled.set_next_position(cache.next_position)
        return filled

    return references.remember(("position gap", cache.next_position, tuple(positions.tolist())), prefill)
