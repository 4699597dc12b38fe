"""Tool calls in an answer's text, however the text comes in pieces."""

from __future__ import annotations

import itertools
import json

import pytest

from kveraser.serve.tools import Call, CallReader

FIND = '<tool_call>\n{"name": "find", "arguments": {"what": "parcel", "how": "<fast> ünd 🙂"}}\n</tool_call>'
SEND = '<tool_call>{"name": "send", "arguments": {}}</tool_call>'


def read(pieces: list[str], most: int | None = None) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls, as the pieces give them one after another."""
    numbers = itertools.count()
    reader = CallReader(most, lambda: f"id_{next(numbers)}")
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
