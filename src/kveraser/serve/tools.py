"""Tool calls in the text of an answer, in the formats that model families document.

`hermes` (Hermes, Qwen): `<tool_call>{json}</tool_call>`; `xml` (Qwen3-Coder): the same markers around
`<function=name><parameter=key>value</parameter></function>`; `mistral`: `[TOOL_CALLS]` before a JSON list, or before a
name and its arguments; `llama` (Llama 3.1): an answer that is `{"name": ..., "parameters": ...}` as a whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MISTRAL = "[TOOL_CALLS]"

QUOTES = {"<think>": "</think>", "```": "```", "~~~": "~~~"}
"""Opening and closing markers of text in which calls are only quoted."""

XML_CALL = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
XML_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|$))", re.DOTALL)
MISTRAL_NAME = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\{)")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """The call in OpenAI's format."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def new_id() -> str:
    """A unique id for a call."""
    return f"call_{token_hex(12)}"


Parsed = tuple[list[tuple[str, str]], int]
"""Names and arguments of calls, and their length in characters; without calls, the length of the text."""


def formats_of(template: str) -> frozenset[str]:
    """The call formats that a chat template documents; `hermes` if it documents none."""
    signs = {
        "hermes": OPENING in template and "<function=" not in template,
        "xml": "<function=" in template,
        "mistral": MISTRAL in template,
        "llama": "<|python_tag|>" in template or '{"name": function name, "parameters":' in template,
    }
    return frozenset(name for name, found in signs.items() if found) or frozenset({"hermes"})


class CallReader:
    """Splits an answer incrementally into text, to show immediately, and complete tool calls.

    Calls are decoded as JSON, so that markers within arguments are part of them. Calls within `<think>` or a code fence
    are text, and so are malformed calls (no JSON, no name) and incomplete ones at the end of the answer. White space
    around calls is dropped.

    Args:
        most: maximum number of calls; others are dropped. None: no limit.
        make_id: returns the id of a new call.
        formats: see `formats_of`.
        names: of the available tools; an answer that is entirely JSON is a call only with one of these names.
        thinking: whether the template opens `<think>` before the answer.
    """

    show_special = False
    """The answer's text must not contain special tokens."""

    def __init__(
        self,
        most: int | None = None,
        make_id: Callable[[], str] = new_id,
        formats: Collection[str] = ("hermes",),
        names: Collection[str] = (),
        thinking: bool = False,
    ) -> None:
        self.most, self.make_id, self.formats, self.names = most, make_id, formats, names
        self.calls: list[Call] = []
        self._held = ""
        self._said = False
        self._quoted = "</think>" if thinking else None
        self._bare = "llama" in formats
        openings = [OPENING] * bool({"hermes", "xml"} & set(formats)) + [MISTRAL] * ("mistral" in formats)
        self._markers = [*openings, *QUOTES]

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """Add text of the answer; returns the text to show and the calls to report."""
        self._held += text
        return self._advance(last=False)

    def finish(self) -> tuple[str, list[Call]]:
        """End the answer; returns the remaining text and calls."""
        shown, calls = self._advance(last=True)
        rest, self._held = self._held.rstrip() if self.calls else self._held, ""
        return shown + self._text(rest), calls

    def _advance(self, last: bool) -> tuple[str, list[Call]]:
        shown, calls = "", list[Call]()
        while True:
            start, marker = self._next()
            if marker is None:
                break
            end = start + len(marker)
            if marker == self._quoted or marker in QUOTES:
                self._quoted = None if marker == self._quoted else QUOTES[marker]
                shown += self._text(self._held[:end])
                self._held = self._held[end:]
                continue
            parsed = self._parse(marker, self._held[end:], last)
            if parsed is None:
                break
            before, called = self._held[:start], self._held[start : end + parsed[1]]
            self._held = self._held[end + parsed[1] :]
            if not parsed[0]:
                shown += self._text(before + called)
                continue
            shown += self._text(before.rstrip())
            for name, arguments in parsed[0]:
                if self.most is None or len(self.calls) < self.most:
                    self.calls.append(Call(self.make_id(), name, arguments))
                    calls.append(self.calls[-1])
        return shown + self._text(self._release()), calls

    def _next(self) -> tuple[int, str | None]:
        """The position of the next relevant marker, and the marker."""
        if self._bare:
            stripped = self._held.lstrip()
            if not stripped.startswith("{"):
                self._bare = not stripped
                return self._next() if stripped else (len(self._held), None)
            return len(self._held) - len(stripped), ""
        markers = [self._quoted] if self._quoted else self._markers
        places = [(place, marker) for marker in markers if (place := self._held.find(marker)) >= 0]
        return min(places, default=(len(self._held), None))

    def _parse(self, marker: str, body: str, last: bool) -> Parsed | None:
        """Parse the calls after a marker; None: more text is needed."""
        if marker == "":
            parsed = self._bare_calls(body, last)
            self._bare = parsed is None
            return parsed
        if marker == MISTRAL:
            return _mistral(body, last)
        closing = body.find(CLOSING)
        if closing < 0 and not last:
            return None
        if "xml" in self.formats and (found := XML_CALL.match(body)):
            closed = body.startswith(CLOSING, found.end())
            if not closed and not last and CLOSING.startswith(body[found.end() :]):
                return None
            if closed or (last and found.end() == len(body)):
                given = {key: value for key, value in XML_PARAMETER.findall(found[2].strip())}
                return [(found[1], _written({key: _value(value) for key, value in given.items()}))], found.end() + (
                    len(CLOSING) if closed else 0
                )
        elif "xml" in self.formats and body.lstrip().startswith("<function=") and not last:
            return None
        return self._hermes(body, closing, last)

    def _hermes(self, body: str, closing: int, last: bool) -> Parsed | None:
        text = len(body) if closing < 0 else closing + len(CLOSING)
        try:
            value, end = DECODER.raw_decode(body, len(body) - len(body.lstrip()))
            call = _call(value)
        except json.JSONDecodeError as error:
            # The marker is within an argument: the JSON ends inside a string.
            return None if not last and _unfinished(error, body) else ([], text)
        except (ValueError, RecursionError):
            return [], text
        end += len(body[end:]) - len(body[end:].lstrip())
        closed = body.startswith(CLOSING, end)
        if call is not None and not closed and not last and CLOSING.startswith(body[end:]):
            return None
        # In some templates the closing marker ends the turn and is not in the answer's text.
        if call is None or not (closed or (last and end == len(body))):
            return [], text
        return [call], end + (len(CLOSING) if closed else 0)

    def _bare_calls(self, body: str, last: bool) -> Parsed | None:
        found, place = list[tuple[str, str]](), 0
        while place < len(body):
            try:
                value, end = DECODER.raw_decode(body, place)
                call = _call(value)
            except json.JSONDecodeError as error:
                return None if not last and _unfinished(error, body) else ([], 0)
            except (ValueError, RecursionError):
                return [], 0
            if call is None or call[0] not in self.names:
                return [], 0
            found.append(call)
            rest = body[end:].lstrip()
            if rest and not rest.startswith(";"):
                return [], 0
            place = len(body) - len(rest[1:].lstrip()) if rest else len(body)
        return (found, len(body)) if last else None

    def _release(self) -> str:
        """Take the part of the pending text in which no call can begin."""
        start, marker = self._next()
        if marker is None:
            markers = [self._quoted] if self._quoted else self._markers
            sizes = [
                size
                for one in markers
                for size in range(1, min(len(one) - 1, len(self._held)) + 1)
                if self._held.endswith(one[:size])
            ]
            start = len(self._held) - max(sizes, default=0)
        # White space before a call is dropped with it.
        ready = self._held[:start].rstrip()
        self._held = self._held[len(ready) :]
        return ready

    def _text(self, text: str) -> str:
        """The text to show, without leading white space between and after calls."""
        if self.calls and not self._said:
            text = text.lstrip()
        self._said = self._said or bool(text)
        return text


