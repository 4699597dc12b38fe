"""Long-document question answering with a false statement among the passages: a dataset's own sentence, one value off.

A context holds the passages that answer up to four questions, a false statement for each of them as a paragraph of its
own, and other passages of the dataset up to the length. A case erases one of the false statements; the others stay.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.false_answers import FalseAnswer, false_answers, overlap, sentences
from evaluation.suites.questions import HUB_DATASETS, Passage, read_questions
from kveraser.errors import InputError
from kveraser.measure.case import BenchCase, Cell, LeftOut, tokenize_context
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters
from kveraser.text.tokenized import encode

NAME = "longqa"
TASK = "false_statement"
QUESTIONS_PER_CONTEXT = 4
SHARE_OF_QUESTIONS = 0.7
"""Of a context, what its questions may need before the next question goes to another one."""
SMALLEST_PIECE = 30
"""Tokens of a passage below which it is left out rather than cut."""
SEPARATOR = "\n\n"
REQUEST = "{question} Answer with the name, date, number or phrase alone."
GO_ON = 'How does the sentence that begins with "{words}" go on in the text above?'
QUOTED_SENTENCE = 10, 60
"""Words of a sentence that is quoted by its beginning."""
QUOTED_WORDS, LONGEST_ANSWER = 10, 24
PREFIX_WORDS = 3
"""Fewer words of a sentence are no answer prefix: they would not say which sentence it is."""


@dataclass(frozen=True)
class _Block:
    """A paragraph of a context: a passage or a part of it, or a false statement."""

    passage: Passage
    text: str
    false: FalseAnswer | None = None

    def __str__(self) -> str:
        return f"{self.passage.title}\n{self.text}" if self.passage.title else self.text


def make(settings: SuiteSettings) -> Made:
    """The cases of every length.

    Raises:
        InputError: no dataset is given or it can't be read, or it has no question that can be contradicted.
    """
    if TASK not in settings.tasks:
        return Made(())
    if settings.dataset is None:
        raise InputError(
            f"the suite {NAME} reads questions and their passages: give them with --dataset FILE (.json or .jsonl of "
            "SQuAD, MuSiQue, HotpotQA, 2WikiMultiHopQA or IIRC, or rows of question, answers and passages) or name a "
            f"hub dataset, such as {', '.join(HUB_DATASETS)}"
        )
    questions = [question for source in settings.dataset.split(",") for question in read_questions(source.strip())]
    contradicted, without = false_answers(questions, settings.seed)
    reasons = ", ".join(f"{count} {reason}" for reason, count in without.items())
    if not contradicted:
        raise InputError(
            f"no question of the dataset {settings.dataset} can be contradicted (of {len(questions)}, {reasons}): "
            "give a dataset whose passages state the answers, with several answers of a kind"
        )
    others = [Passage(text) for text in settings.passages]
    passages = list(dict.fromkeys([passage for question in questions for passage in question.passages] + others))
    writer = _Writer(settings.tokenizer, passages)
    order = _order(random.Random(f"{settings.seed}/order"), contradicted)
    cases: list[BenchCase] = []
    left_out = [LeftOut(Cell(NAME, TASK), f"of {len(questions)} questions, {reasons}")] if reasons else []
    for length in settings.lengths:
        made = list(islice(_cases(writer, order, length, settings), settings.cases))
        cases += made
        if not made:
            reason = f"no question of {settings.dataset} fits with its false statement: give longer contexts"
            left_out.append(LeftOut(Cell(NAME, TASK, length), reason))
    return Made(tuple(cases), tuple(left_out))


def _order(rng: random.Random, contradicted: Sequence[FalseAnswer]) -> list[FalseAnswer]:
    """Shuffled, with up to one context's questions on the same passage next to each other."""
    groups: dict[Passage, list[FalseAnswer]] = defaultdict(list)
    for false in contradicted:
        groups[false.passage].append(false)
    step = QUESTIONS_PER_CONTEXT
    parts = [group[start : start + step] for group in groups.values() for start in range(0, len(group), step)]
    rng.shuffle(parts)
    return [false for part in parts for false in part]


