"""Cases of the benchmark: cut into tokens as a session and training cut them, told apart by all that they say."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest

from evaluation.suites.attack import Attack
from evaluation.suites.base import from_training_case
from kveraser.errors import InputError
from kveraser.measure.case import (
    BenchCase,
    Cell,
    context_id,
    tokenize_case,
    tokenize_context,
)
from kveraser.measure.questions import CONTINUED_TOKENS, Query
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text import chat
from kveraser.text.spans import Characters, Message, Pattern, Selector, Text, ToolCall
from kveraser.text.tokenized import encode
from kveraser.training.cases import Case, tokenize
from tests.bench_cases import CONTEXT, QUERIES, SPAN, bench_case
from tests.sessions import MESSAGES, TEXT


@pytest.mark.parametrize("text", [TEXT, CONTEXT, "Just 🙂."])
def test_a_document_is_tokenized_as_a_session_does(text: str, backbone: Backbone, plain_backbone: Backbone) -> None:
    for one, turn_open in ((backbone, True), (plain_backbone, False)):
        context, session = tokenize_context(one.tokenizer, text), Session(one, text=text)
        assert context.transcript == session.transcript and context.turn_open == session.turn_open == turn_open
        assert context.tokens == session.live_tokens


def test_a_conversation_is_tokenized_as_a_session_does(backbone: Backbone) -> None:
    context, session = tokenize_context(backbone.tokenizer, tuple(MESSAGES)), Session(backbone, messages=MESSAGES)
    assert context.transcript == session.transcript and not context.turn_open and not session.turn_open
    assert len(context.transcript.messages) == len(MESSAGES)


@pytest.mark.parametrize(
    ("context", "erase"),
    [
        (TEXT, (Text("The captain is Ada."), Characters(0, 8))),
        (TEXT, (Pattern("ship", occurrence=2), Text("ship", occurrence=1), Characters(4, 20))),
        (tuple(MESSAGES), (Message(-1), ToolCall("call_1", keep_turn=True))),
    ],
)
def test_spans_are_those_that_a_session_finds(
    backbone: Backbone, context: str | tuple[dict[str, Any], ...], erase: tuple[Selector, ...]
) -> None:
    one = tokenize_context(backbone.tokenizer, context)
    cut = tokenize_case(backbone.tokenizer, one, bench_case(context=context, erase=erase))
    session = Session(backbone, text=context) if isinstance(context, str) else Session(backbone, messages=context)
    assert cut.spans == tuple(span for span, _ in session.find(list(erase)))
    assert cut.erased == sum(span.end - span.start for span in cut.spans) > 0 and len(cut.spans) == 2
    assert all(one.transcript.live)


def test_questions_continue_the_turn_that_the_context_leaves_open(backbone: Backbone) -> None:
    for given, turn_open in ((TEXT, True), (tuple(MESSAGES), False)):
        context = tokenize_context(backbone.tokenizer, given)
        erase: Selector = Text("noon") if turn_open else Message(1)
        cut = tokenize_case(backbone.tokenizer, context, bench_case(context=given, erase=(erase,)))
        for query, asked in zip(QUERIES[:3], cut.asked[:3], strict=True):
            assert query.question is not None
            prompt = chat.question_text(backbone.tokenizer, query.question, turn_open)
            assert list(asked.prompt) == encode(backbone.tokenizer, prompt)[0]
            assert list(asked.answer) == encode(backbone.tokenizer, query.answer)[0]
        tokens = encode(backbone.tokenizer, QUERIES[3].answer)[0]
        assert [*cut.asked[3].prompt, *cut.asked[3].answer] == tokens and len(cut.asked[3].prompt) == CONTINUED_TOKENS


def test_a_training_case_is_cut_as_training_cuts_it(backbone: Backbone, plain_backbone: Backbone) -> None:
    start = CONTEXT.index(SPAN)
    case = Case("t/1", "needle", CONTEXT, (start, start + len(SPAN)), QUERIES)
    cell = Cell("heldout", "needle", 120, 20)
    for one in (backbone, plain_backbone):
        expected, made = tokenize(one.tokenizer, case), from_training_case(case, cell)
        assert (made.id, made.cell, made.queries) == ("t/1", cell, QUERIES)
        context = tokenize_context(one.tokenizer, made.context)
        cut = tokenize_case(one.tokenizer, context, made)
        assert tuple(context.tokens) == (*expected.prefix, *expected.span, *expected.suffix)
        assert [(span.start, span.end) for span in cut.spans] == [
            (len(expected.prefix), len(expected.prefix) + len(expected.span))
        ]
        assert [(asked.prompt, asked.answer) for asked in cut.asked] == list(expected.queries)


@pytest.mark.parametrize(
    ("query", "judged"),
    [
        (Query("When?", "nine"), False),
        (Query("When?", "nine", wrong=("ten",)), False),
        (Query("When?", "nine", accepted=("nine",)), True),
        (Query("When?", "nine", "leak"), False),
        (Query("When?", "nine", "leak", wrong=("nine",)), True),
        (Query(None, "It left at nine.", "no_harm", accepted=("nine",)), True),
    ],
)
def test_a_greedy_answer_is_wanted_where_it_can_be_judged(backbone: Backbone, query: Query, judged: bool) -> None:
    context = tokenize_context(backbone.tokenizer, CONTEXT)
    (asked,) = tokenize_case(backbone.tokenizer, context, bench_case(queries=[query])).asked
    assert asked.judged == judged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"erase": (Text("It was painted red."),)}, "case a: 'It was painted red.' is not in the context"),
        ({"erase": ()}, "case a: no span given"),
        ({"erase": (Text(CONTEXT),)}, "case a: the span is the whole context"),
        ({"erase": (Message(0),)}, "case a: no message 0"),
        ({"queries": ()}, "case a asks nothing"),
        ({"queries": (Query("When?", ""),)}, "case a: the answer '' has no tokens"),
        ({"queries": (Query(None, " It"),)}, "case a: the answer ' It' has no tokens"),
    ],
)
def test_cases_that_can_not_be_measured_are_named(backbone: Backbone, change: dict[str, Any], said: str) -> None:
    context = tokenize_context(backbone.tokenizer, CONTEXT)
    with pytest.raises(InputError, match=said):
        tokenize_case(backbone.tokenizer, context, replace(bench_case(), **change))


@pytest.mark.parametrize("context", ["", " \n", (), ({"role": "poet", "content": 5},)])
def test_a_context_without_text_is_refused(backbone: Backbone, context: Any) -> None:
    with pytest.raises(InputError):
        tokenize_context(backbone.tokenizer, context)


def test_a_fingerprint_is_of_all_that_a_case_says() -> None:
    attack = Attack(("",), ("The colour?",), ("",), SPAN, "blue", 0)
    case = bench_case(attack=attack)
    others: list[BenchCase] = [
        replace(case, id="b"),
        replace(case, cell=replace(case.cell, depth=0.5)),
        replace(case, context=f"{CONTEXT} "),
        replace(case, erase=(Text(SPAN, occurrence=1),)),
        replace(case, queries=case.queries[:2]),
        replace(case, queries=(replace(case.queries[0], wrong=("six",)), *case.queries[1:])),
        replace(case, attack=replace(attack, seed=1)),
        replace(case, attack=None),
    ]
    prints = [one.fingerprint for one in (case, *others)]
    assert len(set(prints)) == len(prints)
    assert bench_case(attack=attack).fingerprint == pickle.loads(pickle.dumps(case)).fingerprint == case.fingerprint


def test_equal_contexts_have_one_id() -> None:
    messages = tuple(dict(message) for message in MESSAGES)
    assert context_id(tuple(MESSAGES)) == context_id(messages) != context_id(messages[:-1])
    assert context_id(CONTEXT) == context_id(" ".join(CONTEXT.split(" "))) != context_id(TEXT)


def test_a_cell_says_what_it_is_of() -> None:
    assert str(Cell("niah", "needle", 512, depth=0.0)) == "niah/needle, length 512, spans 1, depth 0.0"
    assert str(Cell("longqa", "all", spans=3, distance=64)) == "longqa/all, spans 3, distance 64"