def _unfinished(error: json.JSONDecodeError, body: str) -> bool:
    return error.msg.startswith("Unterminated string") or error.pos >= len(body.rstrip()) - 5


def _mistral(body: str, last: bool) -> Parsed | None:
    named = MISTRAL_NAME.match(body)
    begin = named.end() if named else len(body) - len(body.lstrip())
    if named is None and not body.startswith("[", begin):
        waits = not last and re.fullmatch(r"\s*[\w.-]*(\[[\w\]]*)*", body) is not None
        return None if waits else ([], 0)
    if not last and not body.rstrip().endswith(("]", "}")):
        # Decode only possibly complete lists, not a long list at each of its tokens.
        return None
    try:
        value, end = DECODER.raw_decode(body, begin)
        values = [{"name": named[1], "arguments": value}] if named else value
        calls = [_call(one) for one in values] if isinstance(values, list) else []
    except json.JSONDecodeError as error:
        return None if not last and _unfinished(error, body) else ([], 0)
    except (ValueError, RecursionError):
        return [], 0
    whole = [call for call in calls if call is not None]
    return (whole, end) if whole and len(whole) == len(calls) else ([], end)


def _call(parsed: Any) -> tuple[str, str] | None:
    if not isinstance(parsed, dict) or not isinstance(parsed.get("name"), str) or not parsed["name"]:
        return None
    arguments = parsed.get("arguments", parsed.get("parameters", {}))
    if isinstance(arguments, str):
        # Some models write the arguments as a JSON string.
        arguments = json.loads(arguments, parse_constant=_no_constant)
    return (parsed["name"], _written(arguments)) if isinstance(arguments, dict) else None


def _written(arguments: dict[str, Any]) -> str:
    written = json.dumps(arguments, ensure_ascii=False)
    # Unpaired surrogates can't be sent.
    written.encode()
    return written


def _value(text: str) -> Any:
    """The value of a parameter: parsed JSON, or the text if it is no JSON or a JSON string."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value
