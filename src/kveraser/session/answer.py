"""Answer questions to a session, which leave it unchanged or become part of the conversation."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from kveraser.model.decode import Decoded, Decoding, stream_text, text_with_offsets
from kveraser.session.state import SessionState
from kveraser.text import chat
from kveraser.text.spans import MessageRange
from kveraser.text.tokenized import TokenizedText, tokenize


@dataclass(frozen=True)
class Answer:
    """A decoded answer.

    Attributes:
        text: the answer, without end markers.
        tokens: its token ids.
        finish_reason: `stop` (end token or stop text) or `length`.
        prompt_tokens: number of tokens run before the first token of the answer.
        first_token_seconds, seconds: wall-clock time to the first token, and in total.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    first_token_seconds: float
    seconds: float

    def __str__(self) -> str:
        return self.text


def question_tokens(state: SessionState, question: str, answer_prefix: str = "") -> TokenizedText:
    """Tokenize a question for the end of the session's context, with the chat template's role markers.

    Raises:
        InputError: an empty question, or an answer prefix without a chat template.
        ContextLengthError: not enough positions.
    """
    tokenizer = state.backbone.tokenizer
    text = chat.question_text(tokenizer, question, state.turn_open, answer_prefix, state.options)
    prompt = tokenize(tokenizer, text, follows=True)
    state.backbone.check_room(state.cache.next_position, len(prompt.tokens))
    return prompt


def stream(state: SessionState, question: str, keep: bool, decoding: Decoding) -> Generator[str, None, Answer]:
    """Yield an answer's text in pieces and return the `Answer`. An early close keeps nothing.

    Raises:
        ContextLengthError, InputError, SessionError: the session is as before.
    """
    state.check_idle()
    prompt = question_tokens(state, question)
    state.streaming = True
    before, started, first, kept = state.checkpoint(), time.perf_counter(), 0.0, False
    try:
        pieces = stream_text(state.backbone, state.cache, prompt.tokens, decoding)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as finished:
                decoded: Decoded = finished.value
                break
            first = first or time.perf_counter() - started
            yield piece
        if keep:
            _keep(state, question, prompt, decoded.tokens, before.length)
            state.history.append(before)
            kept = True
    finally:
        if not kept:
            state.restore(before)
        state.streaming = False
    return Answer(
        text=decoded.text,
        tokens=decoded.tokens,
        finish_reason="stop" if decoded.ended else "length",
        prompt_tokens=len(prompt.tokens),
        first_token_seconds=first,
        seconds=time.perf_counter() - started,
    )


def _keep(state: SessionState, question: str, prompt: TokenizedText, tokens: Sequence[int], start: int) -> None:
    """Make the question and the decoded answer part of the conversation.

    Args:
        start: the cache's length before the question.
    """
    tokenizer, transcript = state.backbone.tokenizer, state.transcript
    text, offsets = text_with_offsets(tokenizer, tokens, prompt.tokens[-1])
    answer = TokenizedText(text, tuple(tokens), tuple(offsets))
    templated = chat.has_template(tokenizer)
    ending = tokenize(tokenizer, chat.reply_closing(tokenizer, state.options) if templated else "", follows=True)
    said = [*prompt.tokens, *answer.tokens, *ending.tokens]
    # Decoding leaves the answer's last token out of the cache.
    state.backbone.extend(state.cache, said[state.cache.length - start :])
    state.cache.set_tokens(start, range(len(transcript.tokens), len(transcript.tokens) + len(said)))
    messages = _exchange(state, question, prompt.text, answer.text, ending.text) if templated else []
    state.adopt(prompt, answer, ending)
    transcript.messages += messages
    state.turn_open = False


def _exchange(state: SessionState, question: str, prompt: str, answer: str, after: str) -> list[MessageRange]:
    """Returns the message ranges of a question and its answer, as appended to the transcript."""
    tokenizer, base = state.backbone.tokenizer, len(state.transcript.text)
    opening = chat.reply_opening(tokenizer, state.options)
    end = base + len(prompt) - len(opening)
    if state.turn_open:
        # The document and the question share the first turn.
        words = state.transcript.body_start, base + prompt.index(question) + len(question)
        start = chat.first_turn_start(tokenizer, state.options)
        user = MessageRange("user", *(words if start is None else (start, end)), *words, None, start is not None)
    else:
        asked = [{"role": "user", "content": question}]
        user = chat.moved(chat.continuation(tokenizer, asked, options=state.options)[1][0], base)
    said = base + len(prompt), base + len(prompt) + len(answer)
    return [user, MessageRange("assistant", end, said[1] + len(after), *said)]
