"""Erasing from a session: by every selector, alone and with everything else a session does, and what a receipt says."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest

from kveraser.cache.editable import Journal
from kveraser.errors import SessionError
from kveraser.methods import METHODS
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Characters, Message, Pattern, Text, Tokens, ToolCall
from tests.sessions import EXACT, MESSAGES, TEXT, consistent, far, same, state
from tests.tiny import attach_random_eraser, tiny_backbone

NEW = {"max_new_tokens": 6}
SPAN = "She keeps the log 🙂 in the cabin."
APPROXIMATE = tuple(name for name in METHODS if name != "recompute")


@pytest.fixture
def session(backbone: Backbone) -> Session:
    return Session(backbone, text=TEXT)


@pytest.fixture
def dialogue(backbone: Backbone) -> Session:
    return Session(backbone, messages=MESSAGES)


# What is erased


THE_LOG = Characters(TEXT.index("the log"), TEXT.index("the log") + len("the log"))


@pytest.mark.parametrize(
    ("what", "left", "spans"),
    [
        (SPAN, TEXT.replace(SPAN, ""), 1),
        (Text("ship", 2), TEXT.replace("the ship is", "the  is"), 1),
        (Pattern(r"\bship\b"), TEXT.replace("ship", ""), 2),
        (Characters(0, 22), TEXT[22:], 1),
        (["Ada", Text("12")], TEXT.replace("Ada", "").replace("12", ""), 2),
        ([Pattern(r"\d+"), "of 12 trusts"], TEXT.replace("of 12 trusts", ""), 1),
        (["keeps the", THE_LOG, "left at"], TEXT.replace("keeps the log", "").replace("left at", ""), 2),
    ],
    ids=str,
)
def test_recompute_leaves_the_text_without_the_spans(session: Session, what: Any, left: str, spans: int) -> None:
    opening = session.text.removesuffix(TEXT)
    receipt = session.erase(what, "recompute")
    assert session.text == opening + left != opening + TEXT
    assert len(receipt.spans) == len(receipt.text) == spans
    assert receipt.exact and session.exact and far(session) < EXACT and consistent(session)


@pytest.mark.parametrize(
    ("what", "gone"),
    [
        (Message(1), "<|im_start|>user\nWhere is my parcel?<|im_end|>\n"),
        (Message(-1), "<|im_start|>assistant\nIt waits in that city.<|im_end|>\n"),
        (ToolCall("call_1"), "<|im_start|>tool\nIt is in Rome, shelf 44.<|im_end|>\n"),
        (Message(3, keep_turn=True), "It is in Rome, shelf 44."),
    ],
    ids=str,
)
def test_a_message_is_erased_as_if_it_had_never_been_sent(dialogue: Session, what: Any, gone: str) -> None:
    before = dialogue.text
    receipt = dialogue.erase(what, "recompute")
    assert receipt.text == (gone,) and dialogue.text == before.replace(gone, "")
    assert far(dialogue) < EXACT
    if what == Message(-1):
        never = Session(dialogue.backbone, messages=MESSAGES[:-1])
        assert never.live_tokens == dialogue.live_tokens
        assert never.ask("Where?", **NEW).tokens == dialogue.ask("Where?", **NEW).tokens


@pytest.mark.parametrize("method", METHODS)
def test_two_spans_at_once_equal_one_after_the_other_for_every_method(method: str) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    at_once, in_turn = Session(backbone, text=TEXT), Session(backbone, text=TEXT)
    receipt = at_once.erase([SPAN, "The ship left"], method, force=True)
    assert len(receipt.spans) == 2 and receipt.erased == sum(end - start for start, end in receipt.spans)
    in_turn.erase("The ship left", method, force=True)
    in_turn.erase(SPAN, method, force=True)
    assert at_once.live_tokens == in_turn.live_tokens and consistent(at_once) and consistent(in_turn)
    if method == "recompute":
        assert far(at_once) < EXACT and far(in_turn) < EXACT
        # In one pass, which does not read the second span again.
        assert receipt.recomputed == len(at_once.live_tokens) - receipt.spans[0][0]
        in_turn.undo(2)
        in_turn.erase(SPAN, method)
        in_turn.erase("The ship left", method)
        assert far(in_turn) < EXACT and in_turn.live_tokens == at_once.live_tokens
    else:
        assert not receipt.exact and far(at_once) > EXACT


@pytest.mark.parametrize("method", ["recompute", "repair(4)", "shift", "mask", "zero_value", "erratum"])
def test_erasing_works_before_between_and_after_answers(session: Session, method: str) -> None:
    states = [state(session)]
    session.erase("The ship left at noon.", method)
    first = session.ask("Who?", keep=True, **NEW)
    session.erase([SPAN, session.backbone.tokenizer.decode(first.tokens)], method)
    states.append(state(session))
    second = session.ask("Where?", keep=True, **NEW)
    session.erase(Message(-1), method)
    assert consistent(session) and session.exact is (method == "recompute")
    assert all(gone not in session.text for gone in ("noon", "log", session.backbone.tokenizer.decode(second.tokens)))
    session.erase("Lisbon", "recompute")
    # Traces of every earlier approximation are gone with it.
    assert session.exact and far(session) < EXACT
    session.undo(3)
    assert same(states[1], state(session))
    session.undo(3)
    assert same(states[0], state(session))


def test_the_answer_changes_to_that_of_the_exact_reference(session: Session) -> None:
    before = session.ask("Who keeps the log?", **NEW).tokens
    session.erase("The captain is Ada.", "recompute")
    after = session.ask("Who keeps the log?", **NEW).tokens
    fresh = session.fork()
    fresh.state.cache = session.backbone.prefill(session.live_tokens)
    assert after == fresh.ask("Who keeps the log?", **NEW).tokens != before


# Any sequence


OPERATIONS = ["recompute"] * 5 + ["approximate"] * 5 + ["grow"] * 4 + ["undo"] * 4 + ["fork"] * 2


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_changes_stays_exact_under_recompute_and_undoes_bit_for_bit(seed: int) -> None:
    numbers = random.Random(seed)
    backbone = tiny_backbone(seed=seed)
    layout = EraserSettings(layout=numbers.choice(["keep", "closed"]))
    attach_random_eraser(backbone, settings=layout)
    session = Session(backbone, text=TEXT) if seed % 2 else Session(backbone, messages=MESSAGES)
    states, aside, undone = [state(session)], [], 0
    for operation in numbers.sample(OPERATIONS, k=len(OPERATIONS)):
        if operation == "undo":
            if len(states) > 1:
                steps = numbers.randint(1, min(2, len(states) - 1))
                session.undo(steps)
                del states[len(states) - steps :]
                assert same(states[-1], state(session))
                undone += 1
            continue
        if operation == "fork":
            aside.append((session, state(session)))
            session = session.fork()
            assert same(aside[-1][1], state(session))
            continue
        if operation == "grow":
            if session.turn_open and numbers.random() < 0.5:
                session.append(" The tide is in.")
            else:
                session.ask("Who?", keep=True, **NEW)
        else:
            transcript = session.transcript
            places = zip(transcript.live, transcript.offsets, strict=True)
            body = [token for token, (live, at) in enumerate(places) if live and at[0] >= transcript.body_start]
            starts = numbers.sample(body[:-12], k=numbers.randint(1, 2))
            spans = [Tokens(start, start + numbers.randint(1, 9)) for start in starts]
            method = "recompute" if operation == "recompute" else numbers.choice(APPROXIMATE)
            receipt = session.erase(spans, method)
            assert receipt.exact is session.exact
            if operation == "recompute":
                assert session.exact and far(session) < EXACT
        states.append(state(session))
        assert consistent(session)
        assert not session.exact or far(session) < EXACT
    for origin, left in aside:
        assert same(left, state(origin))
    assert undone > 1 and len(states) > 1
    session.undo(len(states) - 1)
    assert same(states[0], state(session)) and session.exact and far(session) < EXACT


# Receipts


@pytest.mark.parametrize("method", METHODS)
def test_a_receipt_says_what_was_done(method: str) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    session = Session(backbone, text=TEXT)
    ((span, text),) = session.find(SPAN)
    count, suffix = len(span), len(session.live_tokens) - span.end
    receipt = session.erase(SPAN, method, force=True)
    assert session.receipts == [receipt] and receipt.method == method and receipt.audit is None
    assert receipt.spans == ((span.start, span.end),) and receipt.text == (text,) and receipt.erased == count
    assert receipt.exact is session.exact is (method == "recompute")
    assert receipt.next_position == session.cache.next_position
    assert receipt.seconds > 0 and receipt.bytes_written > 0
    saved = session.state.history[-1].journal
    assert saved is not None and receipt.undo_bytes == saved.bytes == sum(
        tensor.nbytes for step in saved.steps for pair in step.states for tensor in pair if tensor is not None
    )
    assert (receipt.undo_bytes > 0) is (method != "erratum")
    if method == "recompute":
        assert receipt.recomputed == suffix and receipt.next_position == len(session.live_tokens)
        assert receipt.bytes_written == session.cache.nbytes // session.cache.length * suffix
    if method in ("mask", "shift", "zero_value"):
        assert receipt.recomputed == 0
    assert receipt.to_json()["spans"] == ((span.start, span.end),) and receipt.to_json()["audit"] is None


@pytest.mark.parametrize("method", APPROXIMATE)
def test_nothing_approximate_calls_itself_exact(method: str) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    session = Session(backbone, text=TEXT)
    session.erase(SPAN, method, force=True)
    assert not session.receipts[-1].exact and not session.exact and far(session) > EXACT
    session.append(" The sea is calm.")
    session.erase("calm", "mask", force=True)
    # Exact by itself at the very end of the text, but not behind what is not.
    assert not session.receipts[-1].exact and not session.exact
    session.undo(3)
    assert session.erase("old.", "mask", force=True).exact and far(session) < EXACT


@pytest.mark.usefixtures("own_objects")
def test_without_undo_the_old_states_are_given_back_and_forgotten(session: Session) -> None:
    def journals() -> int:
        gc.collect()
        return sum(type(one) is Journal for one in gc.get_objects())

    held = journals()
    session.erase("noon", "mask")
    session.ask("Who?", keep=True, **NEW)
    assert journals() == held + 1
    receipt = session.erase(SPAN, "shift", undoable=False)
    assert receipt.undo_bytes == 0 and receipt.bytes_written > 0 and journals() == held
    with pytest.raises(SessionError, match="0 can be undone"):
        session.undo()
    session.erase("Ada", "recompute")
    assert session.exact and far(session) < EXACT
    session.undo()
    assert not session.exact and len(session.receipts) == 2
