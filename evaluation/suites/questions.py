"""Questions with the passages that answer them, as question answering datasets publish them: files and hub datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kveraser.errors import InputError
from kveraser.measure.questions import normalized

HUB_DATASETS = {
    "squad": "rajpurkar/squad",
    "musique": "dgslibisey/MuSiQue",
    "2wikimultihopqa": "framolfese/2WikiMultihopQA",
    "hotpotqa": "hotpotqa/hotpot_qa:distractor",
}
"""Short names of hub datasets whose columns are among the known ones."""
ELSEWHERE = {"iirc": "https://allenai.org/data/iirc"}
"""Datasets that no hub has in their own format, and where their files are."""
HUB_SPLIT = "validation"
HUB_ROWS = 2000
"""Rows that are read of a hub dataset at most, from its beginning."""
NOT_STATED = frozenset({"yes", "no"})
"""Answers that no passage states, wherever the word may stand."""


@dataclass(frozen=True)
class Passage:
    """A passage of a dataset, its text as it stands there.

    Attributes:
        supporting: the dataset says that the answer needs it. Passages that differ in this alone are equal.
    """

    text: str
    title: str = ""
    supporting: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Question:
    """A question, every answer that counts as right (none: it has no answer that a text could state) and its passages.

    Attributes:
        answer_starts: where an answer stands in the first passage, in characters, where the dataset says so.
    """

    text: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    answer_starts: tuple[int, ...] = ()


def read_questions(source: str) -> list[Question]:
    """The questions of a dataset, in its order.

    Args:
        source: a `.jsonl` file, a row a line; a `.json` file, a list of rows or SQuAD's object with `data`; or a hub
            dataset, `owner/name`, `owner/name:subset`, `owner/name:subset:split` or a short name of `HUB_DATASETS`.
            Rows are those of SQuAD, MuSiQue, HotpotQA and 2WikiMultiHopQA, IIRC, or
            `{"question", "answers": [...], "passages": [{"title", "text"}]}`.

    Raises:
        InputError: not found, no JSON, a row that is none of these (its line or number is named), or no question.
    """
    path = Path(source)
    if path.is_file():
        rows = _from_lines(path) if path.suffix == ".jsonl" else _from_json(path)
    elif path.suffix in (".json", ".jsonl"):
        raise InputError(f"no dataset file at {source}: check the path")
    else:
        rows = _from_hub(source)
    questions = [question for where, row in rows for question in _questions(where, row)]
    if not questions:
        raise InputError(f"the dataset {source} has no question: give another one")
    return questions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise InputError(f"can't read {path} ({error.strerror}): check the path") from error


def _from_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # str.splitlines would also split at separators that JSON allows inside a text.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}): fix the line") from error


def _from_json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); a file with a row a line is named .jsonl") from error
    rows = content["data"] if isinstance(content, dict) and "data" in content else content
    if not isinstance(rows, list):
        raise InputError(f'{path} holds no list of rows: give a list, or an object with a list "data"')
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", row


def _from_hub(source: str) -> Iterator[tuple[str, Any]]:
    if source.lower() in ELSEWHERE:
        raise InputError(f"{source} is on no hub: unpack {ELSEWHERE[source.lower()]} and give one of its .json files")
    name, _, rest = HUB_DATASETS.get(source.lower(), source).partition(":")
    subset, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"{source} is no file, and hub datasets need `pip install kveraser[bench]`") from error
    try:
        rows = datasets.load_dataset(name, subset or None, split=split or HUB_SPLIT, streaming=True)
        taken: Iterable[Any] = list(islice(rows, HUB_ROWS))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{source} is neither a file nor a dataset that can be loaded ({type(error).__name__}: {reason}): check "
            "the name, `owner/name:subset:split`, and the connection, or give a local .json or .jsonl file"
        ) from error
    for number, row in enumerate(taken, start=1):
        yield f"{source}, row {number}", row


class _Row(BaseModel):
    """Fields that a format needs; datasets have others beside them."""

    model_config = ConfigDict(extra="ignore")


class _SquadAnswers(_Row):
    text: list[str]
    answer_start: list[int]

    def question(self, text: str, passage: Passage) -> Question:
        return Question(text, _stated(self.text), (passage,), tuple(self.answer_start))


class _SquadRow(_Row):
    question: str
    context: str
    answers: _SquadAnswers
    title: str = ""

    def questions(self) -> Iterator[Question]:
        yield self.answers.question(self.question, Passage(self.context, _spaced(self.title), True))


class _SquadAnswer(_Row):
    text: str
    answer_start: int


class _SquadQuestion(_Row):
    question: str
    answers: list[_SquadAnswer]


class _SquadParagraph(_Row):
    context: str
    qas: list[_SquadQuestion]


class _SquadArticle(_Row):
    paragraphs: list[_SquadParagraph]
    title: str = ""

    def questions(self) -> Iterator[Question]:
        for paragraph in self.paragraphs:
            passage = Passage(paragraph.context, _spaced(self.title), True)
            for asked in paragraph.qas:
                texts, starts = [one.text for one in asked.answers], [one.answer_start for one in asked.answers]
                yield _SquadAnswers(text=texts, answer_start=starts).question(asked.question, passage)


class _MusiqueParagraph(_Row):
    paragraph_text: str
    title: str = ""
    is_supporting: bool = False


class _MusiqueRow(_Row):
    question: str
    answer: str
    paragraphs: list[_MusiqueParagraph]
    answer_aliases: list[str] = []
    answerable: bool = True

    def questions(self) -> Iterator[Question]:
        passages = [Passage(one.paragraph_text, one.title, one.is_supporting) for one in self.paragraphs]
        answers = [self.answer, *self.answer_aliases] if self.answerable else []
        yield Question(self.question, _stated(answers), tuple(passages))


class _HotpotRow(_Row):
    question: str
    answer: str
    context: Any
    supporting_facts: Any = ()

    def questions(self) -> Iterator[Question]:
        supporting = {title for title, _ in _pairs(self.supporting_facts, ("sent_id",))}
        passages = []
        for title, sentences in _pairs(self.context, ("sentences", "content")):
            if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
                raise ValueError(f"the context of {title!r} is {_shown(sentences)}, not a list of sentences")
            passages.append(Passage(" ".join(map(str.strip, sentences)), title, title in supporting))
        yield Question(self.question, _stated([self.answer]), tuple(passages))


class _IircSpan(_Row):
    text: str


class _IircAnswer(_Row):
    type: str
    answer_spans: list[_IircSpan] = []
    answer_value: str | int | float = ""
    answer_unit: str = ""

    def stated(self) -> tuple[str, ...]:
        """One span, or a value with and without its unit; several spans are an answer that no sentence states."""
        if self.type == "span":
            return _stated([span.text for span in self.answer_spans]) if len(self.answer_spans) == 1 else ()
        value = str(self.answer_value)
        return _stated([value, f"{value} {self.answer_unit}"]) if self.type == "value" else ()


class _IircContext(_Row):
    text: str
    passage: str


class _IircQuestion(_Row):
    question: str
    answer: _IircAnswer
    context: list[_IircContext] = []


class _IircRow(_Row):
    asked: list[_IircQuestion] = Field(alias="questions")
    text: str
    title: str = ""

    def questions(self) -> Iterator[Question]:
        own = Passage(self.text, self.title, True)
        for one in self.asked:
            linked = [Passage(found.text, found.passage, True) for found in one.context if found.passage != "main"]
            yield Question(one.question, one.answer.stated(), (own, *linked))


class _SimplePassage(_Row):
    text: str
    title: str = ""


class _SimpleRow(_Row):
    question: str
    answers: list[str]
    passages: list[_SimplePassage]

    def questions(self) -> Iterator[Question]:
        passages = tuple(Passage(passage.text, passage.title) for passage in self.passages)
        yield Question(self.question, _stated(self.answers), passages)


_Format = _SquadRow | _SquadArticle | _MusiqueRow | _HotpotRow | _IircRow | _SimpleRow


def _questions(where: str, row: Any) -> list[Question]:
    formats: tuple[tuple[type[_Format], tuple[str, ...]], ...] = (
        (_MusiqueRow, ("question", "answer", "paragraphs")),
        (_SquadArticle, ("paragraphs",)),
        (_SimpleRow, ("question", "answers", "passages")),
        (_SquadRow, ("question", "answers", "context")),
        (_HotpotRow, ("question", "answer", "context")),
        (_IircRow, ("questions", "text")),
    )
    columns = list(row) if isinstance(row, dict) else []
    known = next((known for known, needed in formats if set(needed) <= set(columns)), None)
    if known is None:
        there = f"the columns {', '.join(map(str, columns))}" if columns else "no columns"
        wanted = "; ".join(", ".join(needed) for _, needed in formats)
        raise InputError(f"{where} has {there}, and none of the known sets of columns: {wanted}")
    try:
        found = list(known.model_validate(row).questions())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {place} is {_shown(first['input'])} ({first['msg']}): fix it") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}: fix it") from error
    for question in found:
        if not question.text.strip() or not any(passage.text.strip() for passage in question.passages):
            raise InputError(f"{where}: the question {question.text!r} is empty, or has no passage with text: fix it")
    return found


def _pairs(value: Any, seconds: tuple[str, ...]) -> list[tuple[str, Any]]:
    """Titles with what belongs to them: two lists by name, a list of objects, or a list of pairs."""
    if isinstance(value, dict):
        second = next((name for name in seconds if name in value), None)
        if second is None or not isinstance(value.get("title"), list) or not isinstance(value[second], list):
            raise ValueError(f"an object with {', '.join(map(str, value))} where title and {seconds[0]} are lists")
        return [(str(title), content) for title, content in zip(value["title"], value[second], strict=False)]
    pairs = []
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, dict):
            one = [one.get("title"), next((one[name] for name in seconds if name in one), None)]
        if not isinstance(one, list | tuple) or len(one) != 2 or None in one:
            raise ValueError(f"{_shown(one)} where a title with its {' or '.join(seconds)} is wanted")
        pairs.append((str(one[0]), one[1]))
    return pairs


def _stated(answers: Iterable[str]) -> tuple[str, ...]:
    """Answers that a passage can state, each once: none where yes or no is the answer, or nothing stays of it."""
    texts = tuple(dict.fromkeys(answer.strip() for answer in answers if normalized(answer)))
    return () if NOT_STATED & set(map(normalized, texts[:1])) else texts


def _spaced(title: str) -> str:
    return title.replace("_", " ")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
