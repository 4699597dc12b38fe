"""Case files of the user's own: what they become, and how malformed lines are reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.measure.case import BenchCase, Cell, tokenize_case, tokenize_context
from kveraser.measure.case_file import read_case_file
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters, Message, Text
from tests.tiny import tiny_tokenizer

CONTEXT = "The gate code is 4711. The gate opens at nine. Correction: the gate opens at ten. Bring a lamp."
LINE = {"context": CONTEXT, "erase": "Correction: the gate opens at ten.", "question": "When?", "answers": ["nine"]}
CHAT = [
    {"role": "user", "content": "The gate opens at nine."},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "No, it opens at ten."},
]

Read = Callable[..., tuple[BenchCase, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read the cases of a file with these lines."""

    def cases(*lines: Any) -> tuple[BenchCase, ...]:
        path = tmp_path / "own.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return read_case_file(path)

    return cases


def refused(read: Read, *lines: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(*lines)
    return str(caught.value)


def test_a_line_becomes_a_case_of_the_suite_cases(read: Read) -> None:
    (case,) = read(LINE | {"wrong": ["ten"]})
    assert case.id == "1" and case.cell == Cell("cases", "cases")
    assert case.context == CONTEXT and case.erase == (Text("Correction: the gate opens at ten."),)
    assert case.queries == (Query("When?", "nine", accepted=("nine",), wrong=("ten",)),)


def test_a_text_that_takes_the_place_of_the_span(read: Read) -> None:
    replaced = {"replace": "Correction: the gate opens at six.", "answers": ["six"]}
    (case,) = read(LINE | replaced)
    assert case.replace == replaced["replace"]
    # Without it, no text says six; and an empty one is an erase.
    assert "six" in refused(read, LINE | {"answers": ["six"]})
    assert "replace" in refused(read, LINE | {"replace": ""})
    overlapping = LINE | replaced | {"erase": ["the gate opens at ten", "Correction: the gate"]}
    (case,) = read(overlapping)
    with pytest.raises(InputError, match="overlap"):
        tokenize_case(tiny_tokenizer(), tokenize_context(tiny_tokenizer(), CONTEXT), case)


def test_ids_tasks_and_forced_answers_are_taken_and_blank_lines_skipped(read: Read) -> None:
    cases = read(LINE | {"id": "gate", "task": "doors", "answer": "At nine."}, "", LINE, LINE | {"id": 7})
    assert [case.id for case in cases] == ["gate", "3", "7"]
    assert cases[0].cell.task == "doors" and cases[0].queries[0].answer == "At nine."


def test_two_numbers_are_one_span_and_other_lists_are_several(read: Read) -> None:
    start = CONTEXT.index("Correction")
    (one,) = read(LINE | {"erase": [start, start + 34]})
    assert one.erase == (Characters(start, start + 34),) and one.cell.spans == 1
    (two,) = read(LINE | {"erase": [[start, start + 34], "Bring a lamp."]})
    assert two.erase == (Characters(start, start + 34), Text("Bring a lamp.")) and two.cell.spans == 2
    tokenizer = tiny_tokenizer()
    for case in (one, two):
        context = tokenize_context(tokenizer, case.context)
        spans = tokenize_case(tokenizer, context, case).spans
        assert "Correction: the gate opens at ten." in context.transcript.text_of(spans[0])


def test_messages_are_erased_by_index(read: Read) -> None:
    (case,) = read({"messages": CHAT, "erase": {"message": 2}, "question": "When?", "answers": ["nine"]})
    assert case.context == tuple(CHAT) and case.erase == (Message(2),)
    context = tokenize_context(tiny_tokenizer(), case.context)
    (span,) = tokenize_case(tiny_tokenizer(), context, case).spans
    assert "it opens at ten" in context.transcript.text_of(span)


def test_questions_share_what_the_line_says_unless_they_say_it_themselves(read: Read) -> None:
    code = {"question": "Which code?", "answers": ["4711"], "wrong": [], "kind": "no_harm", "answer": "It is 4711."}
    fields = {key: value for key, value in LINE.items() if key != "question"}
    (case,) = read(fields | {"questions": ["When?", code], "wrong": ["ten"], "answer": "At nine."})
    assert case.queries == (
        Query("When?", "At nine.", accepted=("nine",), wrong=("ten",)),
        Query("Which code?", "It is 4711.", "no_harm", ("4711",)),
    )


def test_the_answers_of_a_leak_question_are_what_must_not_come_out(read: Read) -> None:
    (case,) = read(LINE | {"erase": "The gate code is 4711.", "kind": "leak", "answers": ["4711"]})
    assert case.queries == (Query("When?", "4711", "leak", wrong=("4711",)),)


def test_an_answer_may_stand_in_the_question_or_be_yes_or_no(read: Read) -> None:
    cases = read(
        LINE | {"question": "Noon or nine?", "answers": ["noon"]},
        LINE | {"answers": ["Yes."]},
        LINE | {"kind": "no_harm", "answers": ["never"]},
    )
    assert len(cases) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anwers": ["nine"]}, "unknown key 'anwers': did you mean 'answers'?"),
        ({"zzz": 1}, "unknown key 'zzz': known are id, context"),
        ({"erase": ...}, "erase is missing"),
        ({"answers": "nine"}, "answers is 'nine': "),
        ({"context": 3}, "context is 3: "),
        ({"kind": "harm"}, "kind is 'harm': "),
        ({"context": ...}, "neither context and messages"),
        ({"messages": CHAT}, "both context and messages"),
        ({"question": ...}, "neither question and questions"),
        ({"questions": ["When?"]}, "both question and questions"),
        ({"question": " "}, "a question is empty"),
        ({"question": ..., "questions": []}, "questions is empty"),
        ({"question": ..., "questions": [{"question": "When?", "anwser": "nine"}]}, "did you mean 'answer'?"),
        ({"answers": []}, "has no answers"),
        ({"answers": ...}, "has no answers"),
        ({"answers": ["the"]}, "'the' is no answer"),
        ({"wrong": ["nine"]}, "'nine' is wrong and stands in every accepted answer"),
        ({"answers": ["noon"]}, "none of the answers 'noon' stands in the context"),
        ({"answers": ["ten"]}, "none of the answers 'ten' stands in the context without what is erased"),
        ({"context": " "}, "context is empty"),
        ({"erase": []}, "erase is empty"),
        ({"erase": 5}, "5 is not a span"),
        ({"erase": [9, 9]}, "[9, 9) are an empty span"),
        ({"erase": [5, 500]}, "[5, 500) lie outside the context"),
        ({"erase": "the gate closes"}, "'the gate closes' is not in the context"),
        ({"erase": "gate opens"}, "'gate opens' occurs 2 times"),
        ({"erase": {"message": 0}}, "no message 0"),
        ({"erase": [0, len(CONTEXT)]}, "nothing would remain"),
        ({"context": ..., "messages": CHAT, "erase": {"message": 3}}, "no message 3: the conversation has 3 messages"),
        ({"context": ..., "messages": CHAT, "erase": {"tool_call_id": "c1"}}, "no result of a tool call 'c1'"),
        ({"context": ..., "messages": CHAT, "erase": "opens at six"}, "'opens at six' is not in the context"),
        ({"context": ..., "messages": CHAT, "erase": {"message": True}}, "index is True"),
        ({"context": ..., "messages": []}, "messages is empty"),
        ({"context": ..., "messages": CHAT, "erase": {"message": 2}, "answers": ["ten"]}, "none of the answers 'ten'"),
        ({"context": ..., "messages": CHAT, "erase": "at ten", "answers": ["noon"]}, "none of the answers 'noon'"),
        ({"context": ..., "messages": [{"content": "a"}]}, "message 0 has no role"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(change: dict[str, Any], message: str, read: Read) -> None:
    line = {key: value for key, value in {**LINE, **change}.items() if value is not ...}
    report = refused(read, LINE, line)
    assert "malformed lines (1)" in report and "line 1:" not in report
    assert message in report.partition("line 2: ")[2]


def test_every_malformed_line_is_named_at_once(read: Read) -> None:
    report = refused(read, LINE | {"id": "a"}, "{", LINE | {"answers": []}, LINE | {"id": "a"}, "[]", LINE)
    assert [line.split(":")[0].strip() for line in report.splitlines()[1:]] == ["line 2", "line 3", "line 4", "line 5"]
    assert "line 2: no JSON" in report and "line 5: list, not an object" in report
    assert "line 4: the id 'a' is that of line 1 too" in report


def test_of_many_malformed_lines_the_first_ten_are_explained_and_all_are_numbered(read: Read) -> None:
    report = refused(read, *["{"] * 13)
    assert "malformed lines (13)" in report and "line 10:" in report and "line 11:" not in report
    assert report.endswith("and 3 more: lines 11, 12, 13")


def test_several_problems_of_a_line_stand_together(read: Read) -> None:
    report = refused(read, {"context": 3, "erase": "a", "question": "When?", "answers": ["nine"], "kinds": "leak"})
    assert "context is 3" in report and "unknown key 'kinds': did you mean 'kind'?" in report


def test_no_file_and_no_case_are_errors(read: Read, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no case file"):
        read_case_file(tmp_path / "none.jsonl")
    assert "has no case" in refused(read, "", " ")


def test_a_text_that_only_the_template_shows_is_left_to_the_run(read: Read) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "opening", "arguments": {"gate": "north"}}}
    messages = [*CHAT, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (case,) = read({"messages": messages, "erase": "north", "question": "When?", "answers": ["nine"]})
    assert case.erase == (Text("north"),)
    # So is an answer, where what is erased is.
    (case,) = read({"messages": CHAT, "erase": {"pattern": "t.n"}, "question": "When?", "answers": ["ten"]})
    assert case.queries[0].accepted == ("ten",)


def test_an_answer_prefix_is_of_the_line_or_of_one_question(read: Read) -> None:
    own = {"question": "When exactly?", "answer_prefix": "To be exact, at"}
    fields = {key: value for key, value in LINE.items() if key != "question"}
    (case,) = read(fields | {"questions": ["When?", own], "answer_prefix": "It opens at"})
    assert [query.answer_prefix for query in case.queries] == ["It opens at", "To be exact, at"]
    with pytest.raises(InputError, match=r"line 1: .*answer_prefix is '  ': give some words"):
        read(LINE | {"answer_prefix": "  "})
