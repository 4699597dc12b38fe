"""Every example of `docs/serving.md` runs against a real server, and comes to what the page says."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kveraser.cli import serve as commands
from kveraser.serve.access import Keys
from kveraser.serve.app import Settings
from kveraser.serve.context_edits import ClearToolUses
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Held, Sampling, Stream
from kveraser.serve.errors import ServeError
from kveraser.serve.fields import Happening, KVEraserFields
from kveraser.serve.logs import configure
from kveraser.serve.rendering import read_messages
from kveraser.serve.scheduler import Scheduler
from kveraser.serve.service import Limits, Service
from tests.engines import Scripted
from tests.serve_fake import listening
from tests.tiny import tiny_backbone

PAGE = Path(__file__).parent.parent.parent / "docs" / "serving.md"
URL, MODEL = "http://127.0.0.1:8000", "smollm2-135m-instruct"
METHOD = "repair(32)"

needs_curl = pytest.mark.skipif(
    shutil.which("curl") is None or shutil.which("jq") is None, reason="the page's shell examples need curl and jq"
)


# The page


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


@cache
def sections() -> Mapping[str, Sequence[Block]]:
    """The page's code blocks by `##` heading."""
    found, heading, block, begun = defaultdict[str, list[Block]](list), "", "", 0
    lines: list[str] = []
    for number, line in enumerate(PAGE.read_text("utf-8").splitlines(), start=1):
        if block and line == "```":
            found[heading].append(Block(block, "\n".join(lines) + "\n", begun + 1))
            block = ""
        elif block:
            lines.append(line)
        elif line.startswith("## "):
            heading = line[3:]
        elif line.startswith("```"):
            block, lines, begun = line[3:], [], number
    return found


def of(heading: str, language: str) -> list[Block]:
    blocks = [block for block in sections()[heading] if block.language == language]
    assert blocks, f"the section {heading!r} has no {language}"
    return blocks


def rows(*columns: str) -> list[dict[str, str]]:
    """The rows of the page's table with these columns."""
    lines = PAGE.read_text("utf-8").splitlines()
    begin = lines.index(f"| {' | '.join(columns)} |") + 2
    found = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            return found
        found.append(dict(zip(columns, [cell.strip() for cell in line.strip("|").split("|")], strict=True)))
    raise AssertionError("the page ends with a table")


def names(cells: Sequence[str]) -> list[str]:
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# The server


class Speaking(TransformersEngine):
    """An engine whose model says what it is told, in the tokens of its tokenizer; everything else is real."""

    def __init__(self) -> None:
        super().__init__(tiny_backbone(seed=3, max_position_embeddings=8192), METHOD)
        self.name = MODEL
        self.answers: deque[str] = deque()

    def begin(self, held: Held, sampling: Sampling) -> Stream:
        stream: Any = super().begin(held, sampling)
        text = self.answers.popleft() if self.answers else "Noted."
        stream.sampler = Scripted([*self.backbone.tokenize(text)[0], min(stream.ends)])
        return stream