def _cases(writer: _Writer, order: Sequence[FalseAnswer], length: int, settings: SuiteSettings) -> Iterator[BenchCase]:
    """Cases of one length, context by context, until no question is left."""
    waiting, number = list(order), 0
    while waiting:
        together: list[FalseAnswer] = []
        # One that does not go with the others stands at the front of the next context.
        for false in waiting[: 2 * QUESTIONS_PER_CONTEXT]:
            if not together or (len(together) < QUESTIONS_PER_CONTEXT and writer.fit([*together, false], length)):
                together.append(false)
        waiting = [false for false in waiting if false not in together]
        rng = random.Random(f"{settings.seed}/{length}/{number}/{together[0].question.text}")
        blocks = writer.blocks(rng, together, length)
        if blocks is None:
            continue
        context = SEPARATOR.join(map(str, blocks))
        for false in together:
            at = next(place for place, block in enumerate(blocks) if block.false is false)
            start = len(SEPARATOR.join(map(str, blocks[:at]))) + (len(SEPARATOR) if at else 0)
            # The separator behind it goes too: what stays reads as if the statement had never been put in.
            span = Characters(start, start + len(str(blocks[at])) + len(SEPARATOR))
            question, answers = false.question, false.question.answers
            asked = REQUEST.format(question=question.text.strip())
            queries = [Query(asked, answers[0], accepted=answers, wrong=(false.value,), answer_prefix=_prefix(false))]
            if number % 2:
                queries += _go_on(rng, blocks, context, false)
            case_id = f"{NAME}/{TASK}/{length}/{number}"
            yield BenchCase(case_id, Cell(NAME, TASK, length), context, (span,), tuple(queries))
            number += 1


def _prefix(false: FalseAnswer) -> str:
    """The words of the false sentence in front of its value, which the true sentence has as well; none where few."""
    words = false.sentence.partition(false.value)[0].strip()
    return words if len(words.split()) >= PREFIX_WORDS else ""


