"""Generated conversations whose messages lean on a span: what they hold, and how they are ranked."""

from __future__ import annotations

import pytest

from evaluation.influence import InfluenceRow, conversation, run
from kveraser.session.session import Session
from tests.tiny import tiny_backbone


@pytest.mark.parametrize("seed", range(20))
def test_one_exchange_is_about_the_span(seed: int) -> None:
    made = conversation(seed)
    texts = [message["content"] for message in made.messages]
    assert made == conversation(seed) and made != conversation(seed + 1)
    assert texts[0].count(made.span) == 1 and len(texts) == 8
    question, answer = sorted(made.leaning)
    assert answer == question + 1 and made.messages[question]["role"] == "user"
    # The question names what the span is about, and no other message after the first does.
    names = {word for word in made.span.rstrip(".").split() if word[0].isupper() or word.isdigit()}
    others = " ".join(text for place, text in enumerate(texts[1:], 1) if place not in made.leaning)
    assert any(word in texts[question] + texts[answer] and word not in others for word in names)


def test_messages_are_ranked_by_the_influence_of_the_span() -> None:
    backbone = tiny_backbone()
    result = run(backbone, 3, 5, lambda step: None)
    assert result["command"].endswith("--cases 3 --seed 5") and len(result["rows"]) == 3
    for seed, fields in enumerate(result["rows"], 5):
        row, made = InfluenceRow(**fields), conversation(seed)
        found = {
            one.message: one.kl for one in Session(backbone, messages=list(made.messages)).influence(made.span).messages
        }
        assert sorted(row.ranked) == list(range(1, 8)) and list(row.kl) == sorted(row.kl, reverse=True)
        assert list(row.kl) == pytest.approx([found[message] for message in row.ranked], abs=1e-6)
        assert row.first == (set(row.ranked[:2]) == made.leaning)
    assert result["first"] == sum(row["first"] for row in result["rows"]) / 3
