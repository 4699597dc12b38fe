"""Whether `Session.influence` finds the messages that lean on a span, on generated conversations.

The first message states three facts of different kinds. Three exchanges follow: in each the user says that another
name shares one of the facts and asks for it, and the assistant answers. The span is one of the three statements: the
exchange about it leans on the span, and the span should have the greatest influence on its two messages.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.suites.text import load_words
from kveraser.measure.environment import environment
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Text
from kveraser.training.tasks.tables import Cast, fill, load_tables

FACTS = 3


@dataclass(frozen=True)
class Conversation:
    """A generated conversation.

    Attributes:
        span: the statement in the first message.
        leaning: indices of the two messages about it.
    """

    messages: tuple[dict[str, Any], ...]
    span: str
    leaning: frozenset[int]


@dataclass(frozen=True)
class InfluenceRow:
    """A conversation as it was measured.

    Attributes:
        leaning: the messages about the span.
        ranked: all later messages, the most influenced first.
        kl: of these, nats per token.
        first: whether the leaning ones are above all others.
    """

    leaning: tuple[int, ...]
    ranked: tuple[int, ...]
    kl: tuple[float, ...]
    first: bool


def conversation(seed: int) -> Conversation:
    """The conversation of a seed."""
    rng, words = random.Random(seed), load_words("chains")
    cast, numbers = Cast(rng, load_tables("heldout")), iter(rng.sample(range(31, 98), FACTS))
    facts = []
    for style in rng.sample([style for style in words["styles"] if not style["ordered"]], FACTS):
        value = {"value": str(next(numbers))} if style["kind"] == "number" else cast.value(style["kind"]).slots
        facts.append((style, rng.sample(words["names"][style["names"]], 2), value))
    told = [fill(rng.choice(style["root"]), {"name": names[0], **value}) for style, names, value in facts]
    messages = [
        {"role": "user", "content": " ".join(rng.sample(told, FACTS)) + " Remember that."},
        {"role": "assistant", "content": "I will remember that."},
    ]
    leaning = frozenset[int]()
    for fact in rng.sample(range(FACTS), FACTS):
        style, (first, second), value = facts[fact]
        if fact == 0:
            leaning = frozenset({len(messages), len(messages) + 1})
        shared = fill(rng.choice(style["link"]), {"name": second, "from": first})
        asked = fill(rng.choice(style["question"]), {"name": second})
        answer = fill(rng.choice(style["answer"]), {"name": second, **value})
        messages += [{"role": "user", "content": f"{shared} {asked}"}, {"role": "assistant", "content": answer}]
    return Conversation(tuple(messages), told[0], leaning)


def measure(backbone: Backbone, made: Conversation) -> InfluenceRow:
    """Rank the messages of a conversation by their influence."""
    session = Session(backbone, messages=list(made.messages))
    # The first message holds the span.
    found = [one for one in session.influence(Text(made.span, 1)).messages if one.message > 0]
    found.sort(key=lambda one: -one.kl)
    ranked = tuple(one.message for one in found)
    first = set(ranked[: len(made.leaning)]) == made.leaning
    return InfluenceRow(tuple(sorted(made.leaning)), ranked, tuple(one.kl for one in found), first)


def run(backbone: Backbone, cases: int, seed: int, advance: Callable[[str], None]) -> dict[str, Any]:
    """Measure generated conversations; returns the result with all that is needed to read it."""
    rows = []
    for number in range(cases):
        advance(f"conversation {number + 1} of {cases}")
        rows.append(measure(backbone, conversation(seed + number)))
    return {
        "command": f"python -m evaluation influence --cases {cases} --seed {seed}",
        **environment(backbone),
        "first": sum(row.first for row in rows) / cases,
        "rows": [asdict(row) for row in rows],
    }
