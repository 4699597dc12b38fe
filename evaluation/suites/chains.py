"""Chains of references: later sentences take a value over from the span, from one to four steps on.

One context holds a chain of every number of hops, so cases of one cell have different contexts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.text import Filler, Woven, load_words, room_for_text, token_count
from kveraser.measure.case import BenchCase, Cell, LeftOut
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters
from kveraser.training.tasks.tables import Cast, Value, fill, load_tables, substitute

HOPS = {f"hops_{count}": count for count in (1, 2, 3, 4)}
LEAST_FILLER = 0.05
"""Share of a context's own text that belongs to no chain, at least."""
TRIES = 20
"""Draws until the chains fit into the length."""


@dataclass(frozen=True)
class Chain:
    """A value that is stated rightly and wrongly, and the names that take it over one after the other.

    Attributes:
        right, bad: the two statements about the first name.
        links: each says that a name has the value of the one before it, never the value itself.
        echo: a sentence that follows from the wrong statement and spells its value out; in every other context.
        query: about the last name.
    """

    right: str
    bad: str
    links: tuple[str, ...]
    echo: str
    query: Query
    true: Value
    wrong: Value


def make(settings: SuiteSettings) -> Made:
    """The cases of every length and number of hops."""
    cases: list[BenchCase] = []
    left_out: list[LeftOut] = []
    for length in settings.lengths:
        cells = {task: Cell("chains", task, length=length) for task in settings.tasks}
        made = [_context(settings, length, index) for index in range(settings.cases)]
        fitting = [one for one in made if one is not None]
        if len(fitting) < len(made):
            reason = f"a chain of every number of hops takes more than {length} tokens"
            left_out += [LeftOut(cell, reason) for cell in cells.values()]
            continue
        for index, (chains, woven) in enumerate(fitting):
            cases += [
                BenchCase(
                    id=f"chains/{task}/{length}/{index}",
                    cell=cell,
                    context=woven.text,
                    erase=(Characters(*woven.ranges[HOPS[task] - 1]),),
                    queries=(chains[HOPS[task] - 1].query,),
                )
                for task, cell in cells.items()
            ]
    return Made(tuple(cases), tuple(left_out))


def _context(settings: SuiteSettings, length: int, index: int) -> tuple[list[Chain], Woven] | None:
    """The chains by their hops, and the text with the ranges of their spans. None: no draw fits into it."""
    styles, room = load_words("chains")["styles"], room_for_text(settings.tokenizer, length)
    style, echoed = styles[index % len(styles)], index // len(styles) % 2 == 0
    for attempt in range(TRIES):
        rng = random.Random(f"{settings.seed}/chains/{length}/{index}/{attempt}")
        chains = _chains(rng, style)
        told = [f"{style['break']}{sentence}" for sentence in _told(rng, chains, style, echoed)]
        taken = token_count(settings.tokenizer, "".join(told))
        if taken > (1 - LEAST_FILLER) * room:
            continue
        pieces = _filler(rng, settings, style, chains, room - taken)
        return chains, _joined(rng, told, pieces, [f"{style['break']}{chain.bad}" for chain in chains])
    return None


def _chains(rng: random.Random, style: dict[str, Any]) -> list[Chain]:
    cast = Cast(rng, load_tables("heldout"))
    names = iter(rng.sample(load_words("chains")["names"][style["names"]], sum(HOPS.values()) + len(HOPS)))
    numbers = iter(rng.sample(range(31, 98), 2 * len(HOPS)))

    def value() -> Value:
        if style["kind"] != "number":
            return cast.value(style["kind"])
        number = str(next(numbers))
        return Value(number, (number,), {"value": number})

    # What begins a line of settings has no capital.
    spelled = substitute if style["ordered"] else fill
    chains = []
    for hops in HOPS.values():
        members, true, wrong = [next(names) for _ in range(hops + 1)], value(), value()
        first, last = {"name": members[0]}, {"name": members[-1]}
        right, bad = (rng.choice(style["root"]) for _ in range(2))
        chains.append(
            Chain(
                right=spelled(right, first | true.slots),
                bad=spelled(bad, first | wrong.slots),
                links=tuple(
                    spelled(rng.choice(style["link"]), {"name": name, "from": before})
                    for before, name in pairwise(members)
                ),
                echo=spelled(rng.choice(style["echo"]), first | wrong.slots),
                query=Query(
                    fill(rng.choice(style["question"]), last),
                    spelled(rng.choice(style["answer"]), last | true.slots),
                    accepted=true.strings,
                    wrong=wrong.strings,
                ),
                true=true,
                wrong=wrong,
            )
        )
    return chains


def _told(rng: random.Random, chains: Sequence[Chain], style: dict[str, Any], echoed: bool) -> list[str]:
    """The sentences of all chains, mixed, each chain's in their order: nothing is taken over before it is stated."""
    told = []
    for chain in chains:
        built = [*chain.links]
        if echoed:
            built.insert(rng.randint(0, len(built)), chain.echo)
        # Where a later line overrides an earlier one, the right value comes first: without the span it holds.
        after = not style["ordered"] and rng.random() < 0.5
        if after:
            built.insert(rng.randint(0, len(built)), chain.right)
        told.append([chain.bad, *built] if after else [chain.right, chain.bad, *built])
    turns = [place for place, sentences in enumerate(told) for _ in sentences]
    rest = [iter(sentences) for sentences in told]
    return [next(rest[place]) for place in rng.sample(turns, len(turns))]


def _filler(
    rng: random.Random, settings: SuiteSettings, style: dict[str, Any], chains: Sequence[Chain], tokens: int
) -> list[str]:
    if "filler" not in style:
        values = [text for chain in chains for value in (chain.true, chain.wrong) for text in value.strings]
        return Filler(rng, settings.passages, without=values).pieces(settings.tokenizer, tokens)
    pieces: list[str] = []
    while tokens > 0:
        for line in rng.sample(style["filler"], len(style["filler"])):
            piece = f"{style['break']}{line}"
            count = token_count(settings.tokenizer, piece)
            if tokens < count / 2:
                return pieces
            pieces.append(piece)
            tokens -= count
    return pieces


def _joined(rng: random.Random, chained: Sequence[str], pieces: Sequence[str], spans: Sequence[str]) -> Woven:
    """Sentences of the chains among the filler, both in their order; a piece of filler is first."""
    turns = rng.sample([True] * len(chained) + [False] * (len(pieces) - 1), len(chained) + len(pieces) - 1)
    text, told, others = pieces[0].lstrip(), iter(chained), iter(pieces[1:])
    found: dict[str, tuple[int, int]] = {}
    for turn in turns:
        piece = next(told) if turn else next(others)
        if piece in spans:
            found[piece] = (len(text), len(text) + len(piece))
        text += piece
    return Woven(text, tuple(found[span] for span in spans))


CHAINS = Suite(
    name="chains",
    summary="later sentences that take the span's value over, by how many steps on they are",
    tasks=tuple(HOPS),
    lengths=(448,),
    spans=(),
    make=make,
)
