"""Replacing and inserting text: the edited session equals one of the edited text, and undo restores every bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kveraser.errors import ContextLengthError, InputError, MethodError, RotationError, SpanError
from kveraser.measure.probes import Probe
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Characters, Message, Pattern, Text, ToolCall
from tests.sessions import EXACT, MESSAGES, TEXT, consistent, far, same, state
from tests.tiny import FAMILIES, ROTARY_FAMILIES, attach_random_eraser, distance, tiny_backbone

OLD, NEW = "The captain is Ada.", "The captain is Bartholomew, since May."
INSERTING = ("recompute", "shift", "repair(4)", "follow(3, 0.25, 0.5)", "selective(0.3)")
CHANGE = 1e-2


def edited(session: Session, expected: str) -> bool:
    """Whether text, slots and positions are those of `expected`."""
    cache = session.cache
    return (
        session.text.endswith(expected)
        and consistent(session)
        and cache.positions.tolist() == list(range(cache.length))
        and cache.next_position == cache.length
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_equals_a_prefill_of_the_edited_text(family: str) -> None:
    session = Session(tiny_backbone(family), text=TEXT)
    before = state(session)
    receipt = session.replace(OLD, NEW, "recompute")
    assert receipt.exact and receipt.inserted_text == (NEW,) and receipt.text == (OLD,)
    assert receipt.inserted > receipt.erased > 0
    assert edited(session, TEXT.replace(OLD, NEW)) and far(session) < EXACT
    session.undo()
    assert same(before, state(session))


@pytest.mark.parametrize("method", INSERTING)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_inserted_tokens_are_exact_and_the_suffix_moves(family: str, method: str) -> None:
    session = Session(tiny_backbone(family), text=TEXT)
    before, ((span, _),) = state(session), session.find(OLD)
    suffix = len(session.live_tokens) - span.end
    unedited = session.cache.fork()
    receipt = session.replace(OLD, NEW, method, force=True)
    assert receipt.method == method.partition("(")[0] and receipt.exact == (method == "recompute")
    assert edited(session, TEXT.replace(OLD, NEW))
    # The prefix and the new tokens are those of a fresh prefill of the edited text, whatever follows.
    fresh, new = session.backbone.prefill(session.live_tokens), span.start + receipt.inserted
    for pair, other in zip(session.cache.read(0, new), fresh.read(0, new), strict=True):
        assert distance(pair, other) < 1e-4
    # Each suffix key is rotated to its new position.
    length = session.cache.length
    if method == "shift":
        keys = [keys for keys, _ in session.cache.read(length - suffix, length)]
        old = [keys for keys, _ in unedited.read(unedited.length - suffix, unedited.length)]
        moved = session.backbone.rotation.rotate(old, receipt.inserted - receipt.erased)
        assert distance(keys, moved) < 1e-4 and distance(keys, old) > CHANGE
        assert receipt.recomputed == receipt.inserted
    session.undo()
    assert same(before, state(session))


def test_recomputing_the_whole_suffix_after_a_replacement_is_exact(backbone: Backbone) -> None:
    session = Session(backbone, text=TEXT)
    receipt = session.replace(OLD, NEW, "repair(900)", force=True)
    assert receipt.method == "repair" and receipt.exact and far(session) < EXACT


@pytest.mark.parametrize("method", INSERTING)
def test_an_insertion_at_every_place(backbone: Backbone, method: str) -> None:
    for place in (0, TEXT.index(" The crew"), len(TEXT)):
        session = Session(backbone, text=TEXT)
        before = state(session)
        receipt = session.insert(place, " Note well.", method, force=True)
        assert receipt.erased == 0 and receipt.spans == () and receipt.inserted > 0
        assert edited(session, TEXT[:place] + " Note well." + TEXT[place:])
        assert place or far(session) >= 0
        if method == "recompute" or place == len(TEXT):
            assert receipt.exact and far(session) < EXACT
        session.undo()
        assert same(before, state(session))


@pytest.mark.parametrize("layout", ["keep", "closed"])
def test_the_eraser_puts_a_shorter_text_into_the_span(layout: str) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    session = Session(backbone, text=TEXT)
    before, ((span, _),) = state(session), session.find(OLD)
    if layout == "closed":
        with pytest.raises(MethodError, match="only by layout keep"):
            session.replace(OLD, "Ada.", "kveraser", layout="closed", force=True)
    else:
        receipt = session.replace(OLD, "Ada.", "kveraser", force=True)
        held = session.cache.slot_to_token.tolist()
        assert receipt.inserted < receipt.erased == len(span) == receipt.recomputed and consistent(session)
        assert session.text.endswith(TEXT.replace(OLD, "Ada.")) and len(held) == len(before["slots"])
        fresh = backbone.prefill(session.live_tokens)
        new = span.start + receipt.inserted
        assert distance(session.cache.read(0, new)[2], fresh.read(0, new)[2]) < 1e-4
        session.undo()
        with pytest.raises(MethodError, match="no more than it erases"):
            session.replace(OLD, NEW, "kveraser", force=True)
    assert same(before, state(session))


def test_a_message_keeps_its_turn_and_later_messages_are_found(backbone: Backbone) -> None:
    session = Session(backbone, messages=MESSAGES)
    session.replace(ToolCall("call_1"), "[cleared]", "recompute")
    session.replace(Message(1), "Where is it?", "recompute")
    changed = [dict(message) for message in MESSAGES]
    changed[3]["content"], changed[1]["content"] = "[cleared]", "Where is it?"
    wanted = Session(backbone, messages=changed)
    assert session.text == wanted.text and far(session) < EXACT
    contents = [session.transcript.text[one.content_start : one.content_end] for one in session.transcript.messages]
    assert contents[3].endswith("[cleared]") and contents[4] == MESSAGES[4]["content"]
    assert contents[1].endswith("Where is it?")
    session.erase(Message(4), "recompute")
    assert session.receipts[-1].text[0].count(MESSAGES[4]["content"]) == 1 and far(session) < EXACT


def test_every_match_is_replaced_and_a_kept_answer_goes_on(backbone: Backbone) -> None:
    session = Session(backbone, text=TEXT)
    session.replace(Pattern(r"\bis\b"), "was", "recompute")
    assert session.text.endswith(TEXT.replace(" is ", " was ")) and far(session) < EXACT
    session.ask("Who?", keep=True, max_new_tokens=4)
    session.replace(Characters(0, 8), "A boat", "recompute")
    assert TEXT[8:14] in session.text and consistent(session)
    session.undo(3)
    assert session.text.endswith(TEXT)


def test_receipts_follow_their_spans(backbone: Backbone) -> None:
    session = Session(backbone, text=TEXT)
    session.erase("The harbour is in Lisbon", "mask")
    erased = session.receipts[0].text
    session.replace(OLD, NEW, "follow", force=True)
    for receipt in session.receipts:
        texts = [session.transcript.text[session.transcript.offsets[start][0] : session.transcript.offsets[end - 1][1]]
                 for start, end in receipt.spans]  # fmt: skip
        assert tuple(texts) == receipt.text
    assert session.receipts[0].text == erased


def test_audits_compare_with_the_text_before_and_after_the_edit(backbone: Backbone) -> None:
    session = Session(backbone, text=TEXT)
    original = list(session.transcript.tokens)
    session.replace(OLD, NEW, "shift", force=True)
    references = session.references()
    assert references.unerased.length == len(original) and references.exact.length == len(session.live_tokens)
    measured = session.audit(["Who is the captain?"], references=references)
    assert measured.kl is not None and measured.kl > 0
    session.undo()
    session.replace(OLD, NEW, "recompute")
    exact = session.audit([Probe("Who is the captain?")])
    assert exact.kl is not None and exact.kl < 1e-6 < measured.kl
    session.undo()
    session.insert(0, "Mind: ", "shift", force=True)
    with pytest.raises(InputError, match="give probes"):
        session.audit()


def test_auto_replaces_within_the_budget(backbone: Backbone) -> None:
    session = Session(backbone, text=TEXT)
    assert session.replace(OLD, NEW, "auto", max_kl=0.0).method == "recompute" and far(session) < EXACT
    generous = Session(backbone, text=TEXT).replace(OLD, NEW, "auto", max_kl=1e9)
    assert generous.method == "shift" and generous.inserted > 0


@pytest.mark.parametrize("seed", range(4))
def test_random_edits_equal_the_edited_text_and_undo(seed: int, tmp_path: Path, backbone: Backbone) -> None:
    numbers = random.Random(seed)
    session = Session(backbone, text=TEXT)
    before, steps = [state(session)], 0
    for _ in range(12):
        kind = numbers.choice(["erase", "replace", "insert", "append", "undo", "fork", "file"])
        if kind == "undo" and steps:
            session.undo()
            steps -= 1
            before.pop()
            assert same(before[-1], state(session))
        elif kind == "fork":
            session = session.fork()
        elif kind == "file":
            session.save(tmp_path / "session.kv")
            session, steps = Session.load(tmp_path / "session.kv", backbone), 0
            before = [state(session)]
        elif kind not in ("undo",):
            words = session.text[session.transcript.body_start :]
            live = [index for index, alive in enumerate(session.transcript.live) if alive][3:]
            start = numbers.choice(live)
            offset = session.transcript.offsets[start]
            place = (
                Characters(*(end - session.transcript.body_start for end in offset)) if offset[0] < offset[1] else None
            )
            try:
                if kind == "append":
                    session.append(" More words follow.")
                elif place is None:
                    continue
                elif kind == "insert":
                    session.insert(place.start, f" new {numbers.randrange(99)} ", "recompute")
                elif kind == "replace":
                    session.replace(place, f" other {numbers.randrange(99)} ", "recompute")
                else:
                    session.erase(place, "recompute")
            except SpanError:
                continue
            steps += 1
            before.append(state(session))
            assert words != session.text[session.transcript.body_start :]
        assert consistent(session) and far(session) < EXACT, kind


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"method": "mask"}, MethodError, "mask can't insert text: use recompute"),
    ({"method": "zero_value"}, MethodError, "zero_value can't insert text"),
    ({"method": "kveraser+repair"}, MethodError, "can't insert text"),
    ({"text": ""}, InputError, "the new text is '': give some text, or use erase"),
    ({"text": 3}, InputError, "the new text is 3"),
    ({"text": "long " * 3000}, ContextLengthError, "positions"),
    ({"what": "nowhere"}, SpanError, "is not in the context"),
    ({"text": "half \ud83d a character"}, InputError, "lone surrogate"),
]


@pytest.mark.parametrize(("changed", "error", "said"), REFUSED)
def test_what_can_not_be_replaced_is_refused_and_changes_nothing(
    backbone: Backbone, changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    session = Session(backbone, text=TEXT)
    before = state(session)
    with pytest.raises(error, match=said):
        session.replace(**{"what": OLD, "text": NEW, "method": "recompute"} | changed)
    assert same(before, state(session))


def test_an_insertion_inside_a_token_or_outside_the_text_is_refused(backbone: Backbone) -> None:
    session = Session(backbone, text=f"{TEXT}<|im_end|> More.", allow_special=True)
    before = state(session)
    with pytest.raises(SpanError, match=rf"inside the token '<\|im_end\|>': insert at {len(TEXT)} or {len(TEXT) + 10}"):
        session.insert(len(TEXT) + 2, "x")
    for outside in (10_000, -1):
        with pytest.raises(SpanError, match="lies outside the context"):
            session.insert(outside, "x")
    assert same(before, state(session))


def test_models_without_rotary_positions_replace_by_recompute_alone() -> None:
    session = Session(tiny_backbone("gpt2"), text=TEXT)
    before = state(session)
    with pytest.raises(RotationError):
        session.replace(OLD, NEW, "shift", force=True)
    assert same(before, state(session))
    assert session.replace(OLD, NEW).method == "recompute"


def test_an_interrupted_replacement_restores_every_bit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(backbone, text=TEXT)
    before, layer = state(session), session.backbone.model.model.layers[2].mlp
    inside = layer.forward

    def interrupt(states: torch.Tensor) -> torch.Tensor:
        inside(states)
        raise KeyboardInterrupt

    for method in INSERTING:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(layer, "forward", interrupt)
            session.replace(Text(OLD), NEW, method, force=True)
        assert same(before, state(session))
