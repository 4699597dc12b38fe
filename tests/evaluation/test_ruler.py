"""Suite `ruler`: where the two statements stand, what remains, and the answer prefix in the assistant's turn."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.suites import SUITES, SuiteSettings
from evaluation.suites.ruler import DEPTHS, FORMS
from kveraser.measure.case import tokenize_case, tokenize_context
from kveraser.text.spans import Characters
from tests.tiny import tiny_tokenizer

# The tiny tokenizer has about a token a character.
LENGTH = 6000


def made(task: str, **changes: Any) -> Any:
    settings = {"lengths": (LENGTH,), "cases": 3, "seed": 5} | changes
    return SUITES["ruler"].make(SuiteSettings(tiny_tokenizer(), (task,), spans=(), **settings))


@pytest.mark.parametrize("task", FORMS)
def test_the_wrong_statement_goes_and_the_right_one_stays(task: str) -> None:
    cases = made(task).cases
    # The last lookup of alias_1500 would stand behind the end.
    assert len(cases) == 3 * (len(DEPTHS) - (task == "alias_1500")) and len({case.context for case in cases}) == len(
        cases
    )
    for case in cases:
        context = tokenize_context(tiny_tokenizer(), case.context)
        tokenized = tokenize_case(tiny_tokenizer(), context, case)
        (span,), (query,) = tokenized.spans, case.queries
        (right,), (wrong,) = query.accepted, query.wrong
        erased, text = context.transcript.text_of(span), context.transcript.text
        assert wrong in erased and right not in erased
        remaining = text.replace(erased, "", 1)
        assert remaining.count(right) == 1 and wrong not in remaining and right != wrong
        assert abs(span.start / len(context.tokens) - float(case.cell.depth or 0)) < 0.05
        assert abs(len(context.tokens) - LENGTH) < 0.05 * LENGTH
        later = FORMS[task]("Oslo", "Heron", right, wrong).later
        assert not any(right in sentence or wrong in sentence for sentence in later)


def test_what_leans_on_the_span_stands_as_far_behind_it_as_the_task_says() -> None:
    for case in made("alias_1500").cases:
        (span,) = case.erase
        assert isinstance(case.context, str) and isinstance(span, Characters)
        lookup = case.context.index("was used again here")
        # A sentence of ordinary text is up to 200 characters long.
        assert abs(lookup - span.end - 1500) < 300


def test_a_lookup_behind_the_end_of_the_text_is_left_out() -> None:
    found = made("alias_1500", lengths=(2000,))
    assert [one.cell.depth for one in found.left_out] == [0.5, 0.9]
    assert {case.cell.depth for case in found.cases} == {0.1}


def test_the_answer_goes_on_from_the_prefix_in_the_assistants_turn() -> None:
    case = made("needle").cases[0]
    context = tokenize_context(tiny_tokenizer(), case.context)
    (asked,) = tokenize_case(tiny_tokenizer(), context, case).asked
    prompt = tiny_tokenizer().decode(asked.prompt)
    assert prompt.endswith(f"<|im_start|>assistant\n{case.queries[0].answer_prefix}")
    assert tiny_tokenizer().decode(asked.answer) == f" {case.queries[0].answer}"
