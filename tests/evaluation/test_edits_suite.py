"""The suite of edits: what its contexts say before and after the text is replaced."""

from __future__ import annotations

from typing import Any

import pytest

from evaluation.suites import SUITES, SuiteSettings
from evaluation.suites.edits import CLEARED, ERASED
from kveraser.measure.case import BenchCase, tokenize_case, tokenize_context
from kveraser.measure.questions import contains
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def cases() -> tuple[BenchCase, ...]:
    suite = SUITES["edits"]
    return suite.make(SuiteSettings(tiny_tokenizer(), suite.tasks, (2600,), (), 4, seed=3)).cases


def test_the_right_value_holds_only_after_the_edit(cases: tuple[BenchCase, ...]) -> None:
    seen = set()
    for case in cases:
        context = tokenize_context(tiny_tokenizer(), case.context)
        tokenized = tokenize_case(tiny_tokenizer(), context, case)
        tokens, edits = tokenized.edited(context.tokens)
        gone = frozenset[int]().union(*(edit.targets for edit in edits))
        before = context.transcript.text.replace("<|", " <|")
        after = tiny_tokenizer().decode([token for place, token in enumerate(tokens) if place not in gone])
        after = after.replace("<|", " <|")
        asked = case.queries[0]
        assert abs(len(context.tokens) - 2600) < 300
        (true, *_), task = asked.accepted, case.cell.task
        assert contains(before, true) is (task == "tool_result")
        assert contains(after, true) is not task.endswith(ERASED)
        assert not any(contains(after, wrong) for wrong in asked.wrong)
        if task != "reminder":
            assert all(any(contains(before, wrong) for wrong in query.wrong) for query in case.queries)
        assert (CLEARED in after) is (task == "tool_result")
        # The forced answer goes on from the answer's first words.
        assert asked.answer.startswith(true) or asked.answer_prefix == ""
        seen.add(task)
    assert seen == set(SUITES["edits"].tasks)


def test_a_task_and_its_erased_form_have_the_same_contexts(cases: tuple[BenchCase, ...]) -> None:
    def contexts(task: str) -> list[Any]:
        return [(case.context, case.erase, case.queries) for case in cases if case.cell.task == task]

    assert contexts("fact") == contexts(f"fact{ERASED}") and len(contexts("fact")) == 4
    assert {case.replace is None for case in cases if case.cell.task == f"fact{ERASED}"} == {True}