@dataclass
class Served:
    """A running server, and what the examples of a section left."""

    url: str
    service: Service
    engine: Speaking
    loop: asyncio.AbstractEventLoop
    namespace: dict[str, Any] = field(default_factory=dict)

    def run_python(self, heading: str) -> dict[str, Any]:
        """Run a section's Python in order; what `print` shows is what the comment behind it says."""
        printed: dict[int, list[str]] = defaultdict(list)

        def note(*values: Any) -> None:
            printed[sys._getframe(1).f_lineno].append(" ".join(map(str, values)))

        self.namespace |= {"print": note, "__name__": "example"}
        blocks = of(heading, "python")
        for block in blocks:
            # Lines as in the page, for tracebacks too.
            code = "\n" * (block.line - 1) + block.code.replace(URL, self.url)
            exec(compile(code, str(PAGE), "exec"), self.namespace)
        lines = [(block.line + place, line) for block in blocks for place, line in enumerate(block.code.splitlines())]
        said = {number: line for number, line in lines if line.lstrip().startswith(("print(", "    print("))}
        assert set(printed) == set(said), "something is printed where the page shows no print, or the other way round"
        for number, line in said.items():
            expected = line.rpartition("  # ")[2] if "  # " in line else "for example"
            if not expected.startswith("for example"):
                assert printed[number] == [expected], f"line {number}: {line.strip()}"
        self.namespace["printed"] = list(printed.values())
        return self.namespace

    def run_shell(self, heading: str) -> list[list[Any]]:
        """Run a section's shell commands in order, in one shell; for each line of output its JSON, or its text."""
        separator = "--- next ---"
        script = f"\necho '{separator}'\n".join(block.code for block in of(heading, "bash")).replace(URL, self.url)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0 and not done.stderr, done.stderr + done.stdout
        return [values(part) for part in done.stdout.split(separator)]

    def wait_until_exact(self, _: float) -> None:
        """What the page's `time.sleep` waits for."""

        async def wait() -> None:
            while any(entry.exact_wanted for entry in self.service.store.entries.values()):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(asyncio.wait_for(wait(), 60), self.loop).result()

    def tokens(self, messages: Sequence[Any]) -> int:
        """Of a request with these messages."""
        plain = [one if isinstance(one, dict) else one.model_dump(exclude_none=True) for one in messages]
        return len(read_messages(self.engine.tokenizer, plain).wanted)


def values(output: str) -> list[Any]:
    """What `jq` printed: JSON values one behind the other, or else lines."""
    text, found = output.strip(), list[Any]()
    while text:
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            value, end = text.splitlines()[0], len(text.splitlines()[0])
        found.append(value)
        text = text[end:].strip()
    return found


@contextmanager
def server(folder: Path, settings: Settings | None = None) -> Iterator[Served]:
    """A server in a thread of its own, as `kveraser serve` starts it."""
    ready: deque[Served] = deque()
    up = threading.Event()

    async def serve() -> None:
        engine = Speaking()
        service = Service(engine, Scheduler(engine), folder=folder, method=METHOD)
        async with listening(service, settings) as (host, port):
            stopped = asyncio.Event()
            served = Served(f"http://{host}:{port}", service, engine, asyncio.get_running_loop())
            served.namespace["stop"] = stopped.set
            ready.append(served)
            up.set()
            await stopped.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    served = ready[0]
    stop: Callable[[], None] = served.namespace.pop("stop")
    try:
        yield served
    finally:
        served.loop.call_soon_threadsafe(stop)
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with server(tmp_path / "sessions") as running:
        yield running


# Examples


def test_every_example_is_run() -> None:
    run = {
        "Start the server", "Ask it", "Editing the history", "The `kveraser` field of a request",
        "The `kveraser` field of a response, and its header", "Now, then exact", "Clearing old tool results",
        "LangGraph", "An agent", "Sessions", "Keys", "Limits, and errors", "Metrics and logs",
    }  # fmt: skip
    runnable = {
        heading for heading, blocks in sections().items() if {"python", "bash"} & {block.language for block in blocks}
    }
    assert runnable == run


@needs_curl
def test_start(served: Served) -> None:
    (shown,) = served.run_shell("Start the server")
    assert shown[0] == MODEL and {"contexts", "sessions", "bytes_held", "waiting", "streams"} <= set(shown[1])


def test_ask(served: Served) -> None:
    left = served.run_python("Ask it")
    *_, ended, spent = left["rest"]
    assert ended.kveraser["action"] == "append" and ended.choices[0].finish_reason == "stop"
    kept = left["answer"].usage.prompt_tokens + left["answer"].usage.completion_tokens
    assert kept - 1 <= spent.usage.prompt_tokens_details.cached_tokens < spent.usage.prompt_tokens
    assert not any(hasattr(chunk, "kveraser") for chunk in left["rest"] if chunk is not ended)


