"""Tool calls in an answer's text, as Hermes' and Qwen's chat templates write them: `<tool_call>{json}</tool_call>`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from pydantic_core import from_json

OPENING, CLOSING = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """A tool call: `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """The call as OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def new_id() -> str:
    """An id that no other call has."""
    return f"call_{token_hex(12)}"


class CallReader:
    """Takes an answer apart while it comes in: text, which can be shown at once, and tool calls, when they are whole.

    What only looks like a call (no JSON, no name) stays text, as does one that the answer ends in the middle of. White
    space around calls belongs to the template and is left out.

    Args:
        most: calls to read; further ones are dropped. None: all.
        make_id: gives each call its id.
    """

    def __init__(self, most: int | None = None, make_id: Callable[[], str] = new_id) -> None:
        self.most, self.make_id = most, make_id
        self.calls: list[Call] = []
        self._held = ""
        self._said = False

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """The text to show and the calls to report after `text` came in."""
        self._held += text
        shown, calls = "", list[Call]()
        while (start := self._held.find(OPENING)) >= 0:
            end = self._held.find(CLOSING, start)
            if end < 0:
                break
            whole = self._held[start : end + len(CLOSING)]
            call = self._read(whole[len(OPENING) : -len(CLOSING)])
            before, self._held = self._held[:start], self._held[end + len(CLOSING) :]
            if call is None:
                shown += self._text(before + whole)
                continue
            shown += self._text(before.rstrip())
            if self.most is None or len(self.calls) < self.most:
                self.calls.append(call)
                calls.append(call)
        return shown + self._text(self._release()), calls

    def finish(self) -> tuple[str, list[Call]]:
        """What is still held back when the answer ends."""
        start = self._held.find(OPENING)
        # Some templates make the closing marker the end of the turn, which is no part of the answer's text.
        if start >= 0 and self._read(self._held[start + len(OPENING) :]) is not None:
            return self.feed(CLOSING)
        rest = self._held.rstrip() if self.calls else self._held
        self._held = ""
        return self._text(rest), []

    def _release(self) -> str:
        """The part of the held text that no call can begin in."""
        start = self._held.find(OPENING)
        if start < 0:
            sizes = range(min(len(OPENING) - 1, len(self._held)), 0, -1)
            begun = next((size for size in sizes if self._held.endswith(OPENING[:size])), 0)
            start = len(self._held) - begun
        # White space in front of a call goes with it.
        ready = self._held[:start].rstrip()
        self._held = self._held[len(ready) :]
        return ready

    def _text(self, text: str) -> str:
        """Text as it is shown: between and behind calls without white space in front."""
        if self.calls and not self._said:
            text = text.lstrip()
        self._said = self._said or bool(text)
        return text

    def _read(self, written: str) -> Call | None:
        try:
            parsed = from_json(written.strip(), allow_inf_nan=False)
        except ValueError:
            return None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str) or not parsed["name"]:
            return None
        arguments = parsed.get("arguments", parsed.get("parameters", {}))
        if isinstance(arguments, str):
            # Some models write the arguments as JSON in a text.
            try:
                arguments = from_json(arguments, allow_inf_nan=False)
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        return Call(self.make_id(), parsed["name"], json.dumps(arguments, ensure_ascii=False))
