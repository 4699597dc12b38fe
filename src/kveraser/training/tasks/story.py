"""The content of a task's case, before it is laid out in a context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kveraser.measure.questions import Query
from kveraser.training.tasks.tables import Cast, Scene, Tables, Value, fill, substitute

Style = Literal["page", "records", "json", "message"]
"""Form of a span that is longer than its statement; see `span_text`."""

LONGEST_ANSWER = 24
"""Words."""


@dataclass(frozen=True)
class Story:
    """The parts of a case.

    Attributes:
        subject: topic of the statements, as questions name it.
        statement: the wrong statement, placed in the span.
        styles, role: possible forms of the span, and its speaker; the role is empty outside transcripts.
        truth: text with the correct statement.
        truth_first: whether the truth precedes the span.
        lead: text directly before the span; may be empty.
        later: sentences that build on the wrong statement, in order.
        contradicted: the question whose answer the span contradicts.
        wrong: the wrong value.
        aside, unharmed: a fact that does not depend on the span, and a question about it.
        passages: corpus passages used in the parts; the rest of the context excludes them.
    """

    subject: str
    statement: str
    styles: tuple[Style, ...]
    truth: str
    truth_first: bool
    later: tuple[str, ...]
    contradicted: Query
    wrong: Value
    aside: str
    unharmed: Query
    role: str = ""
    lead: str = ""
    passages: tuple[str, ...] = ()

    @property
    def transcript(self) -> bool:
        """Whether the case is a transcript with roles, not documents."""
        return bool(self.role)


def scene_story(
    rng: random.Random,
    tables: Tables,
    scene: Scene,
    styles: tuple[Style, ...],
    role: str = "",
    truth_first: bool = False,
    recheck: bool = False,
) -> Story:
    """Make the story of a scene; with `recheck`, a speaker asks again before the truth."""
    cast = Cast(rng, tables)
    slots = cast.slots()
    true, wrong = cast.value(scene.kind), cast.value(scene.kind)
    right, bad = {**true.slots, **slots}, {**wrong.slots, **slots}
    leads = rng.sample(scene.lead, len(scene.lead))
    truth = fill(rng.choice(scene.true), right)
    if recheck:
        truth = f"{fill(leads[-1], slots) if truth_first else rng.choice(tables.texts['recheck'])}\n{truth}"
    aside, unharmed = aside_of(rng, tables, cast, role)
    return Story(
        subject=substitute(scene.subject, slots),
        statement=fill(rng.choice(scene.bad), bad),
        styles=styles,
        truth=truth,
        truth_first=truth_first,
        later=tuple(fill(text, bad) for text in later_texts(rng, scene.refer, scene.derive)),
        contradicted=Query(
            fill(rng.choice(scene.questions), slots),
            fill(rng.choice(scene.answers), right),
            accepted=true.strings,
            wrong=wrong.strings,
        ),
        wrong=wrong,
        aside=aside,
        unharmed=unharmed,
        role=role,
        lead=fill(leads[0], slots) if leads else "",
    )


def later_texts(rng: random.Random, refer: Sequence[str], derive: Sequence[str]) -> list[str]:
    """Draw one to four templates: references to the wrong value, in half of the cases also what follows from it."""
    count = rng.randint(1, 4)
    if rng.random() < 0.5:
        return rng.sample(refer, min(count, len(refer)))
    derived = rng.sample(derive, min(len(derive), rng.randint(1, count)))
    chosen = [*derived, *rng.sample(refer, count - len(derived))]
    return rng.sample(chosen, len(chosen))


def aside_of(rng: random.Random, tables: Tables, cast: Cast, role: str) -> tuple[str, Query]:
    """Make an unrelated fact and a question about it."""
    aside, slots = rng.choice(tables.asides), cast.slots()
    text = fill(aside["text"], slots)
    query = Query(
        fill(aside["question"], slots),
        fill(aside["answer"], slots),
        kind="no_harm",
        accepted=(substitute(aside["accepted"], slots),),
    )
    return f"User: {text}" if role else text, query