@needs_curl
def test_ask_with_curl(served: Served) -> None:
    ((reason, usage, what),) = served.run_shell("Ask it")
    assert reason == "stop" and set(what) == set(Happening.model_fields) and what["action"] == "prefill"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert what["prefilled_tokens"] == usage["prompt_tokens"]


def test_editing_the_history(served: Served) -> None:
    left = served.run_python("Editing the history")
    what, usage, messages = left["what"], left["answer"].usage, left["messages"]
    removed = [{"role": "assistant", "content": None, "tool_calls": [left["call"]]}, {"role": "tool", "content": ""}]
    size = left["wrong"].usage.prompt_tokens - served.tokens(messages[:-2])
    assert what["erased_tokens"] == size > served.tokens(removed) - served.tokens(messages[:1])
    assert what["recomputed_tokens"] == 32 and what["receipts"][0]["method"] == "repair"
    # New are the last question and the turns' ends, and nothing of what stood behind the tool result.
    assert what["prefilled_tokens"] == usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
    assert what["prefilled_tokens"] <= usage.prompt_tokens - served.tokens(messages[:-1]) + len("Noted.") + 32
    assert usage.prompt_tokens == served.tokens(messages) > 4 * what["prefilled_tokens"]
    assert "Register of last year" in what["receipts"][0]["text"][0]


@pytest.mark.parametrize(
    ("change", "action"),
    [
        (lambda all_of_it: [*all_of_it, {"role": "assistant", "content": "Noted."}, SAID], "append"),
        (lambda all_of_it: [*all_of_it[:2], *all_of_it[4:]], "erase"),
        (lambda all_of_it: [all_of_it[0], *all_of_it[3:5], *all_of_it[7:]], "erase"),
        (lambda all_of_it: [*all_of_it[:2], {**all_of_it[2], "content": "half of it"}, *all_of_it[3:]], "edit"),
        (lambda all_of_it: all_of_it, "append"),
        (lambda all_of_it: [*all_of_it[:4], SAID], "prefix"),
        (lambda all_of_it: [*all_of_it[:3], SAID, *all_of_it[3:]], "edit"),
        (lambda all_of_it: [*all_of_it[:-2], {"role": "user", "content": "And?"}], "prefix"),
        (lambda all_of_it: [{"role": "system", "content": "Another one."}, *all_of_it[1:]], "prefill"),
    ],
)
def test_the_table_of_what_is_done(served: Served, change: Callable[[list[Any]], list[Any]], action: str) -> None:
    """A row each; the page's words for them are checked by eye."""
    roles = ("user", "assistant") * 5
    said = [{"role": role, "content": f"{place}: " + chr(97 + place) * 50} for place, role in enumerate(roles)]
    messages = [{"role": "system", "content": "You are a clerk of the harbour office."}, *said[:-1]]
    actions = []
    for history in (messages, change(messages)):
        body = {"model": MODEL, "messages": history, "max_tokens": 8}
        reply = httpx2.post(f"{served.url}/v1/chat/completions", json=body).raise_for_status()
        actions.append(reply.json()["kveraser"]["action"])
    assert actions == ["prefill", action]
    table = rows("the history, against the cached one", "what is done", "`action`")
    assert action in names([row["`action`"] for row in table])


SAID = {"role": "user", "content": "This was not said before, and it is said now."}


@needs_curl
def test_the_request_field(served: Served) -> None:
    assert served.run_shell("The `kveraser` field of a request") == [[True]]
    assert names([row["field"] for row in rows("field", "meaning")]) == list(KVEraserFields.model_fields)


