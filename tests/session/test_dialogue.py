"""Questions to a context: side questions that leave no trace, kept ones that continue it, streams and their ends."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from kveraser.errors import InputError, SessionError, SpanError
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text import chat
from kveraser.text.spans import Message, Text
from tests.sessions import EXACT, MESSAGES, TEXT, consistent, endless, far, same, state
from tests.templates import MERGING, THINKING
from tests.tiny import tiny_backbone

NEW = {"max_new_tokens": 8}


# Asking


def test_asking_leaves_every_bit_as_it_was(session: Session) -> None:
    before = state(session)
    answer = session.ask("Who is the captain?", **NEW)
    assert same(before, state(session)) and before["history"] == 0
    assert len(answer.tokens) == 8 and answer.finish_reason == "length"
    assert answer.text == str(answer) == session.backbone.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    assert session.ask("Who is the captain?", **NEW).tokens == answer.tokens
    assert session.ask("What is old?", **NEW).tokens != answer.tokens


def test_an_answer_is_that_of_the_model_to_the_rendered_conversation(dialogue: Session) -> None:
    tokenizer = dialogue.backbone.tokenizer
    asked = [*MESSAGES, {"role": "user", "content": "Where?"}]
    prompt = tokenizer(chat.render(tokenizer, asked, generation_prompt=True), return_tensors="pt")["input_ids"]
    expected = dialogue.backbone.model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    answer = dialogue.ask("Where?", **NEW)
    assert list(answer.tokens) == expected.tolist()
    assert answer.prompt_tokens == prompt.shape[1] - len(dialogue.live_tokens)
    assert answer.seconds >= answer.first_token_seconds > 0


def test_finish_reasons_tell_an_end_from_a_limit(backbone: Backbone) -> None:
    short = tiny_backbone(max_position_embeddings=120)
    filled = Session(short, messages=[{"role": "user", "content": "the " * 10}])
    assert filled.ask("Who?", max_new_tokens=500, logits_processors=(endless,)).finish_reason == "length"
    session = Session(backbone, text=TEXT)
    free = session.ask("Who?", **NEW)
    stopped = session.ask("Who?", stop=(free.text[3:5],), **NEW)
    assert stopped.finish_reason == "stop" and stopped.text == free.text[:3]


def test_a_kept_answer_continues_as_if_all_had_been_read_at_once(session: Session) -> None:
    before = session.text
    answer = session.ask("Who?", keep=True, **NEW)
    said = session.backbone.tokenizer.decode(answer.tokens)
    templated = chat.has_template(session.backbone.tokenizer)
    assert session.text.startswith(before) and "Who?" in session.text[len(before) :]
    assert session.text.endswith(said + ("<|im_end|>\n" if templated else ""))
    assert session.exact and far(session) < EXACT and consistent(session)
    assert not session.turn_open
    session.ask("And where?", keep=True, **NEW)
    assert far(session) < EXACT and consistent(session) and session.text.count(said) >= 1


def test_kept_questions_and_answers_become_messages(dialogue: Session) -> None:
    first = dialogue.ask("user", keep=True, **NEW)
    second = dialogue.ask("Where?", keep=True, **NEW)
    text, places = dialogue.transcript.text, dialogue.transcript.messages
    assert [place.role for place in places[5:]] == ["user", "assistant"] * 2
    shown = [text[place.start : place.end] for place in places]
    assert "".join(shown) == text
    assert shown[5] == "<|im_start|>user\nuser<|im_end|>\n"
    assert [text[place.content_start : place.content_end] for place in places[5:]] == [
        "user", dialogue.backbone.tokenizer.decode(first.tokens),
        "Where?", dialogue.backbone.tokenizer.decode(second.tokens),
    ]  # fmt: skip
    dialogue.erase(Message(-1), "recompute")
    dialogue.erase([Message(5), Message(-3)], "recompute")
    assert dialogue.text == "".join(shown[:5]) + shown[7]


def test_the_first_kept_exchange_about_a_document_is_two_messages(text_session: Session) -> None:
    with pytest.raises(SpanError, match="no message -1"):
        text_session.find(Message(-1))
    opening = chat.first_turn_frame(text_session.backbone.tokenizer).opening
    answer = text_session.ask("Who?", keep=True, **NEW)
    text, (user, assistant) = text_session.transcript.text, text_session.transcript.messages
    assert text[: user.start] + "<|im_start|>user\n" == opening
    assert text[user.start : user.end] == f"<|im_start|>user\n{TEXT}\n\nWho?<|im_end|>\n"
    assert text[user.content_start : user.content_end] == f"{TEXT}\n\nWho?"
    said = text_session.backbone.tokenizer.decode(answer.tokens)
    assert text[assistant.start :] == f"<|im_start|>assistant\n{said}<|im_end|>\n"
    text_session.erase(Message(-1), "recompute")
    assert text_session.text == text[: assistant.start] and far(text_session) < EXACT


def test_characters_of_several_tokens_in_a_kept_answer_are_erased_whole(text_session: Session) -> None:
    tokens = [*text_session.backbone.tokenize("🙂漢, the end")[0], 2]

    def force(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[0, tokens[said.pop(0)]] = 0.0
        return forced

    said = list(range(len(tokens)))
    answer = text_session.ask("Who?", keep=True, logits_processors=(force,))
    assert answer.text == "🙂漢, the end" and answer.finish_reason == "stop"
    text_session.erase(Text("🙂", 2), "recompute")
    assert text_session.text.endswith("\n漢, the end<|im_end|>\n")
    assert text_session.receipts[0].erased == 4


def test_an_empty_answer_can_be_kept(session: Session) -> None:
    def end(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([2]), 0.0)

    answer = session.ask("Who?", keep=True, logits_processors=(end,))
    assert answer.tokens == () and answer.text == "" and answer.finish_reason == "stop"
    assert consistent(session) and far(session) < EXACT


@pytest.mark.parametrize("template", [MERGING, THINKING], ids=["merging", "thinking"])
def test_conversations_go_on_under_templates_that_rewrite_their_past(template: str) -> None:
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = template
    session = Session(backbone, messages=[MESSAGES[1], MESSAGES[4], MESSAGES[1], MESSAGES[4]])
    before = session.text
    session.ask("Why?", keep=True, **NEW)
    session.append(messages=[{"role": "user", "content": "Well."}, {"role": "assistant", "content": "Well!"}])
    assert session.text.startswith(before) and len(session.transcript.messages) == 8
    session.erase(Message(4), "recompute")
    assert "Why?" not in session.text and far(session) < EXACT and consistent(session)


@pytest.mark.parametrize(
    ("question", "settings", "said"),
    [
        ("", {}, "the question is empty"),
        ("Who?", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("Who?", {"beams": 3}, "ask takes no such setting: .*'beams'"),
        ("\ud83d?", {}, "lone surrogate"),
    ],
)
def test_questions_that_can_not_be_asked_are_refused_at_once(
    session: Session, question: str, settings: dict[str, Any], said: str
) -> None:
    before = state(session)
    with pytest.raises(InputError, match=said):
        session.ask(question, **settings)
    with pytest.raises(InputError, match=said):
        session.stream(question, **settings)
    assert same(before, state(session))


# Streaming


def test_a_stream_says_what_ask_says(session: Session) -> None:
    stream, pieces = session.stream("Who?", **NEW), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as finished:
            answer = finished.value
            break
    assert "".join(pieces) == answer.text == session.ask("Who?", **NEW).text
    assert len(pieces) > 1


def test_while_an_answer_is_streamed_the_session_takes_no_other_call(session: Session) -> None:
    stream = session.stream("Who?", **NEW)
    before = state(session)
    next(stream)
    calls = [
        lambda: session.ask("Who?"),
        lambda: session.stream("Who?"),
        lambda: session.append("more"),
        lambda: session.erase("the"),
        lambda: session.audit(),
        lambda: session.undo(),
        lambda: session.fork(),
        lambda: session.save("never"),
    ]
    for call in calls:
        with pytest.raises(SessionError, match="an answer is being streamed: exhaust or close"):
            call()
    stream.close()
    assert same(before, state(session))
    session.ask("Who?", **NEW)


@pytest.mark.parametrize("keep", [False, True])
def test_a_stream_closed_or_dropped_early_keeps_nothing(session: Session, keep: bool) -> None:
    before = state(session)
    stream = session.stream("Who?", keep=keep, **NEW)
    next(stream)
    stream.close()
    assert same(before, state(session))
    next(session.stream("Who?", keep=keep, **NEW))
    gc.collect()
    assert same(before, state(session))


def test_only_one_of_two_streams_runs(session: Session) -> None:
    first, second = session.stream("Who?", **NEW), session.stream("Where?", **NEW)
    next(first)
    with pytest.raises(SessionError, match="being streamed"):
        next(second)
    assert len("".join(first)) > 1


def test_a_stream_started_late_asks_the_session_as_it_is_then(text_session: Session) -> None:
    late = text_session.stream("Who?", **NEW)
    text_session.ask("What is old?", keep=True, **NEW)
    expected = text_session.ask("Who?", **NEW).text
    assert "".join(late) == expected


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("keep", [False, True])
def test_a_failure_in_the_middle_of_an_answer_keeps_nothing(session: Session, keep: bool, error: Any) -> None:
    before, left = state(session), [3]

    def fail(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if not left[0]:
            raise error
        return scores

    with pytest.raises(error):
        session.ask("Who?", keep=keep, logits_processors=(fail,), **NEW)
    assert left == [0] and same(before, state(session))
    session.ask("Who?", keep=True, **NEW)
