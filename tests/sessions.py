"""What the tests of sessions share: a document, a conversation, and how to compare whole sessions."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.model.backbone import Backbone
from kveraser.model.decode import score
from kveraser.session.session import Session
from tests.tiny import distance, same_bits, snapshot

TEXT = (
    "The ship left at noon. The captain is Ada. She keeps the log 🙂 in the cabin. "
    "The crew of 12 trusts her. The harbour is in Lisbon, and the ship is old."
)
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is my parcel?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "function": {"name": "find", "arguments": '{"what": "parcel"}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "It is in Rome, shelf 44."},
    {"role": "assistant", "content": "It waits in that city."},
]
QUESTION = [70, 80, 90, 100]


def endless(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor: the model never ends by itself."""
    return scores.index_fill(1, torch.tensor([2]), -torch.inf)


def state(session: Session) -> dict[str, Any]:
    """All that a session is, copied."""
    return {
        "cache": snapshot(session.cache),
        "transcript": deepcopy(session.transcript),
        "slots": session.cache.slot_to_token.tolist(),
        "receipts": list(session.receipts),
        "turn_open": session.turn_open,
        "history": len(session.state.history),
    }


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two states agree, the cache in every bit."""
    return same_bits(first["cache"], second["cache"]) and all(
        first[name] == second[name] for name in first if name != "cache"
    )


def logits_after(backbone: Backbone, cache: EditableCache) -> torch.Tensor:
    """Log-probabilities after a fixed question, `[3, vocabulary]`."""
    return score(backbone, cache, QUESTION, [60, 61, 62])


def far(session: Session) -> float:
    """How far the session's cache is from a fresh prefill of its live tokens: states and answers; infinite where the
    bookkeeping differs."""
    fresh = session.backbone.prefill(session.live_tokens)
    cache = session.cache
    if cache.length != fresh.length or cache.next_position != fresh.next_position:
        return float("inf")
    held, expected = cache.read(0, cache.length), fresh.read(0, fresh.length)
    return max(
        distance([keys for keys, _ in held], [keys for keys, _ in expected]),
        distance([values for _, values in held], [values for _, values in expected]),
        distance([logits_after(session.backbone, cache)], [logits_after(session.backbone, fresh)]),
    )


EXACT = 1e-3
"""States of the tiny models are of size 1 to 10, and batched differently they agree to some 1e-5."""


def consistent(session: Session) -> bool:
    """Whether cache, slots and transcript belong together."""
    transcript, cache = session.transcript, session.cache
    slots = cache.slot_to_token.tolist()
    held = [source for source in slots if source >= 0]
    return (
        len(slots) == cache.length == cache.positions.numel()
        and len(transcript.tokens) == len(transcript.offsets) == len(transcript.live)
        and held == sorted(held)
        and [transcript.tokens[source] for source in held] == session.live_tokens
        and all(transcript.live[source] for source in held)
        and all(low <= high for low, high in transcript.offsets)
        and all(place.end <= len(transcript.text) for place in transcript.messages)
    )
