"""The long-document suite: what contradicts a question, where it stands, and what stays when it goes."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evaluation.suites.base import Made, SuiteSettings
from evaluation.suites.false_answers import false_answers, kind_of, sentences
from evaluation.suites.longqa import LONGQA
from evaluation.suites.questions import HUB_ROWS, Passage, Question, read_questions
from kveraser.errors import InputError
from kveraser.measure.case import BenchCase, tokenize_case, tokenize_context
from kveraser.measure.questions import contains
from tests.tiny import tiny_tokenizer

TOWNS = "Velmora", "Quistram", "Ardelby", "Tonvik", "Harrowmere", "Pelgrade", "Osmund", "Kestrelby"
PEOPLE = (
    "Ines Vahl",
    "Tomas Orrin",
    "Greta Holm",
    "Paul Anders",
    "Mira Costa",
    "Jonas Reed",
    "Olga Stein",
    "Emil Brandt",
)
YEARS = "1862", "1907", "1914", "1888", "1931", "1876", "1899", "1923"


def text_of(place: int) -> str:
    """A paragraph with three facts, each in a sentence of its own, and two without."""
    town, person, year = TOWNS[place], PEOPLE[place], YEARS[place]
    return (
        f"The lighthouse of {town} stands on a low rock at the mouth of the bay. It was opened to visitors in {year} "
        f"after a long repair. The first keeper in {town} was {person}, a retired carpenter. Bread for the keepers "
        f"of {town} came by boat every other week, weather permitting, and was stored below the stairs in two dry "
        f"chests. Older maps show a second tower there, which fell in a storm."
    )


def asked(place: int) -> list[tuple[str, str]]:
    town = TOWNS[place]
    return [
        (f"When was the lighthouse of {town} opened to visitors?", YEARS[place]),
        (f"Who was the first keeper of the lighthouse of {town}?", PEOPLE[place]),
    ]


def squad() -> dict[str, Any]:
    paragraphs = []
    for place in range(len(TOWNS)):
        text = text_of(place)
        qas = [
            {"question": question, "answers": [{"text": answer, "answer_start": text.index(answer)}]}
            for question, answer in asked(place)
        ]
        paragraphs.append({"context": text, "qas": qas})
    return {"data": [{"title": "Light_houses", "paragraphs": paragraphs}]}


def squad_rows() -> Iterator[dict[str, Any]]:
    for place in range(len(TOWNS)):
        for question, answer in asked(place):
            start = text_of(place).index(answer)
            yield {
                "title": "Light_houses", "context": text_of(place), "question": question,
                "answers": {"text": [answer], "answer_start": [start]},
            }  # fmt: skip


def musique_rows() -> Iterator[dict[str, Any]]:
    for place in range(len(TOWNS)):
        others = [place, (place + 1) % len(TOWNS), (place + 2) % len(TOWNS)]
        for question, answer in asked(place):
            paragraphs = [
                {"title": TOWNS[one], "paragraph_text": text_of(one), "is_supporting": one == place} for one in others
            ]
            yield {"question": question, "answer": answer, "answer_aliases": [], "paragraphs": paragraphs}


def simple_rows() -> Iterator[dict[str, Any]]:
    for row in musique_rows():
        passages = [{"title": one["title"], "text": one["paragraph_text"]} for one in row["paragraphs"]]
        yield {"question": row["question"], "answers": [row["answer"]], "passages": passages}


def hotpot_rows(form: str) -> Iterator[dict[str, Any]]:
    for row in musique_rows():
        titles = [one["title"] for one in row["paragraphs"]]
        texts = [re.split(r"(?<=\.) ", one["paragraph_text"]) for one in row["paragraphs"]]
        context = {
            "pairs": [list(pair) for pair in zip(titles, texts, strict=True)],
            "sentences": {"title": titles, "sentences": texts},
            "content": {"title": titles, "content": texts},
            "objects": [{"title": title, "content": text} for title, text in zip(titles, texts, strict=True)],
        }[form]
        facts = [[titles[0], 1]] if form == "pairs" else {"title": titles[:1], "sent_id": [1]}
        yield {"question": row["question"], "answer": row["answer"], "context": context, "supporting_facts": facts}


def iirc_rows() -> Iterator[dict[str, Any]]:
    for place in range(len(TOWNS)):
        (first, year), (second, keeper) = asked(place)
        spans = {"type": "span", "answer_spans": [{"text": keeper, "passage": "main"}]}
        several = {"type": "span", "answer_spans": [{"text": keeper}, {"text": TOWNS[place]}]}
        linked = f"The harbour of {TOWNS[place]} was first dredged in {int(year) - 7} at the town's own cost."
        value = {"type": "value", "answer_value": str(int(year) - 7), "answer_unit": "years", "answer_spans": []}
        context = [{"passage": "main", "text": first}, {"passage": f"{TOWNS[place]} Harbour", "text": linked}]
        harbour = f"When was the harbour of {TOWNS[place]} dredged?"
        yield {
            "title": TOWNS[place], "text": text_of(place), "links": [], "questions": [
                {"question": second, "answer": spans, "context": []},
                {"question": harbour, "answer": value, "context": context},
                {"question": "Who and where?", "answer": several},
                {"question": "Is it open?", "answer": {"type": "binary", "answer_value": "yes"}},
                {"question": "Why?", "answer": {"type": "none"}},
            ],
        }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write a dataset file: rows a line, or one JSON value."""

    def written(content: Any, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        lines = [json.dumps(row) for row in content] if name.endswith(".jsonl") else [json.dumps(content)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return written


def settings(dataset: str | None, length: int = 1600, cases: int = 8, seed: int = 0, **more: Any) -> SuiteSettings:
    return SuiteSettings(tiny_tokenizer(), LONGQA.tasks, (length,), (), cases, seed, dataset=dataset, **more)


def make(dataset: str, **more: Any) -> Made:
    return LONGQA.make(settings(dataset, **more))


def parts(case: BenchCase) -> tuple[str, str]:
    """The erased text, and the context without it."""
    assert isinstance(case.context, str)
    (span,) = case.erase
    start, end = span.start, span.end  # type: ignore[attr-defined]
    return case.context[start:end], case.context[:start] + case.context[end:]


FORMATS: dict[str, tuple[Callable[[], Any], str]] = {
    "squad": (squad, "data.json"),
    "squad rows": (lambda: list(squad_rows()), "data.jsonl"),
    "musique": (lambda: list(musique_rows()), "data.jsonl"),
    "simple": (lambda: list(simple_rows()), "data.jsonl"),
    "hotpot pairs": (lambda: list(hotpot_rows("pairs")), "data.json"),
    "hotpot sentences": (lambda: list(hotpot_rows("sentences")), "data.jsonl"),
    "2wiki content": (lambda: list(hotpot_rows("content")), "data.jsonl"),
    "2wiki objects": (lambda: list(hotpot_rows("objects")), "data.jsonl"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_questions(form: str, write: Callable[..., str]) -> None:
    content, name = FORMATS[form]
    questions = read_questions(write(content(), name))
    assert [(one.text, one.answers) for one in questions] == [
        (question, (answer,)) for place in range(len(TOWNS)) for question, answer in asked(place)
    ]
    for number, question in enumerate(questions):
        assert question.passages[0].text == text_of(number // 2)
        # The simple format alone does not say which passages an answer needs.
        assert [passage.supporting for passage in question.passages][:2] in (
            [[False, False]] if form == "simple" else [[True], [True, False]]
        )


def test_iirc_questions_come_with_what_they_link_to_and_answers_that_no_sentence_states_are_none(
    write: Callable[..., str],
) -> None:
    questions = read_questions(write(list(iirc_rows())))
    assert [one.answers for one in questions[:5]] == [(PEOPLE[0],), ("1855", "1855 years"), (), (), ()]
    assert [passage.title for passage in questions[1].passages] == [TOWNS[0], f"{TOWNS[0]} Harbour"]
    made = make(write(list(iirc_rows())), cases=16)
    assert len(made.cases) == 16
    assert "24 have no answer that a text could state" in made.left_out[0].reason


def test_a_case_erases_a_sentence_of_the_dataset_with_another_value_of_the_same_kind(
    write: Callable[..., str],
) -> None:
    made = make(write(squad(), "data.json"), cases=16)
    assert len(made.cases) == 16 and not made.left_out
    known = {question: answer for place in range(len(TOWNS)) for question, answer in asked(place)}
    swapped = Counter[str]()
    for case in made.cases:
        query = case.queries[0]
        question = next(one for one in known if one in str(query.question))
        gold, (wrong,) = known[question], query.wrong
        assert query.kind == "influence" and query.accepted == (gold,) and query.answer == gold
        values = next(values for values in (YEARS, PEOPLE) if gold in values)
        assert wrong in values and wrong != gold
        swapped[wrong] += 1
        erased, remaining = parts(case)
        sentence = erased.strip().removeprefix("Light houses\n")
        assert contains(sentence, wrong) and not contains(sentence, gold)
        assert sentence not in remaining
        # The dataset's own sentence stays, and with it the answer.
        assert sentence.replace(wrong, gold) in remaining
        assert remaining.strip() and not remaining.endswith("\n")
    assert len(swapped) > 4


def test_the_answer_prefix_is_the_beginning_of_both_sentences(write: Callable[..., str]) -> None:
    prefixed = 0
    for case in make(write(squad(), "data.json"), cases=16).cases:
        (prefix, (gold,), (wrong,)), (erased, remaining) = (
            (case.queries[0].answer_prefix, case.queries[0].accepted, case.queries[0].wrong),
            parts(case),
        )
        if prefix:
            prefixed += 1
            assert f"{prefix} {wrong}" in erased and f"{prefix} {gold}" in remaining
    assert prefixed == 16


def test_several_files_are_read_together(write: Callable[..., str]) -> None:
    first, second = write(squad(), "one.json"), write(list(musique_rows()), "two.jsonl")
    together = make(f"{first}, {second}", cases=100).cases
    assert len(together) > max(len(make(first, cases=100).cases), len(make(second, cases=100).cases))


def test_the_erased_tokens_are_the_statement_and_text_follows_it(write: Callable[..., str]) -> None:
    tokenizer = tiny_tokenizer()
    for case in make(write(list(musique_rows()))).cases:
        context = tokenize_context(tokenizer, case.context)
        assert 0.8 * 1600 < len(context.tokens) <= 1600
        tokenized = tokenize_case(tokenizer, context, case)
        (span,) = tokenized.spans
        erased, _ = parts(case)
        assert context.transcript.text_of(span) == erased
        assert span.end < len(context.tokens) - 20
        assert all(one.answer for one in tokenized.asked)


def test_questions_share_a_context_and_each_case_erases_its_own_statement(write: Callable[..., str]) -> None:
    made = make(write(squad(), "data.json"), cases=16, length=2400)
    contexts = Counter(case.context for case in made.cases)
    assert len(contexts) < len(made.cases) and max(contexts.values()) >= 3
    assert len({(case.context, case.erase) for case in made.cases}) == len(made.cases)
    assert len({case.id for case in made.cases}) == len(made.cases)


def test_musique_questions_are_put_together_where_their_passages_fit(write: Callable[..., str]) -> None:
    dataset = write([row for number, row in enumerate(musique_rows()) if number % 2])
    together = Counter(case.context for case in make(dataset, length=2400).cases)
    alone = Counter(case.context for case in make(dataset, length=900).cases)
    assert max(together.values()) > 1
    assert alone and max(alone.values()) == 1


def test_every_second_case_asks_about_another_passage_too(write: Callable[..., str]) -> None:
    made = make(write(list(simple_rows())))
    assert [len(case.queries) for case in made.cases] == [1, 2] * 4
    for case in made.cases[1::2]:
        harmless, (erased, remaining) = case.queries[1], parts(case)
        assert harmless.kind == "no_harm"
        opening = re.findall(r'"([^"]*)"', str(harmless.question))[0]
        assert f"{opening} {harmless.answer}" in remaining and opening not in erased
        # Not the passage that the question is about: both sentences name their town, or stand beside its name.
        block = next(block for block in remaining.split("\n\n") if opening in block)
        assert not any(contains(str(case.queries[0].question), town) for town in TOWNS if town in block)


def test_a_seed_gives_the_same_cases_and_another_one_others(write: Callable[..., str]) -> None:
    dataset = write(list(musique_rows()))
    first = make(dataset)
    assert first == make(dataset)
    assert [case.context for case in first.cases] != [case.context for case in make(dataset, seed=1).cases]


def test_a_passage_too_long_for_the_context_is_cut_about_the_answer(write: Callable[..., str]) -> None:
    rows = list(simple_rows())
    padding = "Nothing was written down about the winters of that coast. " * 40
    for row in rows:
        row["passages"] = [{"title": "", "text": padding + passage["text"]} for passage in row["passages"]]
    made = make(write(rows), length=700)
    assert made.cases
    for case in made.cases:
        assert len(tokenize_context(tiny_tokenizer(), case.context).tokens) <= 700
        assert contains(parts(case)[1], case.queries[0].accepted[0])


def test_contexts_too_short_for_a_statement_leave_their_cell_out(write: Callable[..., str]) -> None:
    made = LONGQA.make(
        SuiteSettings(tiny_tokenizer(), LONGQA.tasks, (60, 900), (), 3, 0, dataset=write(squad(), "a.json"))
    )
    assert {case.cell.length for case in made.cases} == {900}
    (left_out,) = made.left_out
    assert left_out.cell.length == 60 and "longer contexts" in left_out.reason


def test_unanswerable_questions_are_counted(write: Callable[..., str]) -> None:
    rows = list(simple_rows())
    rows[0]["answers"] = ["a golden anchor"]
    rows[1]["answers"] = ["no"]
    made = make(write(rows), cases=99)
    assert len(made.cases) == len(rows) - 2
    assert made.left_out[0].reason == (
        "of 16 questions, 1 have an answer that no sentence of their passages states, "
        "1 have no answer that a text could state"
    )


def test_no_question_that_can_be_contradicted_is_an_error(write: Callable[..., str]) -> None:
    rows = list(simple_rows())[:3]
    for row in rows:
        row["answers"] = ["a golden anchor"]
    with pytest.raises(InputError, match="of 3, 3 have an answer that no sentence"):
        make(write(rows))


def test_the_suite_says_that_it_needs_a_dataset() -> None:
    with pytest.raises(InputError, match="--dataset FILE"):
        LONGQA.make(settings(None))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2 is not JSON"),
        ('{"prompt": "x", "reply": "y"}', r"line 2 has the columns prompt, reply, and none of the known"),
        ("[1]", r"line 2 has no columns"),
        ('{"question": "x", "answers": "y", "passages": []}', r"line 2: answers is 'y'"),
        ('{"question": "x", "answers": ["y"], "passages": [{"title": "t"}]}', r"line 2: passages.0.text is"),
        ('{"question": " ", "answers": ["y"], "passages": [{"text": "t"}]}', r"line 2: the question ' ' is empty"),
        ('{"question": "x", "answer": "y", "context": ["t"]}', r"line 2: 't' where a title with its sentences"),
        ('{"question": "x", "answer": "y", "context": {"title": []}}', r"line 2: an object with title where"),
        ('{"question": "x", "answer": "y", "context": [["t", "text"]]}', r"line 2: the context of 't' is 'text'"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(next(simple_rows())) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_questions(str(path))


def test_files_that_are_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dataset file"):
        read_questions(str(tmp_path / "none.jsonl"))
    path = tmp_path / "data.json"
    path.write_text('{"a": 1}\n{"a": 2}', encoding="utf-8")
    with pytest.raises(InputError, match=r"named \.jsonl"):
        read_questions(str(path))
    path.write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(InputError, match="no list of rows"):
        read_questions(str(path))
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="no question"):
        read_questions(str(path))


def test_a_hub_dataset_is_read_by_name_subset_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, subset: str | None, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        calls.append((name, subset, split, streaming))
        # Endless: it must be read as a stream, and not to its end.
        while True:
            yield from squad_rows()

    hub = ModuleType("datasets")
    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(read_questions("squad")) == HUB_ROWS
    read_questions("someone/lighthouses:plain:test")
    read_questions("hotpotqa")
    assert calls == [
        ("rajpurkar/squad", None, "validation", True),
        ("someone/lighthouses", "plain", "test", True),
        ("hotpotqa/hotpot_qa", "distractor", "validation", True),
    ]


def test_a_hub_dataset_that_can_not_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ModuleType("datasets")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ValueError("Bad split: validation. Available splits: ['train']\nmore")

    hub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(InputError, match=r"Available splits: \['train'\]\).*or give a local"):
        read_questions("someone/lighthouses")
    hub.load_dataset = lambda *_, **__: iter([{"text": "a", "label": 1}])  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="row 1 has the columns text, label"):
        read_questions("someone/lighthouses")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"IIRC is on no hub: .*iirc and give one of its \.json files"):
        read_questions("IIRC")
    with pytest.raises(InputError, match=r"kveraser\[bench\]"):
        read_questions("someone/lighthouses")


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("When was she born?", "30 August 1907", "date"),
        ("When was she born?", "August 30, 1907", "date"),
        ("When was it opened?", "1907", "year"),
        ("In what era?", "From the 1950s to the 1970s", "period"),
        ("How much did it cost?", "$3.5 million", "money"),
        ("What share?", "25%", "percent"),
        ("How many?", "45,000", "number"),
        ("How many came?", "three", "number"),
        ("How large is it?", "17 square miles", "number of miles"),
        ("Who wrote it?", "Greta Holm", "person"),
        ("What label did the person who sang it start?", "Grey Records", "organisation"),
        ("Where is it?", "Velmora", "place"),
        ("Which administrative territorial entity is it in?", "Holm", "place"),
        ("What did the play become?", "The Grey Tower", "name"),
        ("What did he do then?", "sold the boat", "phrase"),
    ],
)
def test_kinds_of_answers(question: str, answer: str, kind: str) -> None:
    assert kind_of(question, answer) == kind


def test_sentences_do_not_end_at_abbreviations_initials_or_decimal_points() -> None:
    text = ' He met Dr. Vahl in the U.S. in 1985. It cost 3.5 crowns. "Fine," said J. R. Holm (later mayor). They left '
    assert [text[start:end] for start, end in sentences(text)] == [
        "He met Dr. Vahl in the U.S. in 1985.",
        "It cost 3.5 crowns.",
        '"Fine," said J. R. Holm (later mayor).',
        "They left",
    ]


def test_a_sentence_that_begins_with_a_pronoun_comes_with_the_one_before_it() -> None:
    question, answer = asked(0)[0]
    other = Question(asked(1)[0][0], (YEARS[1],), (Passage(text_of(1)),))
    (made, _), _ = false_answers([Question(question, (answer,), (Passage(text_of(0)),)), other], 0)
    assert made.sentence == (
        "The lighthouse of Velmora stands on a low rock at the mouth of the bay. "
        "It was opened to visitors in 1907 after a long repair."
    )
    assert made.passage.text[slice(*made.place)] == made.sentence.replace("1907", "1862")


def test_lower_case_text_with_spaced_marks_is_understood() -> None:
    passage = Passage(
        "the tower of osmund was painted. the tower was in use in 1932 - 1940 ( see maps ). now it is a school."
    )
    other = Question(
        "When was the mill in use?", ("1950-1961",), (Passage("The mill was in use in 1950-1961, they say."),)
    )
    (first, second), _ = false_answers([Question("When was the tower in use?", ("1932-1940",), (passage,)), other], 0)
    assert first.sentence == "the tower was in use in 1950-1961 ( see maps )."
    assert second.sentence == "The mill was in use in 1932-1940, they say."


def test_a_value_that_would_be_right_or_that_the_question_names_is_never_taken() -> None:
    passage = Passage("The older bridge was built by Paul Anders in a year of floods.")
    questions = [
        Question("Who built the bridge, not Mira Costa?", ("Paul Anders", "Anders"), (passage,)),
        Question("Who is she?", ("Mira Costa",), (Passage("She is called Mira Costa by all of them."),)),
        Question("Who is he?", ("The Anders",), (Passage("They are called the Anders by all of them."),)),
    ]
    made, without = false_answers(questions, 0)
    assert [one.question.text for one in made] == ["Who is she?", "Who is he?"]
    assert without == {"have no other question with an answer of the same kind": 1}


def test_the_sentence_is_the_one_that_the_dataset_marks_or_else_the_one_most_about_the_question() -> None:
    text = "In 1907 a mill burned down near the market. The lighthouse of Osmund was opened in 1907 by the mayor."
    other = Question("When?", ("1862",), (Passage("Not much happened there in 1862 or later."),))
    asked_of = Question("When was the lighthouse of Osmund opened?", ("1907",), (Passage(text),))
    marked = Question("When did it happen?", ("1907",), (Passage(text),), (text.index("1907"),))
    (about, burned, _), _ = false_answers([asked_of, marked, other], 0)
    assert about.sentence == "The lighthouse of Osmund was opened in 1862 by the mayor."
    assert burned.sentence == "In 1862 a mill burned down near the market."