def _go_on(rng: random.Random, blocks: Sequence[_Block], context: str, false: FalseAnswer) -> list[Query]:
    """A question on a sentence of another passage, if one stands in the context just once."""
    others = [block for block in blocks if block.false is None and block.passage != false.passage]
    for block in rng.sample(others, len(others)):
        places = list(sentences(block.text))
        for start, end in rng.sample(places, len(places)):
            words = block.text[start:end].split()
            count = min(QUOTED_WORDS, len(words) // 2)
            opening = " ".join(words[:count])
            if QUOTED_SENTENCE[0] <= len(words) <= QUOTED_SENTENCE[1] and context.count(opening) == 1:
                answer = " ".join(words[count:][:LONGEST_ANSWER])
                return [Query(GO_ON.format(words=opening), answer, "no_harm")]
    return []


class _Writer:
    """Puts passages together to contexts, counted in the tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, passages: Sequence[Passage]) -> None:
        self.tokenizer, self.passages = tokenizer, passages
        self._sizes: dict[str, int] = {}

    def size(self, block: _Block) -> int:
        """Tokens of a paragraph and of the separator behind it."""
        text = f"{block}{SEPARATOR}"
        if text not in self._sizes:
            self._sizes[text] = len(encode(self.tokenizer, text)[0])
        return self._sizes[text]

    def fit(self, together: Sequence[FalseAnswer], length: int) -> bool:
        """Whether the questions can share a context: their passages fit whole, and no sentence is changed twice."""
        places, statements = {(false.passage, false.place) for false in together}, _statements(together)
        different = min(len(places), len(set(map(str, statements)))) == len(together)
        needed = [*statements, *(_Block(passage, passage.text) for passage in _needed(together))]
        return different and sum(map(self.size, needed)) <= SHARE_OF_QUESTIONS * length

    def blocks(self, rng: random.Random, together: Sequence[FalseAnswer], length: int) -> list[_Block] | None:
        """The paragraphs of a context of at most `length` tokens, in order; None where not even the statements fit."""
        statements, needed = _statements(together), _needed(together)
        opening = len(tokenize_context(self.tokenizer, SEPARATOR + "-").tokens)
        room = length - opening - sum(map(self.size, statements))
        anchors = {false.passage: false.place for false in together}
        kept: list[_Block] = []
        # Passages that state an answer come first: what they leave is for the others.
        for number, passage in enumerate(needed):
            block = self._cut(passage, room // (len(needed) - number), anchors.get(passage))
            if block is not None:
                kept.append(block)
                room -= self.size(block)
        if room < 0:
            return None
        own = [passage for false in together for passage in false.question.passages]
        asked = " ".join(false.question.text for false in together)
        own.sort(key=lambda passage: overlap(asked, passage.text), reverse=True)
        more, least = dict.fromkeys([*own, *rng.sample(self.passages, len(self.passages))]), len(kept)
        for passage in more:
            if room < SMALLEST_PIECE:
                break
            block = self._cut(passage, room, None) if passage not in needed else None
            if block is not None:
                kept.append(block)
                room -= self.size(block)
        while True:
            blocks = self._ordered(rng, kept, statements)
            # Tokens may differ at the seams from what the paragraphs count alone.
            if len(tokenize_context(self.tokenizer, SEPARATOR.join(map(str, blocks))).tokens) <= length:
                return blocks
            if len(kept) == least:
                return None
            kept.pop()

    def _ordered(self, rng: random.Random, kept: Sequence[_Block], statements: Sequence[_Block]) -> list[_Block]:
        """In any order, every statement with a passage somewhere behind it."""
        behind: dict[int, list[_Block]] = defaultdict(list)
        for statement in statements:
            behind[rng.randrange(len(kept))].append(statement)
        passages = rng.sample(kept, len(kept))
        return [block for place, passage in enumerate(passages) for block in (*behind[place], passage)]

    def _cut(self, passage: Passage, room: int, anchor: tuple[int, int] | None) -> _Block | None:
        """The passage, or whole sentences of it: those about the anchor (always), or the first ones (if they fit)."""
        whole = _Block(passage, passage.text.strip())
        if not whole.text or self.size(whole) <= room:
            return whole if whole.text else None
        places = list(sentences(passage.text))
        first = last = 0
        if anchor:
            first = next(place for place, (start, _) in enumerate(places) if start == anchor[0])
            last = next(place for place, (_, end) in enumerate(places) if end == anchor[1])
        piece = _Block(passage, passage.text[places[first][0] : places[last][1]])
        grown = True
        while grown:
            grown = False
            for before, after in ((0, 1), (1, 0)):
                start, end = first - before, last + after
                if start < 0 or end >= len(places):
                    continue
                larger = _Block(passage, passage.text[places[start][0] : places[end][1]])
                if self.size(larger) <= room:
                    first, last, piece, grown = start, end, larger, True
        return piece if anchor or SMALLEST_PIECE <= self.size(piece) <= room else None


def _statements(together: Sequence[FalseAnswer]) -> list[_Block]:
    return [_Block(false.passage, false.sentence, false) for false in together]


def _needed(together: Sequence[FalseAnswer]) -> list[Passage]:
    """The passages that state the answers, then those that the dataset calls supporting; each once."""
    supporting = [passage for false in together for passage in false.question.passages if passage.supporting]
    return list(dict.fromkeys([*(false.passage for false in together), *supporting]))


LONGQA = Suite(
    NAME,
    "questions on long documents in which one sentence of a dataset's passages also stands with a false value",
    tasks=(TASK,),
    lengths=(1024, 2048),
    spans=(),
    make=make,
)