def test_the_response_field_and_header(served: Served) -> None:
    left = served.run_python("The `kveraser` field of a response, and its header")
    header = json.loads(left["raw"].headers["X-KVEraser"])
    assert set(header) == set(Happening.model_fields) - {"applied_edits"}
    lines = PAGE.read_text("utf-8").partition("field of a response")[2]
    table = re.findall(r"^\| `(\w+)` \|", lines.partition("`usage.")[0], re.MULTILINE)
    assert sorted(table) == sorted(Happening.model_fields)


@needs_curl
def test_the_header_with_curl(served: Served) -> None:
    ((line,),) = served.run_shell("The `kveraser` field of a response, and its header")
    name, _, value = line.partition(": ")
    assert name.lower() == "x-kveraser" and json.loads(value)["prefilled_tokens"] > 0


def test_a_receipt(served: Served) -> None:
    served.run_python("Editing the history")
    (shown,) = of("The `kveraser` field of a response, and its header", "json")
    receipt = served.namespace["what"]["receipts"][0]
    assert list(json.loads(shown.code)) == list(receipt) and receipt["undo_bytes"] == 0
    assert json.loads(shown.code)["parameters"] == receipt["parameters"]


def test_now_then_exact(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), served.wait_until_exact(seconds)))
    left = served.run_python("Now, then exact")
    assert len(waits) == 1 and left["now"].kveraser["erased_tokens"] > len(left["rumour"])
    assert left["later"].kveraser["context"] == left["now"].kveraser["context"]


def test_clearing_old_tool_results(served: Served) -> None:
    left = served.run_python("Clearing old tool results")
    plain = [message for message in left["messages"] if isinstance(message, dict)]
    results = [message["content"] for message in plain if message["role"] == "tool"]
    assert len(results) == 4 and all(results)
    erased = "".join(left["cleared"].kveraser["receipts"][0]["text"])
    assert [result in erased for result in results] == [True, True, False, False]
    (receipt,) = left["cleared"].kveraser["receipts"]
    assert receipt["inserted"] > 0 and all("[cleared]" in text for text in receipt["inserted_text"])
    assert receipt["erased"] - receipt["inserted"] == left["applied"]["cleared_input_tokens"]
    documented = names([row["field"] for row in rows("field", "meaning", "default")])
    assert documented == [name for name in ClearToolUses.model_fields if name != "type"]


def test_langgraph(served: Served) -> None:
    served.engine.answers.extend(["I have noted the meeting.", "I have noted the agenda.", "A crane, fees and a pier."])
    left = served.run_python("LangGraph")
    kept = left["app"].get_state(left["thread"]).values["messages"]
    assert [message.type for message in kept] == ["human", "ai", "human", "ai"]
    gone = left["wrong"]
    assert [message.type for message in gone] == ["human", "ai"] and gone[1].text == "I have noted the meeting."
    assert left["what"]["erased_tokens"] > sum(len(message.text) for message in gone) / 2
    # The agenda's turn behind it was not read again.
    assert left["what"]["prefilled_tokens"] < len(kept[2].text) + 60


def test_an_agent(served: Served) -> None:
    written = '<tool_call>\n{"name": "read_page", "arguments": {"page": %d}}\n</tool_call>'
    served.engine.answers.extend([*(written % page for page in range(1, 5)), "Six sails."])
    left = served.run_python("An agent")
    (shown,) = of("An agent", "text")
    assert left["text"] == "Six sails." and left["printed"] == [[shown.code.strip()]]
    call, result = (len(served.engine.backbone.tokenize(text)[0]) for text in (written % 1, left["read_page"](1)))
    for step, what in enumerate(left["steps"][1:], start=1):
        assert (what["erased_tokens"] > call + result) == (step >= 3) == bool(what["erased_tokens"])
        # New is the page that was read last, with what the template writes around it.
        assert result < what["prefilled_tokens"] < result + 80


