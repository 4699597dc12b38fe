"""Real facts: a passage states a fact, and a retrieved document states the value of another passage instead."""

from __future__ import annotations

import random

from kveraser.errors import InputError
from kveraser.measure.questions import Query
from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.story import Story, aside_of, later_texts
from kveraser.training.tasks.tables import Cast, Tables, Value, fill, initials, substitute


def facts(rng: random.Random, tables: Tables, passages: Passages) -> Story:
    """Make a story whose span is a retrieved page with a swapped value; the passage with the fact is in the context.

    Raises:
        InputError: no relation has facts with two different values.
    """
    found = passages.facts
    if not found:
        raise InputError(
            "the corpus has no two passages with facts of one kind (born, died, birthplace, director, writer, source, "
            "place): give encyclopedia text, or leave the task `facts` out"
        )
    # Square-root weights raise rare relations without repeating their few facts too often.
    relation = rng.choices(list(found), [len(facts) ** 0.5 for facts in found.values()])[0]
    fact = rng.choice(found[relation])
    other = rng.choice([other for other in found[relation] if other.value != fact.value] or found[relation])
    right, wrong = _value(relation, fact.value), _value(relation, other.value)
    phrases, name = tables.facts, {"name": fact.name}
    texts = later_texts(rng, phrases.refer, [*phrases.derive[relation], *phrases.derive_more])
    aside, unharmed = aside_of(rng, tables, Cast(rng, tables), "")
    return Story(
        subject=substitute(phrases.subjects[relation], name),
        statement=fill(rng.choice(phrases.bad[relation]), {**name, **wrong.slots}),
        styles=("page",),
        truth=fact.text,
        truth_first=rng.random() < 0.5,
        later=tuple(fill(text, {**name, **wrong.slots}) for text in texts),
        contradicted=Query(
            fill(rng.choice(phrases.questions[relation]), name),
            fill(phrases.answers[relation], {**name, **right.slots}),
            accepted=right.strings,
            wrong=wrong.strings,
        ),
        wrong=wrong,
        aside=aside,
        unharmed=unharmed,
        passages=(fact.passage,),
    )


def _value(relation: str, text: str) -> Value:
    if relation in ("born", "died"):
        return Value(text, (text,), {"value": text, "hint": text.split()[-1]})
    if relation in ("birthplace", "place"):
        return Value(text, (text.split(",")[0],), {"value": text, "hint": text[0]})
    return Value(text, (text, text.split()[-1]), {"value": text, "hint": initials(text)})
