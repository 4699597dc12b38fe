"""Asking: questions to a context in a live cache, which leave it as it was or become part of the conversation."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from kveraser.errors import InputError
from kveraser.model.decode import Decoded, Decoding, stream_text, text_with_offsets
from kveraser.session.context import Context
from kveraser.text import chat
from kveraser.text.spans import MessageRange
from kveraser.text.tokenized import TokenizedText, tokenize


@dataclass(frozen=True)
class Answer:
    """A decoded answer.

    Attributes:
        text: the answer, without end markers.
        tokens: its token ids.
        finish_reason: `stop` (the model ended, or a stop text came) or `length`.
        prompt_tokens: tokens run before the first one of the answer.
        first_token_seconds, seconds: wall-clock time to the first token, and in all.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    def __str__(self) -> str:
        return self.text


class Dialogue(Context):
    """A context that can be asked. Takes the arguments of `Context`."""

    def ask(self, question: str, *, keep: bool = False, **decoding: Any) -> Answer:
        """Ask about the context.

        Args:
            question: the user's words; the chat template's markers are added.
            keep: continue the conversation with question and answer; otherwise the session stays as it was, so that
                one question never colours the next.
            decoding: fields of `Decoding`: max_new_tokens, do_sample, temperature, top_p, stop, seed, ...

        Raises:
            ContextLengthError, InputError, SessionError: the session is as before.
        """
        with closing(self.stream(question, keep=keep, **decoding)) as stream:
            while True:
                try:
                    next(stream)
                except StopIteration as finished:
                    answer: Answer = finished.value
                    return answer

    def stream(self, question: str, *, keep: bool = False, **decoding: Any) -> Generator[str, None, Answer]:
        """As `ask`, yielding the answer's text in pieces; the generator's return value is the `Answer`.

        Until it is exhausted or closed, the session takes no other call. Closed early, nothing is kept.
        """
        try:
            settings = Decoding(**decoding)
        except TypeError as error:
            raise InputError(f"ask takes no such setting: {error}") from error
        self._check_idle()
        # Bad input is refused here; the generator, which may be started much later, prepares the question again.
        self._prompt(question)
        return self._stream(question, keep, settings)

    def _prompt(self, question: str, answer_prefix: str = "") -> TokenizedText:
        """The question as it is appended to the cache as it is now."""
        tokenizer = self.backbone.tokenizer
        text = chat.question_text(tokenizer, question, self.turn_open, answer_prefix, self.options)
        prompt = tokenize(tokenizer, text, follows=True)
        self.backbone.check_room(self.cache.next_position, len(prompt.tokens))
        return prompt

    def _stream(self, question: str, keep: bool, settings: Decoding) -> Generator[str, None, Answer]:
        self._check_idle()
        prompt = self._prompt(question)
        self._streaming = True
        marks, started, first, kept = self._marks(), time.perf_counter(), 0.0, False
        try:
            stream = stream_text(self.backbone, self.cache, prompt.tokens, settings)
            while True:
                try:
                    piece = next(stream)
                except StopIteration as finished:
                    decoded: Decoded = finished.value
                    break
                first = first or time.perf_counter() - started
                yield piece
            if keep:
                self._keep(question, prompt, decoded.tokens)
                self._history.append(marks)
                kept = True
        finally:
            if not kept:
                self._restore(marks)
            self._streaming = False
        return Answer(
            text=decoded.text,
            tokens=decoded.tokens,
            finish_reason="stop" if decoded.ended else "length",
            prompt_tokens=len(prompt.tokens),
            first_token_seconds=first,
            seconds=time.perf_counter() - started,
        )

    def _keep(self, question: str, prompt: TokenizedText, tokens: Sequence[int]) -> None:
        """Make the question and answer just decoded part of the conversation."""
        tokenizer = self.backbone.tokenizer
        text, offsets = text_with_offsets(tokenizer, tokens, prompt.tokens[-1])
        answer = TokenizedText(text, tuple(tokens), tuple(offsets))
        templated = chat.has_template(tokenizer)
        ending = tokenize(tokenizer, chat.reply_closing(tokenizer, self.options) if templated else "", follows=True)
        # Decoding leaves its last token out of the cache.
        said = [*prompt.tokens, *answer.tokens, *ending.tokens]
        self.backbone.extend(self.cache, said[self.cache.length - len(self.slots) :])
        messages = self._exchanged(question, prompt.text, answer.text, ending.text) if templated else []
        self._adopt(prompt, answer, ending)
        self.transcript.messages += messages
        self.turn_open = False

    def _exchanged(self, question: str, prompt: str, answer: str, after: str) -> list[MessageRange]:
        """Where a question and its answer stand as messages, once they have been added to the transcript."""
        tokenizer, base = self.backbone.tokenizer, len(self.transcript.text)
        opening = chat.reply_opening(tokenizer, self.options)
        end = base + len(prompt) - len(opening)
        if self.turn_open:
            # The document and the question share the first turn.
            words = self.transcript.body_start, base + prompt.index(question) + len(question)
            start = chat.first_turn_start(tokenizer, self.options)
            user = MessageRange("user", *(words if start is None else (start, end)), *words, None, start is not None)
        else:
            asked = [{"role": "user", "content": question}]
            user = chat.moved(chat.continuation(tokenizer, asked, options=self.options)[1][0], base)
        said = base + len(prompt), base + len(prompt) + len(answer)
        return [user, MessageRange("assistant", end, said[1] + len(after), *said)]