@needs_curl
def test_sessions_with_curl(served: Served) -> None:
    made, audited, forked = served.run_shell("Sessions")
    answer, receipt, edited, steps = made
    assert answer == edited == "Noted." and steps == 0
    assert "on shelf 44" in receipt["text"][0] and receipt["method"] == "repair" and receipt["undo_bytes"] > 0
    texts, figures = audited
    assert texts == ["4970 1016 0234 5678"] and set(figures) == {"kl", "fidelity", "leak", "leak_rate", "no_harm"}
    assert figures["kl"] > 0 and None not in figures.values()
    assert forked[:3] == [8, "stop", 10] and "Is it urgent?" in forked[3] and forked[4:] == [True, 1]


def test_sessions_with_the_official_client(served: Served) -> None:
    left = served.run_python("Sessions")
    assert left["erased"]["receipt"]["text"] == ["The captain is Ada."]
    assert httpx2.get(f"{served.url}/v1/sessions").json()["data"] == []


def conversation() -> dict[str, Any]:
    """The body by which the page makes its session."""
    command = of("Sessions", "bash")[0].code
    words = shlex.split(command.partition("$(")[2].partition(" | jq")[0])
    body: dict[str, Any] = json.loads(words[words.index("--json") + 1])
    return body


def test_every_form_of_a_span(served: Served) -> None:
    with httpx2.Client(base_url=f"{served.url}/v1", timeout=60) as client:
        (forms,) = of("Sessions", "json")
        whole = client.post("/sessions", json=conversation()).raise_for_status().json()
        erased = []
        for line in forms.code.splitlines():
            copy = client.post(f"/sessions/{whole['id']}/fork").raise_for_status().json()["id"]
            receipt = client.post(f"/sessions/{copy}/erase", json=json.loads(line)).raise_for_status().json()["receipt"]
            erased.append(receipt["text"])
            view = client.get(f"/sessions/{copy}", params={"contents": True}).json()
            assert view["tokens"] - view["live_tokens"] == receipt["erased"] > 0
    text, second, pattern, messages, kept, call, characters, tokens = erased
    assert text == ["on shelf 44"] and second == ["Oslo"] and pattern == ["4970 1016 0234 5678"]
    assert len(messages) == 2 and "<|im_start|>tool" in messages[0] and "Your new address" in messages[1]
    assert len(kept) == 1 and kept[0].startswith("My card") and call == messages[:1] and len(characters) == 1
    assert 40 <= len(characters[0]) < 50 and len(tokens) == 1


def test_the_sessions_routes_are_those_of_the_api(served: Served) -> None:
    documented = {tuple(name.split()) for name in names([row["route"] for row in rows("route", "what it does")])}
    paths = httpx2.get(f"{served.url}/openapi.json").json()["paths"]
    known = {
        (method.upper(), path.replace("{session}", "{id}"))
        for path, operations in paths.items()
        for method in operations
        if path.startswith("/v1/sessions")
    }
    assert documented == known
    mentioned = set(re.findall(r"`(/[a-z0-9/]+)`", PAGE.read_text("utf-8")))
    assert {"/health", "/metrics", "/v1/models"} < mentioned
    assert mentioned <= {*paths, "/openapi.json", "/tokens"}


@needs_curl
def test_keys(tmp_path: Path) -> None:
    mine, other = re.findall(r"KVERASER_API_KEYS=(\S+)", of("Keys", "console")[0].code)[0].split(",")
    with server(tmp_path, Settings(keys=Keys([mine, other]))) as served:
        assert served.run_shell("Keys") == [["invalid_api_key", 1]]
        with httpx2.Client(base_url=served.url, headers={"Authorization": f"Bearer {mine}"}) as client:
            made = client.post("/v1/sessions", json={"text": "The captain is Ada."}).raise_for_status().json()["id"]
            assert client.get(f"/v1/sessions/{made}").is_success
            foreign = client.get(f"/v1/sessions/{made}", headers={"Authorization": f"Bearer {other}"})
            paths = ("/health", "/openapi.json", "/metrics")
            without = [httpx2.get(f"{served.url}{path}").status_code for path in paths]
    assert foreign.status_code == 404 and foreign.json()["error"]["code"] == "session_not_found"
    assert without == [200, 200, 401]


