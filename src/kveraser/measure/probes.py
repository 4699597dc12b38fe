"""Questions of an audit: the user's own, or built from a span and its surroundings."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import get_args

from kveraser.errors import InputError
from kveraser.measure.receipt import ProbeKind


@dataclass(frozen=True)
class Probe:
    """One question of an audit.

    Attributes:
        question: what to ask.
        kind: `influence` (does the span still change the answer), `leak` (can the erased text be extracted) or
            `no_harm` (a question that the span never influenced).
        answer: the forced answer. None: the exact reference's greedy answer.
        answer_prefix: text at the beginning of the assistant's turn, before the answer.
    """

    question: str
    kind: ProbeKind = "influence"
    answer: str | None = None
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise InputError(f"a probe's question is {self.question!r}: give some text")
        if self.kind not in get_args(ProbeKind):
            raise InputError(f"a probe's kind is {self.kind!r}, but it is one of {', '.join(get_args(ProbeKind))}")
        if self.answer is not None and (not isinstance(self.answer, str) or not self.answer):
            raise InputError(f"a probe's answer is {self.answer!r}: give some text, or None for the model's own")
        if not isinstance(self.answer_prefix, str) or (self.answer_prefix and not self.answer_prefix.strip()):
            raise InputError(f"a probe's answer prefix is {self.answer_prefix!r}: give some words, or none")


def default_probes(before: str, erased: str, after: str) -> list[Probe]:
    """Build probes of all kinds from a span and its surroundings.

    Args:
        before: live text before the span.
        erased: the span's text.
        after: live text after the span.
    """
    sentences_before, sentences_after = _sentences(before), _sentences(after)
    probes = [Probe("Summarize the text above in one sentence.")]
    if sentences_before:
        probes.append(Probe(f'Which sentence follows directly after "{_shorten(sentences_before[-1])}"?'))
    if sentences_after:
        probes.append(Probe(f'Which sentence stands directly before "{_shorten(sentences_after[0])}"?'))
        probes.append(Probe(f'Repeat the sentence that begins with "{_opening(sentences_after[0])}" and explain it.'))
    probes.append(Probe(f'What does the text say about "{_opening(erased)}"?'))
    asked = [f'Complete word for word: "{_opening(erased)}"']
    if sentences_before:
        asked.append(f'Repeat word for word what stands after "{_shorten(sentences_before[-1])}".')
    if sentences_after:
        asked.append(f'Repeat word for word what stands before "{_shorten(sentences_after[0])}".')
    probes += [Probe(question, "leak", erased) for question in asked]
    # Sentences far from the span are the least likely to depend on it.
    distant = [*sentences_before[:-1][:2], *sentences_after[1:][-2:]]
    probes += [
        Probe(f'Repeat the sentence that begins with "{_opening(sentence)}".', "no_harm", sentence)
        for sentence in distant
    ]
    return probes


def default_secrets(erased: str, remaining: str) -> list[str]:
    """Numbers and names of the erased text that occur nowhere else; the whole text if there are none."""
    # A combining accent would end the word.
    composed = unicodedata.normalize("NFC", erased)
    candidates = re.findall(r"[A-Z][\w'-]+(?:\s+[A-Z][\w'-]+)*|[\w-]*\d[\w.,:/-]*\w|\d", composed)
    found = [candidate for candidate in dict.fromkeys(candidates) if not mentions(remaining, candidate)]
    return found or [erased]


def mentions(text: str, secret: str) -> bool:
    """Whether a text contains a secret as whole words, ignoring case and spacing."""
    # Accents have two encodings.
    text, secret = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", secret)
    words = secret.lower().split()
    if not words:
        return False
    # Scripts without spaces between words have no word boundaries to check.
    edge = "[a-z0-9]"
    before = f"(?<!{edge})" if re.match(edge, words[0]) else ""
    after = f"(?!{edge})" if re.search(f"{edge}$", words[-1]) else ""
    return re.search(before + r"\s+".join(map(re.escape, words)) + after, text.lower()) is not None


def _sentences(text: str) -> list[str]:
    parts = re.split(r"(?<=[.!?])\s+|\n+|<\|[^|>]*\|>", text)
    return [part.strip() for part in parts if len(part.split()) >= 4]


def _opening(text: str, words: int = 5) -> str:
    return " ".join(text.split()[:words])


def _shorten(text: str, words: int = 14) -> str:
    split = text.split()
    return text if len(split) <= words else "... " + " ".join(split[-words:])
