"""Requests as tokens: what is left to append, and where messages begin, under templates of many habits."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.serve.context_edits import ClearToolUses, ToolUses
from kveraser.serve.rendering import read_messages, read_prompt
from kveraser.text import chat
from kveraser.text.chat import conversation, document
from kveraser.text.spans import Transcript
from kveraser.text.tokenized import encode
from tests.sessions import MESSAGES, TEXT
from tests.templates import TEMPLATES, tokenizer_with
from tests.tiny import tiny_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "naïve 🙂 one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_the_rest_joins_what_is_kept_at_every_token(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    reading = read_messages(tokenizer, TALK)
    text = chat.render(tokenizer, TALK, generation_prompt=True)
    tokens, offsets = encode(tokenizer, text)
    assert list(reading.wanted) == tokens
    for kept in range(len(tokens)):
        rest = reading.rest(kept)
        transcript = Transcript()
        before = reading.rest(0)
        reached = max((end for _, end in before.offsets[:kept]), default=0)
        transcript.append(before.text[:reached], before.tokens[:kept], before.offsets[:kept])
        transcript.append(rest.text, rest.tokens, rest.offsets)
        assert transcript.text == text and transcript.tokens == tokens
        assert [end for _, end in transcript.offsets] == [end for _, end in offsets]
        assert all(low <= high for low, high in transcript.offsets)


@pytest.mark.parametrize("name", ["chatml", "dated", "merging"])
def test_borders_are_where_messages_begin_and_end(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    # A system prompt may share a turn.
    reading = read_messages(tokenizer, TALK[1:])
    _, ranges = chat.render_with_ranges(tokenizer, TALK[1:])
    turns = {place.end for place in ranges if place.own_turn}
    starts = [start for start, _ in reading.offsets]
    last = len(starts)
    found = reading.borders(0, last)
    assert {starts[place] if place < last else len(reading.text) for place in found} == turns
    assert len(turns) >= 3
    for first in range(0, last, 5):
        for end in range(first, last + 1, 7):
            assert reading.borders(first, end) == [place for place in found if first <= place <= end]


@pytest.mark.parametrize("name", ["counting", "instructing", "thinking"])
def test_a_template_without_fixed_turns_has_fewer_borders_and_no_wrong_ones(name: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    reading = read_messages(tokenizer, TALK)
    for place in reading.borders(0, len(reading.wanted)):
        begun = tokenizer.decode(list(reading.wanted[:place]))
        texts = []
        for count in range(1, len(TALK) + 1):
            with suppress(InputError):
                texts.append(chat.render(tokenizer, TALK[:count]))
        assert begun in texts


def test_a_prompt_is_text_or_tokens() -> None:
    tokenizer = tiny_tokenizer(chat=False)
    text, tokens = read_prompt(tokenizer, TEXT), encode(tokenizer, TEXT)[0]
    assert text.wanted == read_prompt(tokenizer, tokens).wanted == tuple(tokens)
    assert read_prompt(tokenizer, tokens).rest(0).text == text.rest(0).text == TEXT
    assert text.borders(0, len(tokens)) == []
    for wrong in ("", (), (1, -1), (len(tokenizer),), "half \ud800"):
        with pytest.raises(InputError):
            read_prompt(tokenizer, wrong)


def test_a_session_begins_as_the_library_begins_one() -> None:
    tokenizer = tiny_tokenizer()
    made = conversation(tokenizer, MESSAGES)
    text, ranges = chat.render_with_ranges(tokenizer, MESSAGES)
    assert (made.text, list(made.messages)) == (text, ranges) and made.body_start == ranges[0].start
    opened = document(tokenizer, TEXT)
    assert opened.text[opened.body_start :] == TEXT and opened.body_start > 0
    plain = document(tiny_tokenizer(chat=False), TEXT)
    assert (plain.text, plain.body_start) == (TEXT, 0)


def test_clearing_many_results_takes_a_fixed_number_of_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = tokenizer_with(TEMPLATES["thinking"]), 0
    original = tokenizer.apply_chat_template

    def counting(*args: Any, **settings: Any) -> str:
        nonlocal count
        count += 1
        text: str = original(*args, **settings)
        return text

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    counted = []
    for rounds in (20, 150):
        call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": "{}"}}
        calling = {"role": "assistant", "content": None, "tool_calls": [call]}
        results = [
            {"role": "tool", "tool_call_id": "call_1", "content": f"Result {number}."} for number in range(rounds)
        ]
        messages = [TALK[1], *(message for result in results for message in (calling, result))]
        count = 0
        edit = ClearToolUses(trigger=ToolUses(value=0), keep=ToolUses(value=3), placeholder="")
        reading = read_messages(tokenizer, messages, edits=[edit])
        counted.append(count)
        cleared = [{**message, "content": ""} if message in results[:-3] else message for message in messages]
        assert "".join(reading.rest(0).text) == chat.render(tokenizer, cleared, generation_prompt=True)
        assert reading.applied[0]["cleared_tool_uses"] == rounds - 3
    assert counted[0] == counted[1] <= 40
