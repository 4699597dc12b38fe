"""What a span changed in later text, against a direct computation, and erasing what depends on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.errors import InputError, SpanError
from kveraser.measure import influence as module
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Message, ToolCall
from tests.sessions import EXACT, MESSAGES, TEXT, far, same, state

SPAN = "The captain is Ada."


def log_probabilities(backbone: Backbone, tokens: list[int]) -> torch.Tensor:
    """At every place but the first, the model's prediction; float32 `[tokens - 1, vocabulary]`, without a cache."""
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([tokens], device=backbone.device)).logits[0, :-1]
    return logits.float().log_softmax(dim=-1).cpu()


@pytest.mark.parametrize("what", [SPAN, [SPAN, "The crew of 12 trusts her."]], ids=["one span", "two spans"])
@pytest.mark.parametrize("scored", [5, 256])
def test_it_equals_a_direct_computation(
    backbone: Backbone, what: Any, scored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORED_TOKENS", scored)
    session = Session(backbone, text=TEXT)
    session.erase("and the ship is old", "recompute")
    before = state(session)
    steps: list[tuple[int, int]] = []
    measured = session.influence(what, lambda done, total: steps.append((done, total)))
    assert same(before, state(session)) and steps[-1][0] == steps[-1][1]
    erased = {token for span, _ in session.find(what) for token in range(span.start, span.end)}
    live = [index for index, alive in enumerate(session.transcript.live) if alive]
    kept = [index for index in live if index not in erased]
    tokens = session.transcript.tokens
    with_span, without = (log_probabilities(backbone, [tokens[index] for index in run]) for run in (live, kept))
    later = [index for index in kept if index > min(erased)]
    assert [one.token for one in measured.tokens] == later and len(later) > 50
    for one in measured.tokens:
        there, here = with_span[live.index(one.token) - 1].double(), without[kept.index(one.token) - 1].double()
        kl = float((here.exp() * (here - there)).sum())
        assert one.kl == pytest.approx(kl, rel=5e-6, abs=1e-6)
        assert one.change == pytest.approx(float(there[tokens[one.token]] - here[tokens[one.token]]), abs=1e-5)
    assert measured.kl == pytest.approx(sum(one.kl for one in measured.tokens) / len(later)) and measured.kl > 1e-3
    assert measured.messages == ()


def test_messages_are_means_of_their_tokens_in_order_of_influence(backbone: Backbone) -> None:
    session = Session(backbone, messages=MESSAGES)
    measured = session.influence(ToolCall("call_1"))
    assert [(one.message, one.role) for one in measured.messages] == [(4, "assistant")]
    transcript = session.transcript
    (message,) = measured.messages
    inside = [
        one for one in measured.tokens
        if transcript.text[slice(*transcript.offsets[one.token])] and
        transcript.messages[4].content_start <= transcript.offsets[one.token][0] < transcript.messages[4].content_end
    ]  # fmt: skip
    assert message.tokens == len(inside) > 10
    assert message.kl == pytest.approx(sum(one.kl for one in inside) / len(inside)) and message.kl > 1e-4
    first = session.influence(Message(1))
    assert {one.message for one in first.messages} == {3, 4} or {one.message for one in first.messages} == {2, 3, 4}
    ranked = first.above(0.0)
    assert [one.kl for one in ranked] == sorted((one.kl for one in first.messages), reverse=True)
    assert first.above(max(one.kl for one in first.messages)) == ()
    assert first.to_json()["messages"][0]["kl"] == first.messages[0].kl


def test_a_span_at_the_very_beginning_and_at_the_very_end(plain_backbone: Backbone) -> None:
    session = Session(plain_backbone, text=TEXT)
    first = session.influence("The ship left at noon.")
    assert first.kl > 0 and first.tokens[0].token > 0
    last = session.influence("the ship is old.")
    assert last.tokens == () and last.kl == 0.0 and last.messages == ()


def test_dependents_are_erased_along(backbone: Backbone) -> None:
    session = Session(backbone, messages=MESSAGES)
    receipt = session.erase(ToolCall("call_1"), "recompute", dependents=0.0)
    assert any("It waits in that city." in text for text in receipt.text) and far(session) < EXACT
    session.undo()
    receipt = session.erase(ToolCall("call_1"), "recompute", dependents=1e6)
    assert not any("It waits" in text for text in receipt.text)


def test_dependents_of_dependents_are_erased_along(backbone: Backbone) -> None:
    words = [
        "The gate is red.",
        "It is red.",
        "Both are red.",
        "All of it is red.",
        "Nothing is blue.",
        "It stays red.",
    ]
    messages = [{"role": ["user", "assistant"][place % 2], "content": word} for place, word in enumerate(words)]
    session = Session(backbone, messages=messages)
    direct = session.influence(Message(1)).messages
    # A threshold that one message is above; without that message, others are.
    threshold = sorted(message.kl for message in direct)[-2]
    (first,) = (message.message for message in direct if message.kl > threshold)
    further = session.influence([Message(1), Message(first)]).above(threshold)
    assert further
    receipt = session.erase(Message(1), "recompute", dependents=threshold)
    erased = " ".join(receipt.text)
    assert all(words[message] in erased for message in (1, first, *(one.message for one in further)))
    assert words[0] not in erased


@pytest.mark.parametrize("dependents", [-0.1, float("nan")])
def test_a_bad_threshold_or_span_is_refused(backbone: Backbone, dependents: float) -> None:
    session = Session(backbone, messages=MESSAGES)
    before = state(session)
    with pytest.raises(InputError, match="give a KL of at least 0"):
        session.erase(ToolCall("call_1"), dependents=dependents)
    with pytest.raises(SpanError):
        session.influence("nowhere")
    assert same(before, state(session))
