"""Questions to a cache with their forced answers, and the test whether a text contains an answer."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import Any, Literal

from kveraser.errors import InputError
from kveraser.text import chat
from kveraser.text.tokenized import encode

CONTINUED_TOKENS = 4
"""Tokens of a continuation used as the prompt, since its first token is predicted inside the cache."""

QueryKind = Literal["influence", "leak", "no_harm"]


@dataclass(frozen=True)
class Query:
    """One question and its forced answer.

    Attributes:
        question: the user's words. None: the answer continues the context itself.
        answer: the text whose tokens are compared. Without a question, a text that follows the context.
        kind: `influence` (the span may change the answer: it contradicted the answer, or later text built on it),
            `leak` (asks for the erased text, which is the answer) or `no_harm` (the span never influenced the answer).
        accepted: a correct greedy answer contains one of these, after `normalized`. Empty: not judged.
        wrong: a correct greedy answer contains none of these.
        answer_prefix: text at the beginning of the assistant's turn, before the answer. Needs a question and a chat
            template.
    """

    question: str | None
    answer: str
    kind: QueryKind = "influence"
    accepted: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    answer_prefix: str = ""

    def tokens(self, tokenizer: Any, turn_open: bool, case: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids of the prompt and of the forced answer.

        Args:
            turn_open: the context ends inside the user's turn.
            case: id of the case, for messages.

        Raises:
            InputError: an answer without tokens, or an answer prefix without a question or a chat template.
        """
        answer = tuple(encode(tokenizer, chat.answer_text(self.answer, self.answer_prefix), follows=True)[0])
        if self.question is None:
            if self.answer_prefix:
                raise InputError(f"case {case}: an answer prefix ({self.answer_prefix!r}) needs a question: give one")
            prompt, answer = answer[:CONTINUED_TOKENS], answer[CONTINUED_TOKENS:]
        else:
            try:
                text = chat.question_text(tokenizer, self.question, turn_open, self.answer_prefix)
            except InputError as error:
                raise InputError(f"case {case}: {error}") from error
            prompt = tuple(encode(tokenizer, text, follows=True)[0])
        if not answer:
            raise InputError(f"case {case}: the answer {self.answer!r} has no tokens to compare: make it longer")
        return prompt, answer


def normalized(text: str) -> str:
    """Text as SQuAD compares answers (arXiv:1606.05250): lower case, no punctuation, no articles, single spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def contains(text: str, value: str) -> bool:
    """Whether the words of `value` occur in `text`, both normalized."""
    return f" {normalized(value)} " in f" {normalized(text)} "
