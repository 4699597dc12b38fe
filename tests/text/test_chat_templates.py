"""Conversations through the chat templates of 26 families: nothing said is lost, and every range is right."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.text import chat
from kveraser.text.chat import ChatOptions
from kveraser.text.spans import MessageRange
from tests.tiny import tiny_tokenizer

FOLDER = Path(__file__).parent.parent / "chat_templates"
FAMILIES: dict[str, dict[str, Any]] = json.loads((FOLDER / "families.json").read_text(encoding="utf-8"))

SYSTEM = {"role": "system", "content": "Speak like a lighthouse keeper."}
DEVELOPER = {"role": "developer", "content": "Count in dozens."}
ASKED = {"role": "user", "content": "Which fjord is deepest?"}
SAID = {"role": "assistant", "content": "Sognefjord, by far."}
WEATHER = {"role": "user", "content": "Do I need a raincoat?"}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "look_outside", "arguments": '{"city": "Oslo"}'},
}
CALLING = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "call00001", "content": "It rains."}
ADVISED = {"role": "assistant", "content": "Bring gumboots too."}
THANKS = {"role": "user", "content": "Thanks, heading out."}
REASONED = {**ADVISED, "reasoning_content": "Puddles are likely."}
INLINE = {"role": "assistant", "content": "<think>\nPuddles are likely.\n</think>\n\nBring gumboots too."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_outside",
            "description": "Weather at a place.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [SYSTEM, ASKED, SAID, WEATHER],
    "call": [WEATHER, CALLING, FOUND, ADVISED, THANKS],
    "call without content": [WEATHER, {**CALLING, "content": None}, FOUND, ADVISED, THANKS],
    "call with empty content": [WEATHER, {**CALLING, "content": ""}, FOUND, ADVISED, THANKS],
    "developer": [DEVELOPER, ASKED, SAID, WEATHER],
    "reasoning": [WEATHER, CALLING, FOUND, REASONED],
    "reasoning inside content": [WEATHER, INLINE, ASKED, SAID],
    "long": [
        {"role": ("user", "assistant")[turn % 2], "content": f"{('Query', 'Reply')[turn % 2]} ({turn}) ends."}
        for turn in range(20)
    ],
}
CALLS = ("call", "call without content", "call with empty content", "reasoning")
REFUSED: dict[str, tuple[str, ...]] = {
    "gemma-2": ("plain", "developer", *CALLS),
    "gemma-3": CALLS,
    "llama2": CALLS,
}
"""What a family's template refuses."""

SHARED = {"gemma-3": 1, "gpt-oss": 3, "llama2": 1, "mistral-nemo": 3, "mistral-v0.3": 3, "smollm3": 0}
"""The message of the plain conversation that has no turn of its own.

It shares one with the system prompt or with the template's words, or begins where an answer ends that would be closed
by another marker if it were the last message.
"""


@cache
def tokenizer_of(family: str) -> Any:
    """The tiny tokenizer with a family's control tokens and template."""
    tokenizer, known = tiny_tokenizer(), FAMILIES[family]
    tokenizer.bos_token, tokenizer.eos_token = known["bos_token"], known["eos_token"]
    markers = [one for one in (known["bos_token"], known["eos_token"], *known["markers"]) if one is not None]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tokenizer.chat_template = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    return tokenizer


def words_of(message: dict[str, Any]) -> str:
    """What a template has to show of a message's content: all but reasoning."""
    return (message["content"] or "").split("</think>")[-1].strip()


@cache
def read(family: str, name: str) -> tuple[str, list[MessageRange], list[str]]:
    """The rendered conversation, its ranges, and what has to stand in them."""
    messages = CONVERSATIONS[name]
    options = ChatOptions(TOOLS if name in CALLS else ())
    text, ranges = chat.render_with_ranges(tokenizer_of(family), messages, options)
    assert len(ranges) == len(messages)
    return text, ranges, [words_of(message) for message in messages]


ACCEPTED = [(family, name) for family in FAMILIES for name in CONVERSATIONS if name not in REFUSED.get(family, ())]
accepted = pytest.mark.parametrize(("family", "name"), ACCEPTED, ids=[f"{one}-{two}" for one, two in ACCEPTED])


def test_every_template_is_listed_and_its_markers_are_single_tokens() -> None:
    assert set(FAMILIES) == {path.stem for path in FOLDER.glob("*.jinja")} and len(FAMILIES) == 26
    for family, known in FAMILIES.items():
        tokenizer = tokenizer_of(family)
        for marker in (known["bos_token"], known["eos_token"], *known["markers"]):
            assert marker is None or len(tokenizer.encode(marker, add_special_tokens=False)) == 1


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in REFUSED.items() for name in names])
def test_what_the_template_refuses_is_refused(family: str, name: str) -> None:
    with pytest.raises(InputError, match="chat template refuses"):
        read(family, name)


@accepted
def test_all_that_was_said_stands_in_the_text(family: str, name: str) -> None:
    text, _, words = read(family, name)
    assert [one for one in words if one not in text] == []
    if name in CALLS:
        # The description of the tools names the function once.
        described = chat.render(tokenizer_of(family), [WEATHER], ChatOptions(TOOLS)).count("look_outside")
        assert text.count("look_outside") > described and "Oslo" in text


@accepted
def test_a_content_range_holds_the_content(family: str, name: str) -> None:
    text, ranges, words = read(family, name)
    for message, place, said in zip(CONVERSATIONS[name], ranges, words, strict=True):
        shown = text[place.content_start : place.content_end]
        assert said in shown if shown else "tool_calls" in message or message["role"] == "tool" or message is INLINE
        # Calls and results that the template would drop are written into the content.
        if "tool_calls" not in message and message["role"] != "tool":
            assert shown.strip() in message["content"]


@accepted
def test_a_turn_holds_its_own_content_and_no_other(family: str, name: str) -> None:
    text, ranges, words = read(family, name)
    # A system prompt may stand in the last turn.
    own = sorted((place for place in ranges if place.own_turn), key=lambda place: place.start)
    assert all(one.end <= other.start for one, other in pairwise(own))
    for index, place in enumerate(ranges):
        turn, rest = text[place.start : place.end], text[: place.start] + text[place.end :]
        if place.own_turn:
            assert words[index] in turn
        for other in words[:index] + words[index + 1 :]:
            assert not other or (other not in turn and other in rest)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "plain" not in REFUSED.get(family, ())])
def test_plain_messages_have_turns_of_their_own(family: str) -> None:
    _, ranges, _ = read(family, "plain")
    assert [index for index, place in enumerate(ranges) if not place.own_turn] == [
        index for index in range(4) if SHARED.get(family) == index
    ]
