"""Reads the user's cases from a JSONL file, and reports all malformed lines at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from kveraser.errors import InputError, SpanError
from kveraser.measure.case import BenchCase, Cell
from kveraser.measure.questions import Query, QueryKind, contains, normalized
from kveraser.text.spans import (
    Message,
    MessageRange,
    Selector,
    Span,
    Text,
    ToolCall,
    Transcript,
    resolve,
    selector_from_json,
)

NAME = "cases"
SHOWN_LINES = 10
UNSTATED = frozenset({"yes", "no"})
"""Accepted answers that need not occur in the context."""


def _words_only(value: Any) -> Any:
    return {"question": value} if isinstance(value, str) else value


class _Asked(BaseModel):
    """A question. Missing fields default to those of the line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    answers: list[str] | None = None
    wrong: list[str] | None = None
    kind: QueryKind | None = None
    answer: str | None = None
    answer_prefix: str | None = None


class _Line(BaseModel):
    """A line of a case file, with exactly one of context and messages, and one of question and questions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Annotated[str | None, BeforeValidator(lambda value: str(value) if type(value) is int else value)] = None
    context: str | None = None
    messages: list[dict[str, Any]] | None = None
    erase: Any
    replace: Annotated[str, Field(min_length=1)] | None = None
    question: str | None = None
    questions: list[Annotated[_Asked, BeforeValidator(_words_only)]] | None = None
    answers: list[str] | None = None
    wrong: list[str] = Field(default_factory=list)
    kind: QueryKind = "influence"
    answer: str | None = None
    answer_prefix: str = ""
    task: str = NAME


def read_case_file(path: str | Path) -> tuple[BenchCase, ...]:
    """The cases of a file, an object a line; blank lines are skipped.

    Keys: `id` (default: the line's number), `context` or `messages`, `erase` (a text, `[start, end]` in characters, an
    object such as `{"message": 3}`, or a list of such), `replace` (a text that takes the place of each), `question` or
    `questions` (texts, or objects with `question`, `answers`, `wrong`, `kind`, `answer` and `answer_prefix`), `answers`
    (those accepted), `wrong` (none of which may be said), `kind` (influence, leak or no_harm), `answer` (the one that
    is forced; default: the first of `answers`), `answer_prefix` (text at the beginning of the assistant's turn, before
    the answer) and `task`. The answers of a leak question are what must not come out.

    Raises:
        InputError: no such file, no case in it, or malformed lines, the first ten with reasons.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise InputError(f"no case file at {source} ({error.strerror}): check the path") from error
    cases: dict[str, tuple[int, BenchCase]] = {}
    problems: dict[int, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            case = _case(number, line)
            if case.id in cases:
                raise InputError(f"the id {case.id!r} is that of line {cases[case.id][0]} too")
            cases[case.id] = number, case
        except ValidationError as error:
            problems[number] = "; ".join(_explained(one) for one in error.errors())
        except (InputError, SpanError) as error:
            problems[number] = str(error)
    if problems:
        told, others = [*problems.items()][:SHOWN_LINES], [*problems][SHOWN_LINES:]
        more = [f"and {len(others)} more: lines {', '.join(map(str, others))}"] if others else []
        listed = "\n  ".join([*(f"line {number}: {problem}" for number, problem in told), *more])
        raise InputError(f"{source} has malformed lines ({len(problems)}):\n  {listed}")
    if not cases:
        raise InputError(f"{source} has no case: give a JSON object a line")
    return tuple(case for _, case in cases.values())


def _case(number: int, line: str) -> BenchCase:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"{type(fields).__name__}, not an object")
    given = _Line.model_validate(fields)
    if (given.context is None) == (given.messages is None):
        raise InputError(f"{'neither' if given.messages is None else 'both'} context and messages: give one of them")
    if (given.question is None) == (given.questions is None):
        raise InputError(f"{'neither' if given.questions is None else 'both'} question and questions: give one of them")
    selectors = _selectors(given.erase)
    if given.context is not None:
        remaining: str | None = _remaining_of_text(given.context, selectors)
    else:
        remaining = _remaining_of_messages(given.messages or [], selectors)
    if given.replace is not None and remaining is not None:
        remaining = f"{remaining}\n{given.replace}"
    asked = [_Asked(question=given.question)] if given.question is not None else given.questions or []
    if not asked:
        raise InputError("questions is empty: ask something")
    return BenchCase(
        id=str(number) if given.id is None else given.id,
        cell=Cell(NAME, given.task, spans=len(selectors)),
        context=given.context if given.context is not None else tuple(given.messages or ()),
        erase=selectors,
        queries=tuple(_query(given, one, remaining) for one in asked),
        replace=given.replace,
    )


