"""Edits of a history: a fact corrected, a document replaced, a tool result cleared, a reminder filled in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.facts import Conflict, conflicts, values
from evaluation.suites.text import Filler, Placed, Woven, room_for_text, token_count, weave
from kveraser.measure.case import BenchCase, Cell, tokenize_context
from kveraser.measure.questions import Query
from kveraser.text.spans import Characters, Selector, ToolCall

DEPTH = 0.3
"""Where the span begins, as a share of the context's text."""
TOOL_RESULTS = 4
ERASED = "_erased"
"""Ends the name of a task whose spans are only erased, to compare with."""
CLEARED, UNWRITTEN = "[cleared]", "Reminder: none."

Parts = tuple[str | tuple[Mapping[str, Any], ...], Selector, str, tuple[Query, ...]]
"""Context, span, the text that takes its place, and questions."""


def make(settings: SuiteSettings) -> Made:
    """The cases of every task and length."""
    cases: list[BenchCase] = []
    for length in settings.lengths:
        for task in settings.tasks:
            cell = Cell("edits", task, length=length)
            for index in range(settings.cases):
                # The same contexts for a task and for its spans without new text.
                made_by = task.removesuffix(ERASED)
                rng = random.Random(f"{settings.seed}/edits/{made_by}/{length}/{index}")
                context, span, text, queries = TASKS[made_by](rng, settings, length)
                new = text if task == made_by else None
                cases.append(BenchCase(f"edits/{task}/{length}/{index}", cell, context, (span,), queries, replace=new))
    return Made(tuple(cases))


def _questions(fact: Conflict) -> tuple[Query, ...]:
    """Which value holds, and whether the wrong one can still be brought out.

    The answer begins with the words before the value, without which a small model seldom gives one.
    """
    prefix, _, rest = fact.answer.partition(fact.true.text)
    asked = fact.query()
    asked = replace(asked, answer=f"{fact.true.text}{rest}", answer_prefix=prefix.strip())
    leak = Query(
        fact.question, f"{fact.wrong.text}{rest}", "leak", wrong=fact.wrong.strings, answer_prefix=prefix.strip()
    )
    return asked, leak


def _woven(
    rng: random.Random, settings: SuiteSettings, length: int, placed: Sequence[Placed], without: Sequence[str]
) -> Woven:
    """The statements among filler of the context's length."""
    taken = sum(token_count(settings.tokenizer, f"{one.joint}{one.text}") for one in placed)
    filler = Filler(rng, settings.passages, without=without)
    pieces = filler.pieces(settings.tokenizer, room_for_text(settings.tokenizer, length) - taken)
    return weave(settings.tokenizer, pieces, placed)


def _document(rng: random.Random, settings: SuiteSettings, length: int, old: str, new: str, fact: Conflict) -> Parts:
    """A document in which `old` becomes `new`."""
    woven = _woven(rng, settings, length, [Placed(old, DEPTH * length)], values([fact]))
    return woven.text, Characters(*woven.ranges[0]), f" {new}", _questions(fact)


def fact(rng: random.Random, settings: SuiteSettings, length: int) -> Parts:
    """A wrong sentence becomes the right one."""
    (told,) = conflicts(rng, 1)
    return _document(rng, settings, length, told.bad, told.right, told)


def document(rng: random.Random, settings: SuiteSettings, length: int) -> Parts:
    """A section with a wrong statement becomes another one with the right statement."""
    (told,) = conflicts(rng, 1)
    filler = Filler(rng, settings.passages, without=values([told]))

    def section(statement: str) -> str:
        drawn = [filler.piece().strip() for _ in range(4)]
        return " ".join([*drawn[:2], statement, *drawn[2:]])

    return _document(rng, settings, length, section(told.bad), section(told.right), told)


def reminder(rng: random.Random, settings: SuiteSettings, length: int) -> Parts:
    """An empty reminder becomes one that states the fact."""
    (told,) = conflicts(rng, 1)
    context, span, text, queries = _document(rng, settings, length, UNWRITTEN, f"Reminder: {told.right}", told)
    return context, span, text, queries[:1]


def tool_result(rng: random.Random, settings: SuiteSettings, length: int) -> Parts:
    """The content of a tool result with a wrong statement becomes a placeholder; a later result has the right one."""
    (told,) = conflicts(rng, 1)
    filler = Filler(rng, settings.passages, without=values([told]))
    stated = {1: told.bad, TOOL_RESULTS - 1: told.right}

    def conversation(sentences: int) -> tuple[dict[str, Any], ...]:
        drawn = iter(pieces[: sentences * TOOL_RESULTS])
        messages: list[dict[str, Any]] = [{"role": "user", "content": "Read the pages of the file."}]
        for page in range(TOOL_RESULTS):
            function = {"name": "read", "arguments": f'{{"page": {page + 1}}}'}
            content = [*(next(drawn) for _ in range(sentences)), *([stated[page]] if page in stated else [])]
            messages += [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": f"call_{page}", "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": f"call_{page}", "content": " ".join(content)},
            ]
        return tuple(messages)

    pieces = [filler.piece().strip() for _ in range(TOOL_RESULTS * max(1, length // 20))]
    sentences = 1
    while len(tokenize_context(settings.tokenizer, conversation(sentences + 1)).tokens) <= length:
        sentences += 1
    return conversation(sentences), ToolCall("call_1"), CLEARED, _questions(told)


TASKS: dict[str, Callable[[random.Random, SuiteSettings, int], Parts]] = {
    "fact": fact,
    "document": document,
    "tool_result": tool_result,
    "reminder": reminder,
}

EDITS = Suite(
    name="edits",
    summary="text replaced: facts, documents, tool results, reminders",
    tasks=(*TASKS, f"fact{ERASED}"),
    lengths=(512,),
    spans=(),
    make=make,
)
