"""A false answer to a question, from the dataset's own words: the sentence that states it, with another value in it."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluation.suites.questions import Passage, Question
from kveraser.measure.questions import contains
from kveraser.training.tasks.tables import MONTHS

SENTENCE_WORDS = 5, 80
"""A sentence with fewer words says too little alone; with more it is a list, or has lost its full stops."""
DRAWN_VALUES = 100
"""Values that one is chosen from."""

_ENDING = re.compile(r"(?:(?<=[\w%]{2})|(?<=[)\]\"'\u2019\u201d])|(?<=[)\]\"'] ))[.!?][\"')\]\u2019\u201d]*\s+")
_ABBREVIATION = re.compile(r"\b(?:dr|mr|mrs|ms|st|jr|sr|prof|gen|col|capt|lt|rev|vs|ca|no|vol|inc|ltd|approx)$", re.I)
_REFERRING = re.compile(r"(?:it|he|she|they|this|these|that|those|his|hers?|its|their|the (?:former|latter))\b", re.I)
_ARTICLE = re.compile(r"^(?:the|an?) ", re.I)
_MONTH = rf"(?:{'|'.join(MONTHS)})"
_DAY = rf"\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?"
_NUMBER = (
    r"zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|sixty|seventy"
    r"|eighty|ninety|hundreds?|thousands?|millions?"
)
_PLACE = (
    "city|country|county|state|town|township|village|district|province|region|place|location|continent|islands?"
    "|capital|nation|territory|territorial entity|municipality|borough|birthplace|river|lake|sea|ocean|mountains?"
)
_ORGANISATION = (
    "university|college|school|academy|institute|museum|party|records|entertainment|federation|association|union"
    "|league|corps|company|corporation|group|band|club|society|army|church|bank|press|network"
)
_BY_ANSWER = {
    "date": rf"(?:{_DAY}),? \d{{3,4}}",
    "day": _DAY,
    "month": rf"{_MONTH},? \d{{3,4}}|{_MONTH}",
    "year": r"1\d{3}|20\d{2}",
    "period": r"(?:\D* )?\d{3,4}s?(?: ?[-\u2013] ?| (?:to|and|until) (?:the )?)\d{2,4}s?(?: \D*)?|(?:the )?\d{3,4}s",
    "money": r"(?:US|A|C)?[$\u00a3\u20ac\u00a5].*\d.*|[\d.,]+ (?:\w+ )?(?:dollars|euros|pounds|yen)",
    "percent": r"[\d.,]+ ?(?:%|percent|per cent)",
    "number": rf"(?:about |over |around |nearly |more than )?(?:\d.*|(?:{_NUMBER})(?:[- ].*)?)",
    "organisation": rf".* (?:{_ORGANISATION})|(?:{_ORGANISATION}) of .*",
    "place": rf".* (?:{_PLACE})",
}
_BY_QUESTION = {
    "place": rf"where|(?:what|which)(?: \w+){{0,2}} (?:{_PLACE})\b|what (?:is|was) the (?:{_PLACE})\b",
    "organisation": rf"(?:what|which)(?: \w+)? (?:{_ORGANISATION})\b",
    "person": "who",
}
"""By the question's first question word and what follows it."""


@dataclass(frozen=True)
class FalseAnswer:
    """What a question is contradicted with.

    Attributes:
        passage: the passage of the question that states the answer.
        place: of the sentence that states it, in characters of the passage's text; the sentence before it belongs to it
            where it begins with a pronoun.
        gold: the accepted answer that stands there.
        value: the false one, of the same kind.
        sentence: the sentence with the false value.
    """

    question: Question
    passage: Passage
    place: tuple[int, int]
    gold: str
    value: str
    sentence: str


def false_answers(questions: Sequence[Question], seed: int) -> tuple[list[FalseAnswer], Counter[str]]:
    """A false answer to each question that has one, in order, and why the others have none, counted.

    Values are answers to other questions; the same seed gives the same ones, whatever is made of them.
    """
    values: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        for answer in question.answers[:1]:
            values[kind_of(question.text, answer)].append(answer)
    pools = {kind: list(dict.fromkeys(answers)) for kind, answers in values.items()}
    made, without = [], Counter[str]()
    for number, question in enumerate(questions):
        found = _statement(question)
        if not question.answers:
            without["have no answer that a text could state"] += 1
        elif found is None:
            without["have an answer that no sentence of their passages states"] += 1
        else:
            passage, place, gold = found
            pool = pools[kind_of(question.text, question.answers[0])]
            false = _swapped(random.Random(f"{seed}/{number}"), question, passage.text[slice(*place)], gold, pool)
            if false is None:
                without["have no other question with an answer of the same kind"] += 1
            else:
                made.append(FalseAnswer(question, passage, place, gold, *false))
    return made, without


