"""Contexts: reading, appending, going back, forking; and what they refuse, leaving all as it was."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from kveraser.errors import BackboneError, ContextLengthError, EraserError, InputError, SessionError
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text import chat
from kveraser.text.spans import Text
from tests.sessions import EXACT, MESSAGES, TEXT, consistent, endless, far, same, state
from tests.tiny import attach_random_eraser, random_tokens, tiny_backbone

NEW = {"max_new_tokens": 8}


# Reading


def test_a_document_opens_the_first_user_turn(text_session: Session) -> None:
    frame = chat.first_turn_frame(text_session.backbone.tokenizer)
    assert text_session.text == frame.opening + TEXT
    assert text_session.turn_open and text_session.exact
    assert far(text_session) == 0 and consistent(text_session)


def test_a_conversation_is_rendered_by_the_template(dialogue: Session) -> None:
    rendered = chat.render(dialogue.backbone.tokenizer, MESSAGES)
    assert dialogue.text == rendered and "shelf 44" in rendered
    assert [place.role for place in dialogue.transcript.messages] == [one["role"] for one in MESSAGES]
    assert not dialogue.turn_open and dialogue.exact and far(dialogue) == 0


def test_without_a_template_the_text_stands_alone(plain_backbone: Backbone) -> None:
    session = Session(plain_backbone, text=TEXT)
    assert session.text == TEXT and not session.turn_open
    assert session.live_tokens == plain_backbone.tokenize(TEXT)[0]


def test_a_beginning_marker_of_the_tokenizer_stands_in_front(plain_backbone: Backbone) -> None:
    backbone = tiny_backbone(chat=False)
    backbone.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    session = Session(backbone, text=TEXT)
    assert session.live_tokens == [0, *plain_backbone.tokenize(TEXT)[0]]
    assert session.text == TEXT
    session.erase("The ship left at noon.", "recompute")
    assert session.live_tokens[0] == 0 and far(session) < EXACT


def test_progress_is_told_during_prefill(backbone: Backbone) -> None:
    told: list[tuple[int, int]] = []
    session = Session(backbone, text="the ship " * 150, progress=lambda done, total: told.append((done, total)))
    count = len(session.live_tokens)
    assert told == [(512, count), (count, count)] and count > 512


def test_finding_shows_the_snapped_text_and_erases_nothing(session: Session) -> None:
    before = state(session)
    ((span, text),) = session.find(Text("is in", 1) if "Rome" in session.text else "captain")
    assert "is in" in text or "captain" in text
    assert session.transcript.text_of(span) == text
    assert same(before, state(session))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, InputError, "either text or messages"),
        ({"text": "a", "messages": MESSAGES}, InputError, "either text or messages"),
        ({"text": ""}, InputError, "the text is empty"),
        ({"text": " \n"}, InputError, "the text is empty"),
        ({"text": b"abc"}, InputError, r"not a text \(b'abc'\)"),
        ({"text": "ab\ud83dcd"}, InputError, r"lone surrogate at \d+ \('\\ud83d'\)"),
        ({"messages": []}, InputError, "the conversation is empty"),
        ({"messages": [{"role": "user"}]}, InputError, "message 0"),
        ({"text": "a", "device": "cpu"}, InputError, "give them to Backbone.load"),
        ({"text": "a", "dtype": "float32"}, InputError, "give them to Backbone.load"),
        ({"text": "a", "eraser": "nowhere"}, EraserError, "no eraser at nowhere"),
        ({"text": "a" * 1100}, ContextLengthError, "1024"),
    ],
)
def test_what_can_not_be_read_is_refused(
    backbone: Backbone, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Session(backbone, **arguments)


def test_messages_need_a_template(plain_backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no chat template"):
        Session(plain_backbone, messages=MESSAGES)


def test_a_backbone_may_be_given_by_name_with_its_eraser(tmp_path: Any) -> None:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(tmp_path / "model")
    backbone.tokenizer.save_pretrained(tmp_path / "model")
    attach_random_eraser(backbone).save_pretrained(tmp_path / "eraser")
    loaded = Session(tmp_path / "model", text=TEXT, eraser=tmp_path / "eraser", dtype="float32", device="cpu")
    given = Session(tiny_backbone(), text=TEXT, eraser=tmp_path / "eraser")
    assert loaded.backbone.eraser is not None and given.backbone.eraser is not None
    assert loaded.ask("Who?", **NEW).tokens == given.ask("Who?", **NEW).tokens
    with pytest.raises(BackboneError, match="no-such-folder"):
        Session("./no-such-folder", text=TEXT)


# Adding and going back


def test_appending_continues_as_if_all_had_been_read_at_once(session: Session) -> None:
    before = state(session)
    if "Rome" in session.text:
        session.append(messages=[{"role": "user", "content": "More."}, {"role": "assistant", "content": "Less."}])
        assert [place.role for place in session.transcript.messages[-2:]] == ["user", "assistant"]
        assert session.text == chat.render(session.backbone.tokenizer, [
            *MESSAGES, {"role": "user", "content": "More."}, {"role": "assistant", "content": "Less."}
        ])  # fmt: skip
    else:
        session.append(" The sea is calm.")
        assert session.text.endswith("the ship is old. The sea is calm.")
    assert session.exact and far(session) < EXACT and consistent(session)
    session.undo()
    assert same(before, state(session))


def test_what_can_not_be_appended_is_refused(backbone: Backbone, plain_backbone: Backbone) -> None:
    document, dialogue = Session(backbone, text=TEXT), Session(backbone, messages=MESSAGES)
    plain = Session(plain_backbone, text=TEXT)
    cases: list[tuple[Session, dict[str, Any], str]] = [
        (document, {}, "either text or messages"),
        (document, {"text": "a", "messages": MESSAGES}, "either text or messages"),
        (document, {"text": ""}, "nothing to append"),
        (document, {"text": 5}, "the text is 5"),
        (document, {"text": "a\ud83d"}, "lone surrogate at 1"),
        (document, {"messages": MESSAGES}, "this is a text session"),
        (plain, {"messages": MESSAGES}, "this is a text session"),
        (dialogue, {"text": "a"}, "this is a conversation"),
        (dialogue, {"messages": []}, "nothing to append"),
        (dialogue, {"messages": "a"}, "give a list of messages"),
        (dialogue, {"messages": [MESSAGES[1], {"role": "user"}]}, "message 1"),
    ]
    for session, arguments, said in cases:
        before = state(session)
        with pytest.raises(InputError, match=said):
            session.append(**arguments)
        assert same(before, state(session))


def test_what_no_longer_fits_leaves_the_session_as_it_was() -> None:
    backbone = tiny_backbone(chat=False, max_position_embeddings=60)
    text = backbone.tokenizer.decode(random_tokens(30))
    session = Session(backbone, text=text)
    before = state(session)
    with pytest.raises(ContextLengthError, match="beyond the 60 positions of tiny-llama"):
        session.append("the " * 40)
    with pytest.raises(ContextLengthError, match="60"):
        session.ask("Which of all the things? " * 3)
    with pytest.raises(ContextLengthError, match="60"):
        session.stream("Which of all the things? " * 3)
    assert same(before, state(session))


def test_a_kept_answer_whose_closing_does_not_fit_is_not_kept() -> None:
    backbone = tiny_backbone(max_position_embeddings=130)
    session = Session(backbone, messages=[{"role": "user", "content": "the "}])
    before = state(session)
    assert len(session.ask("Who?", max_new_tokens=500, logits_processors=(endless,)).tokens) > 9
    with pytest.raises(ContextLengthError):
        session.ask("Who?", keep=True, max_new_tokens=500, logits_processors=(endless,))
    assert same(before, state(session))


def test_undo_goes_back_any_number_of_steps_and_no_further(session: Session) -> None:
    states = [state(session)]
    session.ask("Who?", keep=True, **NEW)
    states.append(state(session))
    session.erase(Text("ship", 1) if "ship" in session.text else "Rome", "shift")
    states.append(state(session))
    session.ask("Where?", keep=True, **NEW)
    states.append(state(session))
    assert not same(states[0], states[1]) and not same(states[1], states[2]) and not same(states[2], states[3])
    with pytest.raises(SessionError, match="can't undo 4 steps: 3 can be undone"):
        session.undo(4)
    for steps in (0, -1):
        with pytest.raises(SessionError, match=f"can't undo {steps} steps"):
            session.undo(steps)
    assert same(states[3], state(session))
    session.undo()
    assert same(states[2], state(session))
    session.undo(2)
    assert same(states[0], state(session))
    with pytest.raises(SessionError, match="can't undo 1 steps: 0 can be undone"):
        session.undo()


def test_a_fork_and_its_origin_never_touch_each_other(session: Session) -> None:
    session.erase("is", "mask") if session.text.count("is") == 1 else session.erase(Text("is", 1), "mask")
    fork = session.fork()
    assert type(fork) is Session
    start = state(session)
    assert same(start, state(fork))
    fork.ask("Who?", keep=True, **NEW)
    fork.erase(Text("in", 1), "recompute")
    assert same(start, state(session))
    forked = state(fork)
    assert not same(start, forked)
    session.undo()
    session.ask("Where?", keep=True, **NEW)
    session.erase(Text("in", 1), "zero_value")
    assert same(forked, state(fork))
    fork.undo(3)
    assert fork.receipts == [] and fork.exact and far(fork) < EXACT
