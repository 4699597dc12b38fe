"""The questions of an audit, and what counts as giving a secret away."""

from __future__ import annotations

from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.measure.probes import Probe, default_probes, default_secrets, mentions
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.chat import answer_text, question_text

SPAN = "The captain is Ada."


def test_default_probes_ask_around_the_span() -> None:
    before = "It was a cold day. The ship left at noon."
    after = "She keeps a log in there. The crew all trusts her. It was a fine day."
    probes = default_probes(before, SPAN, after)
    kinds = [probe.kind for probe in probes]
    assert kinds.count("influence") == 5 and kinds.count("leak") == 3 and kinds.count("no_harm") == 3
    asked = [probe.question for probe in probes]
    assert 'Which sentence follows directly after "The ship left at noon."?' in asked
    assert 'Which sentence stands directly before "She keeps a log in there."?' in asked
    assert 'Complete word for word: "The captain is Ada."' in asked
    assert {probe.answer for probe in probes if probe.kind == "leak"} == {SPAN}
    assert {probe.answer for probe in probes if probe.kind == "influence"} == {None}
    assert {probe.answer for probe in probes if probe.kind == "no_harm"} == {
        "It was a cold day.", "The crew all trusts her.", "It was a fine day.",
    }  # fmt: skip


def test_a_span_with_nothing_around_it_still_has_probes() -> None:
    assert [probe.kind for probe in default_probes("", SPAN, "")] == ["influence", "influence", "leak"]


def test_default_secrets_are_names_and_numbers_that_stand_nowhere_else() -> None:
    erased = "Ada Lovelace pays 1,200.50 in Lisbon on 3 May, code X-17."
    assert default_secrets(erased, "The harbour of LISBON is near. In may it rains.") == [
        "Ada Lovelace", "1,200.50", "3", "X-17",
    ]  # fmt: skip
    assert default_secrets("nothing of note", "rest") == ["nothing of note"]
    assert default_secrets("The end.", "the beginning") == ["The end."]


@pytest.mark.parametrize(
    ("text", "secret", "given"),
    [
        ("It is Ada.", "ada", True), ("Canada", "Ada", False), ("in 1812", "12", False), ("in 12.", "12", True),
        ("ada \n Lovelace", "Ada Lovelace", True), ("在北京的", "北京", True), ("anything", " ", False),
        ("a+b", "a+b", True), ("aab", "a+b", False),
    ],
)  # fmt: skip
def test_a_secret_is_given_away_as_a_word_of_its_own(text: str, secret: str, given: bool) -> None:
    assert mentions(text, secret) is given


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"question": " "}, "a probe's question is ' '"),
        ({"question": 3}, "a probe's question is 3"),
        ({"question": "Who?", "kind": "harm"}, "kind is 'harm', but it is one of influence, leak, no_harm"),
        ({"question": "Who?", "answer": ""}, "a probe's answer is ''"),
    ],
)
def test_probes_of_the_wrong_form_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Probe(**arguments)


def test_a_probes_answer_goes_on_from_its_prefix(backbone: Backbone, plain_backbone: Backbone) -> None:
    session = Session(backbone, text=PREFIX_TEXT)
    session.erase("The red ship is old.", "mask")
    prefixed = session.audit([Probe("What is old?", answer="ship", answer_prefix="The red")])
    plain = session.audit([Probe("What is old?", answer="ship")])
    assert prefixed.kl != plain.kl
    # The same tokens, asked by hand: the answer stands behind the prefix, one space apart.
    text = question_text(backbone.tokenizer, "What is old?", True, "The red") + answer_text("ship", "The red")
    assert text.endswith("<|im_start|>assistant\nThe red ship")
    other = Session(plain_backbone, text=PREFIX_TEXT)
    other.erase("The red ship is old.", "mask")
    before = len(other.transcript.tokens)
    with pytest.raises(InputError, match="answer prefix 'The red' begins the assistant's turn, and this model has no"):
        other.audit([Probe("What is old?", answer="ship", answer_prefix="The red")])
    assert len(other.transcript.tokens) == before and other.receipts[-1].audit is None
    with pytest.raises(InputError, match="answer prefix is '  '"):
        Probe("What?", answer_prefix="  ")


PREFIX_TEXT = "The red ship is old. The captain sails it at noon. The crew trusts him."
