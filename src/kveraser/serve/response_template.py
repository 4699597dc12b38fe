"""Tool calls parsed with the response template of a tokenizer (`get_response_parser` of transformers)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kveraser.serve.tools import Call, new_id
from kveraser.text.template import REASONING


class TemplateReader:
    """Splits an answer into text and tool calls with the tokenizer's response template. Same interface as `CallReader`.

    Reasoning is shown between `<think>` markers, as models without a response template write it. A call that the
    template can't parse remains text.

    Args:
        tokenizer: has a `response_template`.
        tools: as in the chat template; arguments are converted to the types in their schemas.
        prefix: the text that the template writes at the start of the reply.
        most: maximum number of calls; others are dropped. None: no limit.
        make_id: returns the id of a new call.
    """

    show_special = True
    """The template needs special tokens in the answer's text."""

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]],
        prefix: str,
        most: int | None = None,
        make_id: Callable[[], str] = new_id,
    ) -> None:
        self.calls: list[Call] = []
        self.most, self.make_id = most, make_id
        self._parser = tokenizer.get_response_parser(prefix=prefix, tools=[dict(tool) for tool in tools])
        self._body = ""
        self._broken = False

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Add text of the answer; returns the text to show and the calls to report."""
        return self._read(lambda: self._parser.feed(text), text)

    def finish(self) -> tuple[str, list[Call]]:
        """End the answer; returns the remaining text and calls."""
        return self._read(lambda: self._parser.finalize()[1], "")

    def _read(self, parse: Callable[[], list[dict[str, Any]]], text: str) -> tuple[str, list[Call]]:
        if self._broken:
            return text, []
        try:
            events = parse()
        except ValueError:
            # The template expects JSON and there is none: treat the rest as text.
            self._broken = True
            return self._body + text, []
        shown, calls = "", list[Call]()
        for event in events:
            field, kind = event["field"], event["type"]
            if field == "tool_calls":
                self._body = self._body + event["text"] if kind == "region_chunk" else ""
                if kind == "region_close":
                    calls += self._calls(event["value"])
            elif kind == "region_chunk":
                shown += event["text"]
            elif field in REASONING:
                shown += "<think>\n" if kind == "region_open" else "\n</think>\n\n"
        return shown, calls

    def _calls(self, value: Any) -> list[Call]:
        found = list[Call]()
        for one in value if isinstance(value, list) else [value]:
            function = one.get("function", one)
            if self.most is not None and len(self.calls) >= self.most:
                break
            arguments = json.dumps(function.get("arguments", {}), ensure_ascii=False)
            found.append(Call(self.make_id(), function["name"], arguments))
            self.calls.append(found[-1])
        return found
