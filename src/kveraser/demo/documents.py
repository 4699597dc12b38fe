"""The demo's documents: written for this project, each with a bad span that later text builds on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
        question: the words.
        answers: an answer is right when it contains one of these ...
        wrong: ... and none of these, which the bad span suggests.
    """

    question: str
    answers: list[str]
    wrong: list[str]


@dataclass(frozen=True)
class Document:
    """A context with a span that has to go.

    Attributes:
        name: short and unique.
        title: a headline.
        story: what happened, and why the span must go.
        context: the text, or None where `messages` hold a conversation.
        messages, tools: the conversation in the OpenAI format, or None.
        erase: the span, in the form that `kveraser.text.spans.selector_from_json` reads.
        questions: their answers change with the span.
        unrelated: the span never touched what these ask for.
    """

    name: str
    title: str
    story: str
    context: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    erase: Any
    questions: list[Question]
    unrelated: list[Question]


def load_documents() -> list[Document]:
    """All documents, in the order of their files' names."""
    folder = files("kveraser.demo") / "documents"
    texts = [
        entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".json")
    ]
    return [_document(json.loads(text)) for text in texts]


def _document(value: dict[str, Any]) -> Document:
    for key in ("questions", "unrelated"):
        value[key] = [Question(**question) for question in value[key]]
    return Document(**value)
