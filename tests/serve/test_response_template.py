"""Answers taken apart by the response template of a tokenizer."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from kveraser.model.decode import AnswerText
from kveraser.serve.response_template import TemplateReader
from kveraser.serve.tools import Call
from tests.serve_fake import MODEL, FakeService, http
from tests.tiny import tiny_tokenizer

TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {"close": "<|im_end|>", "optional": True},
        "thinking": {"open": "[THINK]", "close": "[/THINK]", "optional": True},
        "tool_calls": {
            "open": "[CALL]", "close": "[/CALL]", "content": "json", "repeats": True, "optional": True,
        },
    },
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}},
    }
]
CALL = '[CALL]{"name": "find", "arguments": {"what": "ö"}}[/CALL]'


def read(text: str, size: int, **options: Any) -> tuple[str, list[Call]]:
    """The shown text and the calls of an answer that comes in pieces of `size` characters."""
    tokenizer, numbers = tiny_tokenizer(), count()
    tokenizer.response_template = TEMPLATE
    reader = TemplateReader(
        tokenizer, TOOLS, "<|im_start|>assistant\n", make_id=lambda: f"call_{next(numbers)}", **options
    )
    pieces = [reader.feed(text[place : place + size]) for place in range(0, len(text), size)]
    pieces.append(reader.finish())
    assert [call for _, calls in pieces for call in calls] == reader.calls
    return "".join(shown for shown, _ in pieces), reader.calls


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_text_and_reasoning_are_told_apart(size: int) -> None:
    shown, calls = read(f"[THINK]Hm.[/THINK]I look.{CALL}{CALL}", size)
    assert shown == "<think>\nHm.\n</think>\n\nI look."
    assert calls == [Call(f"call_{number}", "find", '{"what": "ö"}') for number in range(2)]
    assert read(f"{CALL}{CALL}", size, most=1)[1] == calls[:1]


@pytest.mark.parametrize("size", [1, 1000])
def test_what_the_template_can_not_read_stays_text(size: int) -> None:
    shown, calls = read("I look.[CALL]{no json}[/CALL] Done.", size)
    assert calls == [] and "I look." in shown and "{no json}" in shown and shown.endswith("Done.")


def test_special_tokens_reach_the_template_where_they_are_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer("Yes.<|endoftext|>")["input_ids"]
    texts = []
    for shown in (False, True):
        answer = AnswerText(tokenizer, (), show_special=shown)
        texts.append("".join([*map(answer.add, tokens), answer.finish()]))
    assert texts == ["Yes.", "Yes.<|endoftext|>"]


class Templated(FakeService):
    """A service whose tokenizer has a response template."""

    def call_reader(self, most: int | None, tools: Any) -> Any:
        tokenizer = tiny_tokenizer()
        tokenizer.response_template = TEMPLATE
        return TemplateReader(tokenizer, tools, "<|im_start|>assistant\n", most)


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_with_tools_is_answered_with_the_special_tokens_in_sight(stream: bool) -> None:
    service = Templated()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Where?"}], "stream": stream}
    async with http(service) as client:
        for given in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
            reply = await client.post("/v1/chat/completions", json=body | given)
            assert reply.status_code == 200, reply.text
    assert [turn.sampling.show_special for _, turn in service.turns] == [True, False, False]
