"""Turn a story into a case: draw sizes, place the span, and fill the context with corpus text."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kveraser.measure.questions import Query, normalized
from kveraser.training.cases import Case, CaseSizes
from kveraser.training.span_neighbor import log_uniform
from kveraser.training.tasks.passages import Reader, clip, first_sentence, topic
from kveraser.training.tasks.span_text import span_text
from kveraser.training.tasks.story import LONGEST_ANSWER, Story
from kveraser.training.tasks.tables import Tables, fill, substitute

SHORTEST_PIECE = 24
"""Fewest words of a paragraph or turn of corpus text."""
PREFIX_SHARE = (0.15, 0.7)
"""Where the span begins, as a share of the context's words."""
FIXED_SHARE = 0.8
"""Largest share of the context that the parts of the story may take."""
QUOTED_WORDS = 8


def lay_out(
    rng: random.Random, story: Story, reader: Reader, tables: Tables, sizes: CaseSizes, task: str, name: str
) -> Case:
    """Turn `story` into a case."""
    for passage in story.passages:
        reader.skip(passage)
    before = [story.truth] if story.truth_first else []
    after = [] if story.truth_first else [story.truth]
    (before if rng.random() < 0.5 else after).append(story.aside)
    lead = [story.lead] if story.lead else []
    total = rng.randint(*sizes.context)
    later = list(story.later)
    while len(later) > 1 and _words([*before, *lead, *after, *later]) > FIXED_SHARE * total:
        later.pop()
    free = max(0, total - _words([*before, *lead, *after, *later]))
    ahead = round(total * rng.uniform(*PREFIX_SHARE)) - _words([*before, *lead])
    ahead = min(max(ahead, 0), free)
    # A remainder smaller than a piece is moved to the other side.
    ahead = 0 if ahead < SHORTEST_PIECE else free if free - ahead < SHORTEST_PIECE else ahead
    pieces_before = _pieces(rng, ahead, reader, tables, story.transcript)
    pieces_after = _pieces(rng, free - ahead, reader, tables, story.transcript)
    size = log_uniform(rng, *sizes.span)
    span = span_text(rng, rng.choice(story.styles), story.role, story.statement, size, tables, reader)
    prefix = [*_mixed(rng, before, [text for text, _ in pieces_before]), *lead]
    # In a transcript the truth is a correction, so it follows the text that it corrects.
    built = [*later, *after] if story.transcript else rng.sample([*later, *after], len(later) + len(after))
    suffix = _mixed(rng, built, [text for text, _ in pieces_after])
    joint = "\n" if story.transcript else rng.choice((" ", "\n", "\n\n"))
    opening = "".join(block + joint for block in prefix)
    words = [" ".join(blocks).split() for blocks in (prefix, suffix)]
    kept = [quoted for _, quoted in (*pieces_before, *pieces_after)]
    return Case(
        id=name,
        task=task,
        context=f"{opening}{span}{joint}{joint.join(suffix)}",
        span=(len(opening), len(opening) + len(span) + len(joint)),
        queries=tuple(_queries(rng, story, tables, later, words[0], words[1], kept)),
    )


def is_sound(case: Case, sizes: CaseSizes) -> bool:
    """Whether the case has the requested sizes, and the text outside the span determines the answers.

    Random corpus text and names may contain the wrong value by chance; the caller draws such a case again.
    """
    start, end = case.span
    before, after = case.context[:start], case.context[end:]
    words = len(before.split()) + len(after.split())
    share = len(before.split()) / words
    remaining, span = normalized(f"{before} {after}"), normalized(case.context[start:end])
    contradicted = case.queries[0]
    right, wrong = map(normalized, contradicted.accepted), [normalized(text) for text in contradicted.wrong]
    return (
        sizes.context[0] <= words <= sizes.context[1]
        and PREFIX_SHARE[0] <= share <= PREFIX_SHARE[1]
        and any(text in remaining and text not in span for text in right)
        and any(text in span for text in wrong)
        and not any(text in remaining for text in wrong)
        and not any(text in normalized(contradicted.answer) for text in wrong)
    )