@needs_curl
def test_errors(served: Served) -> None:
    ((error,),) = served.run_shell("Limits, and errors")
    assert error["code"] == "model_not_found" and MODEL in error["message"] and error["param"] == "model"

    def below(kind: type[ServeError]) -> Iterator[type[ServeError]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    known = {(str(one.status), one.usual_code) for one in below(ServeError)}
    listed = {(row["status"], row["`code`"].strip("`") or None) for row in rows("status", "`code`", "when")}
    # What a wrong path or a wrong method gets needs no explanation.
    assert listed == known - {("404", "not_found"), ("405", "method_not_allowed")}


def test_options_and_their_defaults() -> None:
    parameters = {
        "--" + name.replace("_", "-"): parameter.default
        for name, parameter in inspect.signature(commands.serve).parameters.items()
    }
    listed = {row["option"].strip("`"): row["default"] for row in rows("option", "default", "meaning")}
    for option, default in listed.items():
        assert default == ("none" if parameters[option] is None else f"{parameters[option]:g}"), option
    page = PAGE.read_text("utf-8")
    limits = Limits()
    assert f"at most {limits.most_sessions} sessions and {limits.most_conversations} cached conversations" in page
    assert limits.conversation_seconds == 3600 and "kept for an hour after its last use" in page
    assert limits.snapshot_seconds == 10 and "at the latest ten seconds after a change" in page
    shown = set(re.findall(r"`(--[a-z-]+)", page)) - {"--json"}
    for block in (block for blocks in sections().values() for block in blocks if block.language == "console"):
        for line in block.code.splitlines():
            if "kveraser serve" in line:
                shown |= set(re.findall(r"--[a-z-]+", line))
    assert len(shown) > 15 and shown <= set(parameters)


@needs_curl
def test_metrics(served: Served) -> None:
    ((kind, counted),) = served.run_shell("Metrics and logs")
    assert kind == "text_completion"
    assert counted == 'kveraser_answers_total{action="prefill",finish_reason="length"} 1.0'
    scraped = httpx2.get(f"{served.url}/metrics").text
    for row in rows("metric", "labels", "meaning"):
        labels = names([row["labels"]])
        for name in names([row["metric"]]):
            lines = re.findall(rf"^{name}(?:_bucket)?(?:{{(.*)}})? ", scraped, re.MULTILINE)
            assert lines and {label for label in re.findall(r'(\w+)="', lines[0])} - {"le"} == set(labels), name
    kinds = set(re.findall(r'kveraser_tokens_total{kind="(\w+)"}', scraped))
    of_tokens = [row for row in rows("metric", "labels", "meaning") if "kveraser_tokens_total" in row["metric"]]
    assert kinds == set(names([row["meaning"] for row in of_tokens]))


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    loggers = [logging.getLogger(name) for name in ("kveraser.serve", "uvicorn", "uvicorn.error")]
    before = [(one.handlers, one.propagate, one.level) for one in loggers]
    stream = io.StringIO()
    configure(stream=stream)
    yield stream
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def test_a_log_line(logged: io.StringIO, tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "The secret is 7777."}]}
    with server(tmp_path) as served:
        reply = httpx2.post(f"{served.url}/v1/chat/completions", json=body)
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    (line,) = [line for line in lines if line["event"] == "request"]
    (shown,) = of("Metrics and logs", "json")
    told = json.loads(shown.code)
    assert list(line) == list(told) and line["request_id"] == reply.headers["X-Request-Id"]
    varying = {"time", "request_id", "seconds"}
    assert {name: value for name, value in line.items() if name not in varying} == {
        name: value for name, value in told.items() if name not in varying
    }
    assert "7777" not in logged.getvalue() and "Noted" not in logged.getvalue()