def kind_of(question: str, answer: str) -> str:
    """The kind of an answer: of its own form (a date, a year, a number of miles, …), or as the question asks for it."""
    text = answer.strip()
    kind = next((kind for kind, pattern in _BY_ANSWER.items() if re.fullmatch(pattern, text, re.I)), None)
    if kind == "number":
        unit = text.lower().split()[-1]
        return kind if re.search(rf"\d|^(?:{_NUMBER})\b", unit) else f"{kind} of {unit}"
    asked = re.search(r"\b(?:who|whom|whose|where|what|which|when|how)\b.*", question, re.I | re.S)
    kind = kind or next((one for one, words in _BY_QUESTION.items() if asked and re.match(words, asked[0], re.I)), None)
    # A name's longer words have capitals; other words are a description.
    named = all(word[0].isupper() for word in re.findall(r"[^\W\d_]{4,}", text)) and text[:1].isupper()
    return kind or ("name" if named else "phrase")


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """Where the sentences of a text stand, in characters, without the spaces around them."""
    start = len(text) - len(text.lstrip())
    for ending in _ENDING.finditer(text):
        # In text that has capitals at all, a sentence begins with none of the small letters.
        continued = text[ending.end() : ending.end() + 1].islower() and text != text.lower()
        if continued or _ABBREVIATION.search(text[start : ending.start()]):
            continue
        yield start, ending.start() + len(ending.group().rstrip())
        start = ending.end()
    if text[start:].strip():
        yield start, start + len(text[start:].rstrip())


def overlap(question: str, text: str) -> int:
    """How many different longer words the question and the text share."""
    asked, said = (set(re.findall(r"\w{4,}", one.lower())) for one in (question, text))
    return len(asked & said)


def _statement(question: Question) -> tuple[Passage, tuple[int, int], str] | None:
    """The sentence that states the answer: where the dataset says, or else the one most about the question."""
    best: tuple[tuple[bool, bool, int], Passage, tuple[int, int], str] | None = None
    for number, passage in enumerate(question.passages):
        stated = [answer for answer in question.answers if re.search(_words(answer), passage.text, re.I)]
        places = list(sentences(passage.text)) if stated else []
        for before, place in zip([None, *places], places, strict=False):
            gold = next(
                (answer for answer in stated if re.search(_words(answer), passage.text[slice(*place)], re.I)), None
            )
            marked = number == 0 and any(place[0] <= start < place[1] for start in question.answer_starts)
            if before is not None and _REFERRING.match(passage.text[slice(*place)]):
                place = before[0], place[1]
            sentence = passage.text[slice(*place)]
            if gold is None or not SENTENCE_WORDS[0] <= len(sentence.split()) <= SENTENCE_WORDS[1]:
                continue
            rank = marked, passage.supporting, overlap(question.text, sentence)
            if best is None or rank > best[0]:
                best = rank, passage, place, gold
    return best[1:] if best else None


def _swapped(
    rng: random.Random, question: Question, sentence: str, gold: str, pool: Sequence[str]
) -> tuple[str, str] | None:
    """A value of the pool and the sentence with it; of the values, one that looks most like the answer."""
    drawn = rng.sample(pool, min(len(pool), DRAWN_VALUES))
    ranked = sorted(drawn, key=lambda value: _likeness(value, gold), reverse=True)
    for value in ranked:
        # Either one inside the other would make an answer right and wrong at once.
        same = any(contains(value, answer) or contains(answer, value) for answer in question.answers)
        if same or contains(question.text, value):
            continue
        shown = value.lower() if sentence == sentence.lower() else value
        if not _ARTICLE.match(gold):
            shown = _ARTICLE.sub("", shown)
        swapped = sentence
        for answer in sorted(question.answers, key=len, reverse=True):
            swapped = re.sub(_words(answer), lambda _, shown=shown: shown, swapped, flags=re.I)  # type: ignore[misc]
        if contains(swapped, value) and not any(contains(swapped, answer) for answer in question.answers):
            return value, swapped
    return None


def _likeness(value: str, gold: str) -> tuple[bool, bool, int]:
    """Same figures and words around them, same last word, close in words."""
    shapes = [re.sub(r"\d", "0", text.lower()) for text in (value, gold)]
    words = [shape.split() for shape in shapes]
    return shapes[0] == shapes[1], words[0][-1] == words[1][-1], -abs(len(words[0]) - len(words[1]))


def _words(answer: str) -> str:
    """A pattern of the answer's words that does not mind spaces between words and marks: `1932-1940`, `1932 - 1940`."""
    pieces = re.findall(r"\w+|[^\w\s]", answer)
    pattern = re.escape(pieces[0])
    for before, piece in pairwise(pieces):
        pattern += (r"\s+" if before[-1].isalnum() and piece[0].isalnum() else r"\s*") + re.escape(piece)
    return rf"(?<!\w){pattern}(?!\w)"