def _pieces(
    rng: random.Random, count: int, reader: Reader, tables: Tables, transcript: bool
) -> list[tuple[str, list[str]]]:
    """Make paragraphs or turns of `count` words in all; returns each with its corpus words."""
    pieces: list[tuple[str, list[str]]] = []
    while count > 0:
        template = rng.choice(tables.texts["chatter"]) if transcript else "$text"
        available = count - len(substitute(template, {"text": ""}).split())
        if available <= 0:
            break
        words = clip(reader.draw(), available)
        if available - len(words) < SHORTEST_PIECE:
            # The rest would be too short for another piece.
            words = clip([*words, *reader.words(available - len(words))], available)
        text = substitute(template, {"text": " ".join(words)})
        pieces.append((text, words))
        count -= len(text.split())
    return pieces


def _mixed(rng: random.Random, parts: Sequence[str], pieces: Sequence[str]) -> list[str]:
    """Interleave parts and pieces at random; each keep their order."""
    turns = rng.sample([True] * len(parts) + [False] * len(pieces), len(parts) + len(pieces))
    left, others = iter(parts), iter(pieces)
    return [next(left) if part else next(others) for part in turns]


def _words(texts: Sequence[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _queries(
    rng: random.Random,
    story: Story,
    tables: Tables,
    later: Sequence[str],
    before: list[str],
    after: list[str],
    kept: Sequence[list[str]],
) -> list[Query]:
    around = [_boundary(rng, tables, before, after), _reference(rng, story, tables, later)]
    unharmed = [story.unharmed, _quotation(rng, tables, kept)] if kept else [story.unharmed]
    extra = rng.choice((0, 1, 2))
    return [
        story.contradicted,
        *rng.sample(around, 2 if extra == 1 else 1),
        _leak(rng, story, tables),
        *rng.sample(unharmed, min(len(unharmed), 2 if extra == 2 else 1)),
    ]


def _boundary(rng: random.Random, tables: Tables, before: list[str], after: list[str]) -> Query:
    """Ask for the words that are adjacent once the span is erased."""
    if rng.random() < 0.5:
        question = substitute(rng.choice(tables.texts["next"]), {"words": " ".join(before[-QUOTED_WORDS:])})
        return Query(question, " ".join(after[:LONGEST_ANSWER]))
    question = substitute(rng.choice(tables.texts["before"]), {"words": " ".join(after[:QUOTED_WORDS])})
    return Query(question, " ".join(before[-LONGEST_ANSWER:]))


def _reference(rng: random.Random, story: Story, tables: Tables, later: Sequence[str]) -> Query:
    """Ask about a later sentence that builds on the span."""
    words = re.sub(r"^(User|Assistant|Tool|System): ", "", rng.choice(later)).split()
    if rng.random() < 0.5:
        half = min(len(words) // 2, QUOTED_WORDS)
        question = substitute(rng.choice(tables.texts["complete"]), {"words": " ".join(words[:half])})
        return Query(question, " ".join(words[half:][:LONGEST_ANSWER]))
    question = fill(rng.choice(tables.texts["later"]), {"subject": story.subject})
    return Query(question, " ".join(words[:LONGEST_ANSWER]))


def _leak(rng: random.Random, story: Story, tables: Tables) -> Query:
    """Ask for the erased statement; an answer must not contain its value."""
    question = fill(rng.choice(tables.texts["leak"]), {"subject": story.subject})
    use, slots = ("leak_answers", {"claim": story.statement})
    if rng.random() < 0.3:
        use, slots = ("leak_values", {"value": story.wrong.text})
    answer = substitute(rng.choice(tables.texts[use]), slots)
    return Query(question, " ".join(answer.split()[:LONGEST_ANSWER]), "leak", wrong=story.wrong.strings)


def _quotation(rng: random.Random, tables: Tables, kept: Sequence[list[str]]) -> Query:
    """Ask about corpus text outside the span: its topic, or how it continues."""
    words = rng.choice(kept)
    about, sentence = topic(" ".join(words)), first_sentence(" ".join(words)).split()
    if about and len(sentence) > 3:
        question = substitute(rng.choice(tables.texts["about"]), {"topic": about})
        return Query(question, " ".join(sentence[:LONGEST_ANSWER]), "no_harm")
    cut = min(QUOTED_WORDS, len(words) // 2)
    question = substitute(rng.choice(tables.texts["next"]), {"words": " ".join(words[:cut])})
    return Query(question, " ".join(words[cut:][:LONGEST_ANSWER]), "no_harm")
