"""Tool calls in an answer's text, however the text comes in pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from kveraser.serve.tools import Call, CallReader, formats_of

FIND = '<tool_call>\n{"name": "find", "arguments": {"what": "parcel", "how": "<fast> ünd 🙂"}}\n</tool_call>'
SEND = '<tool_call>{"name": "send", "arguments": {}}</tool_call>'


def read(pieces: list[str], most: int | None = None, **settings: Any) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, as the pieces give them one after another."""
    numbers = itertools.count()
    reader = CallReader(most, lambda: f"id_{next(numbers)}", **settings)
    text, calls = "", list[Call]()
    for piece in pieces:
        shown, made = reader.feed(piece)
        text, calls = text + shown, calls + made
    shown, made = reader.finish()
    text, calls = text + shown, calls + made
    assert calls == reader.calls and len({call.id for call in calls}) == len(calls)
    return text, [(call.name, call.arguments) for call in calls]


CASES = {
    "no call": ("It waits in Rome.\n ", "It waits in Rome.\n ", []),
    "one call": (FIND, "", ["find"]),
    "text before": ("Let me look.\n" + FIND, "Let me look.", ["find"]),
    "two calls": (f"\n{FIND}\n{SEND}\n", "", ["find", "send"]),
    "text around": (f"One.\n{FIND}\nTwo. {SEND} ", "One.\nTwo.", ["find", "send"]),
    "arguments in a text": ('<tool_call>{"name": "a", "arguments": "{\\"b\\": 1}"}</tool_call>', "", ["a"]),
    "the end of the turn closes it": (FIND.removesuffix("</tool_call>"), "", ["find"]),
    "no JSON": ("<tool_call>find it</tool_call> so", "<tool_call>find it</tool_call> so", []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "arguments are a list": (
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
        [],
    ),
    "cut short": (FIND[:40], FIND[:40], []),
    "not a number": (
        '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>',
        [],
    ),
    "too deep": ("<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", []),
    "a broken call before a good one": (f"<tool_call>x</tool_call>{SEND}", "<tool_call>x</tool_call>", ["send"]),
    "only like the marker": ("a <tool_cal> <b <tool_", "a <tool_cal> <b <tool_", []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_calls_and_text_are_told_apart_however_they_come(case: str, size: int) -> None:
    written, text, names = CASES[case]
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    shown, calls = read(pieces)
    # White space between what is shown before a call and behind it may come or go with the call.
    assert shown == text and [name for name, _ in calls] == names


def test_arguments_come_as_json_text() -> None:
    _, [(_, arguments)] = read([FIND])
    assert json.loads(arguments) == {"what": "parcel", "how": "<fast> ünd 🙂"}
    assert json.loads(read([CASES["arguments in a text"][0]])[1][0][1]) == {"b": 1}


def test_text_is_shown_as_soon_as_no_call_can_begin_in_it() -> None:
    reader = CallReader()
    assert reader.feed("It waits in") == ("It waits in", [])
    assert reader.feed(" <tool")[0] == "" and reader.feed("box>.")[0] == " <toolbox>."
    assert reader.feed(FIND[:-1]) == ("", [])
    text, calls = reader.feed(">")
    assert text == "" and [call.name for call in calls] == ["find"]


def test_only_as_many_calls_as_were_asked_for_are_read() -> None:
    text, calls = read([FIND, "\n", SEND], most=1)
    assert text == "" and [name for name, _ in calls] == ["find"]


INNER = '<tool_call>{"name": "write", "arguments": {"text": "a </tool_call> b \\" <tool_call>"}}</tool_call>'
QUOTED = {
    "thought about": f"<think>I could {FIND}</think>So.",
    "in a fence": f"Like this:\n```\n{FIND}\n```\nSo.",
    "in the other fence": f"~~~json\n{SEND}\n~~~ So.",
    "in a fence that is left open": f"```\n{SEND}",
    "in a thought that is left open": f"<think>{SEND}",
}


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_a_closing_marker_within_an_argument_does_not_end_the_call(size: int) -> None:
    pieces = [INNER[start : start + size] for start in range(0, len(INNER), size)]
    shown, [(name, arguments)] = read([*pieces, SEND[:0]])
    assert shown == "" and name == "write"
    assert json.loads(arguments) == {"text": 'a </tool_call> b " <tool_call>'}


@pytest.mark.parametrize("case", QUOTED)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_calls_that_are_only_talked_about_are_not_made(case: str, size: int) -> None:
    written = QUOTED[case]
    assert read([written[start : start + size] for start in range(0, len(written), size)]) == (written, [])


def test_a_call_behind_a_thought_or_a_fence_is_made() -> None:
    for before in (f"<think>{SEND}</think>", f"```{SEND}```"):
        shown, [(name, _)] = read([before, FIND])
        assert shown == before and name == "find"
    # The template may have opened the thought.
    shown, calls = read([SEND, "</think>", FIND], thinking=True)
    assert shown == SEND + "</think>" and [name for name, _ in calls] == ["find"]


XML = (
    "<tool_call>\n<function=run>\n<parameter=code>\nprint('</tool_call>')\n</parameter>\n"
    "<parameter=times>\n3\n</parameter>\n</function>\n</tool_call>"
)
LISTED = '[TOOL_CALLS] [{"name": "find", "arguments": {"a": "]"}}, {"name": "send", "arguments": {}}]'
FORMATS = {
    "xml": (XML, "xml", [("run", {"code": "print('</tool_call>')", "times": 3})]),
    "xml at the end of the turn": (XML.removesuffix("\n</tool_call>"), "xml", [("run", None)]),
    "mistral's list": (LISTED, "mistral", [("find", {"a": "]"}), ("send", {})]),
    "mistral's names": ('[TOOL_CALLS]find[ARGS]{"a": {"b": 1}}', "mistral", [("find", {"a": {"b": 1}})]),
    "llama": ('{"name": "find", "parameters": {"a": "}"}}', "llama", [("find", {"a": "}"})]),
    "llama, two": (
        '{"name": "find", "parameters": {}}; {"name": "send", "parameters": {}}',
        "llama",
        [("find", {}), ("send", {})],
    ),
}


@pytest.mark.parametrize("case", FORMATS)
@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_other_families_calls_are_read(case: str, size: int) -> None:
    written, form, expected = FORMATS[case]
    pieces = [written[start : start + size] for start in range(0, len(written), size)]
    shown, calls = read(pieces, formats={form}, names={"find", "send"})
    assert shown == "" and [name for name, _ in calls] == [name for name, _ in expected]
    assert all(
        given is None or json.loads(made) == given for (_, made), (_, given) in zip(calls, expected, strict=True)
    )


@pytest.mark.parametrize(
    "written",
    [
        '{"name": "Ada", "parameters": {}}',
        '{"name": "find", "parameters": {}} is a call',
        '{"name": "find"',
        "{}",
        "{ so",
    ],
)
def test_an_answer_in_json_that_names_no_tool_stays_text(written: str) -> None:
    assert read(list(written), formats={"llama"}, names={"find"}) == (written, [])


def test_a_format_is_read_only_where_the_template_documents_it() -> None:
    assert read([LISTED]) == (LISTED, [])
    assert formats_of("{{ '[TOOL_CALLS]' }}") == {"mistral"} and formats_of("<tool_call><function=x>") == {"xml"}
    assert formats_of("<tool_call>") == formats_of("nothing") == {"hermes"}
