"""The demo's documents: complete, findable, of the promised length, and with a later text that leans on the span."""

from __future__ import annotations

import re

import pytest
from transformers import AutoTokenizer

from kveraser.demo.documents import Document, load_documents
from kveraser.errors import SpanError
from kveraser.model.backbone import Backbone
from kveraser.model.bundled import bundled_backbone_folder
from kveraser.session.session import Session
from kveraser.text.spans import selector_from_json
from tests.tiny import tiny_backbone, tiny_model

DOCUMENTS = load_documents()
LONG = 8192
"""Positions of a tiny model that reads a document nearly letter by letter."""

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)


@pytest.fixture(scope="module")
def long_backbone() -> Backbone:
    return tiny_backbone(num_hidden_layers=1, max_position_embeddings=LONG)


@pytest.fixture(scope="module")
def bundled_tokens() -> Backbone:
    """The bundled tokenizer before a tiny random model."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_backbone_folder())
    return Backbone(
        tiny_model(num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=LONG), tokenizer, "tiny"
    )


def open_session(backbone: Backbone, document: Document) -> Session:
    return Session(backbone, text=document.context, messages=document.messages, tools=document.tools)


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_four_with_names_of_their_own() -> None:
    names = [document.name for document in DOCUMENTS]
    assert names == ["support", "handbook", "preference", "injection"]
    assert len({document.title for document in DOCUMENTS}) == len(DOCUMENTS)


@each_document
def test_document_is_complete(document: Document) -> None:
    assert (document.context is None) != (document.messages is None)
    assert len(re.findall(r"[.!?](?=\s|$)", document.story)) == 2
    assert 2 <= len(document.questions) <= 3
    assert 1 <= len(document.unrelated) <= 2
    asked = [question.question for question in [*document.questions, *document.unrelated]]
    assert len(set(asked)) == len(asked)
    assert all(question.answers for question in [*document.questions, *document.unrelated])
    assert all(question.wrong for question in document.questions)


@each_document
def test_span_is_one_and_holds_the_wrong_answers(document: Document, long_backbone: Backbone) -> None:
    session = open_session(long_backbone, document)
    ((span, text),) = session.find(selector_from_json(document.erase))
    before = session.transcript.text[session.transcript.body_start : session.transcript.offsets[span.start][0]]
    after = session.transcript.text[session.transcript.offsets[span.end - 1][1] :]
    for question in document.questions:
        assert any(words(wrong) in words(text) for wrong in question.wrong), question
        # What is right stands outside the span, or exact erasing could not bring it back.
        assert any(words(answer) in words(before + after) for answer in question.answers), question
        assert not any(words(wrong) in words(before) for wrong in question.wrong), question
    assert len(after) > len(text)


@each_document
def test_unrelated_answers_stand_outside_the_span_and_are_not_wrong_ones(
    document: Document, long_backbone: Backbone
) -> None:
    session = open_session(long_backbone, document)
    ((_, text),) = session.find(selector_from_json(document.erase))
    wrong = {words(wrong) for question in document.questions for wrong in question.wrong}
    for question in document.unrelated:
        for answer in question.answers:
            assert words(answer) in words(session.text)
            assert words(answer) not in words(text)
            assert not any(bad in words(answer) for bad in wrong)


@each_document
def test_span_can_be_erased_and_is_then_gone(document: Document, long_backbone: Backbone) -> None:
    session = open_session(long_backbone, document)
    span = selector_from_json(document.erase)
    receipt = session.erase(span, "mask")
    assert receipt.text[0] not in session.text
    with pytest.raises(SpanError):
        session.find(span)


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if document.messages], ids=lambda d: d.name)
def test_tool_results_answer_calls(document: Document) -> None:
    assert document.messages is not None
    calls = [call["id"] for message in document.messages for call in message.get("tool_calls", [])]
    results = [message["tool_call_id"] for message in document.messages if message["role"] == "tool"]
    assert calls == results
    assert len(set(calls)) == len(calls)
    described = {tool["function"]["name"] for tool in document.tools or []}
    called = {call["function"]["name"] for message in document.messages for call in message.get("tool_calls", [])}
    assert called == described


@pytest.mark.backbone
@each_document
def test_length_by_the_bundled_tokenizer(document: Document, bundled_tokens: Backbone) -> None:
    session = open_session(bundled_tokens, document)
    assert 600 <= len(session.transcript.tokens) <= 2000
    ((span, _),) = session.find(selector_from_json(document.erase))
    assert 40 <= len(span) <= 250
    if isinstance(document.erase, dict) and "tool_call_id" in document.erase:
        assert len(span) >= 80
