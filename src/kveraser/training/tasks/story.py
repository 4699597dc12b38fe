"""What a task wants to happen in a case, before it is laid out in a context."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kveraser.measure.questions import Query
from kveraser.training.tasks.tables import Cast, Scene, Tables, Value, fill, substitute

Style = Literal["page", "records", "json", "message"]
"""What the span looks like when it is longer than its statement; see `span_text`."""

LONGEST_ANSWER = 24
"""Words."""


@dataclass(frozen=True)
class Story:
    """The parts of a case.

    Attributes:
        subject: what the statements are about, as questions name it.
        statement: the wrong one, for the span.
        styles, role: how the span may look, and who says it; no role outside transcripts.
        truth: block of text with the right statement.
        truth_first: whether it stands before the span.
        lead: block directly before the span; empty for none.
        later: sentences that build on the wrong statement, in order.
        contradicted: the question whose answer the span contradicts.
        wrong: the wrong value.
        aside, unharmed: a fact that the span never touches, and the question about it.
        passages: corpus passages in the parts, which the rest of the context leaves out.
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
        """Whether the case is a transcript with roles rather than documents."""
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
    """A story of a scene; `recheck` has somebody ask again before the truth comes."""
    cast = Cast(rng, tables)
    slots = cast.slots()
    true, wrong = cast.value(scene.kind), cast.value(scene.kind)
    # Costs that come on top are the same whichever value is right.
    right, bad = {**wrong.slots, **true.slots, **slots}, {**true.slots, **wrong.slots, **slots}
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
    """One to four templates: in half of the cases all only refer to the wrong value, else some say what follows."""
    count = rng.randint(1, 4)
    if rng.random() < 0.5:
        return rng.sample(refer, min(count, len(refer)))
    derived = rng.sample(derive, min(len(derive), rng.randint(1, count)))
    chosen = [*derived, *rng.sample(refer, count - len(derived))]
    return rng.sample(chosen, len(chosen))


def aside_of(rng: random.Random, tables: Tables, cast: Cast, role: str) -> tuple[str, Query]:
    """A small fact of its own, and the question about it."""
    aside, slots = rng.choice(tables.asides), cast.slots()
    text = fill(aside["text"], slots)
    query = Query(
        fill(aside["question"], slots),
        fill(aside["answer"], slots),
        kind="no_harm",
        accepted=(substitute(aside["accepted"], slots),),
    )
    return f"User: {text}" if role else text, query