def _selectors(erase: Any) -> tuple[Selector, ...]:
    several = isinstance(erase, list) and not (len(erase) == 2 and all(type(bound) is int for bound in erase))
    if several and not erase:
        raise SpanError("erase is empty: say what to erase")
    return tuple(map(selector_from_json, erase if several else [erase]))


def _remaining_of_text(context: str, selectors: Sequence[Selector]) -> str:
    """The context without the erased text, at character precision."""
    if not context.strip():
        raise InputError("context is empty: give the text to read")
    transcript = Transcript()
    transcript.append(context, range(len(context)), [(place, place + 1) for place in range(len(context))])
    return _without(context, resolve(transcript, selectors))


def _without(text: str, spans: Sequence[Span]) -> str:
    kept, reached = [], 0
    for span in spans:
        kept.append(text[reached : span.start])
        reached = span.end
    return "".join([*kept, text[reached:]])


def _remaining_of_messages(messages: Sequence[Mapping[str, Any]], selectors: Sequence[Selector]) -> str | None:
    """The text of the messages without the erased text; None where that depends on the chat template.

    What can't be found whatever the template is (a message, a tool call, a text in none of them) is refused.
    """
    if not messages:
        raise InputError("messages is empty: give a conversation")
    transcript = Transcript()
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InputError(f"message {number} has no role: give user, assistant, system or tool")
        content = message["content"] if isinstance(message.get("content"), str) else ""
        start, turn = len(transcript.text), f"\n{content}\n"
        transcript.append(turn, range(start, start + len(turn)), [(place, place + 1) for place in range(len(turn))])
        bounds = (start, start + len(turn), start + 1, start + 1 + len(content))
        transcript.messages.append(MessageRange(message["role"], *bounds, message.get("tool_call_id")))
    # Only the chat template knows the text of tool calls and other content.
    plain = all(isinstance(message.get("content"), str) and "tool_calls" not in message for message in messages)
    sure = [one for one in selectors if isinstance(one, Message | ToolCall) or (isinstance(one, Text) and plain)]
    spans = resolve(transcript, sure) if sure else []
    return _without(transcript.text, spans) if plain and len(sure) == len(selectors) else None


def _query(given: _Line, asked: _Asked, remaining: str | None) -> Query:
    kind = asked.kind or given.kind
    answers = asked.answers if asked.answers is not None else given.answers
    wrong = asked.wrong if asked.wrong is not None else given.wrong
    place = f"the question {asked.question!r}"
    if not asked.question.strip():
        raise InputError("a question is empty: give some words")
    if not answers:
        raise InputError(f"{place} has no answers: give at least one")
    answer = asked.answer or (given.answer if asked.answers is None else None) or answers[0]
    empty = next((text for text in (*answers, *wrong) if not normalized(text)), None)
    if empty is not None:
        raise InputError(f"{place}: {empty!r} is no answer: nothing stays of it without articles and punctuation")
    if not answer.strip():
        raise InputError(f"{place}: answer is empty: give the text to force, or leave it out for the first of answers")
    prefix = given.answer_prefix if asked.answer_prefix is None else asked.answer_prefix
    if prefix and not prefix.strip():
        raise InputError(f"{place}: answer_prefix is {prefix!r}: give some words, or leave it out")
    if kind == "leak":
        return Query(asked.question, answer, kind, wrong=tuple(wrong or answers), answer_prefix=prefix)
    barred = next((text for text in wrong if all(contains(accepted, text) for accepted in answers)), None)
    if barred is not None:
        raise InputError(f"{place}: {barred!r} is wrong and stands in every accepted answer: no answer could be right")
    said = f"{remaining}\n{asked.question}"
    unstated = UNSTATED & set(map(normalized, answers))
    if (
        kind == "influence"
        and remaining is not None
        and not unstated
        and not any(contains(said, one) for one in answers)
    ):
        raise InputError(
            f"{place}: none of the answers {', '.join(map(repr, answers))} stands in the context without what is "
            "erased, nor in the question: correct them, or ask with kind leak for what is erased"
        )
    return Query(asked.question, answer, kind, tuple(answers), tuple(wrong), prefix)


def _explained(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = (_Asked if "questions" in error["loc"][:1] else _Line).model_fields
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
        return f"unknown key {place!r}: " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}")
    if error["type"] == "missing":
        return f"{place} is missing"
    shown = repr(error["input"])
    return (
        f"{place} is {shown if len(shown) <= 60 else shown[:57] + '...'}: {error['msg'][0].lower()}{error['msg'][1:]}"
    )
