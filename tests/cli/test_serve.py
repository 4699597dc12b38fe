"""`kveraser serve`: a whole server over a tiny model, and what it refuses to start with."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from kveraser.cli import main as cli

Run = Callable[..., tuple[int, str, str]]
KEY = "alice-0123456789"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kveraser", "serve", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server in a process of its own, and its log's line that says where it listens."""
    command = [sys.executable, "-m", "kveraser", "serve", "--port", "0", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    yield process, json.loads(line)
                    return
            raise AssertionError(f"the server ended with {process.wait()}")
        finally:
            process.kill()


def stopped(process: subprocess.Popen[str], how: signal.Signals) -> tuple[int, str]:
    """How the server ends, and what it writes until then."""
    process.send_signal(how)
    assert process.stderr is not None
    said = process.stderr.read()
    return process.wait(60), said


def test_a_server_answers_and_its_sessions_are_there_again(model: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    arguments = ["--model", model, "--sessions", str(tmp_path / "sessions"), "--api-keys", str(keys), "--name", "tiny"]
    with started(*arguments) as (process, line):
        assert (line["model"], line["keys"]) == ("tiny", 1) and line["url"].startswith("http://127.0.0.1:")
        with openai.OpenAI(api_key=KEY, base_url=f"{line['url']}/v1", max_retries=0) as client:
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Where is it?"}], max_tokens=3, temperature=0
            )
            assert answer.usage is not None and answer.usage.completion_tokens <= 3
            made: Any = client.post("/sessions", body={"text": "The ship left at noon."}, cast_to=object)
            erased: Any = client.post(
                f"/sessions/{made['id']}/erase", body={"spans": ["at noon"], "method": "recompute"}, cast_to=object
            )
            assert erased["receipt"]["exact"] is True
        code, said = stopped(process, signal.SIGINT)
        assert code == 0 and "stopped" in said and "Traceback" not in said and "noon" not in said
    with started(*arguments) as (process, line):
        with openai.OpenAI(api_key=KEY, base_url=f"{line['url']}/v1", max_retries=0) as client:
            back: Any = client.get(f"/sessions/{made['id']}?contents=true", cast_to=object)
            assert "noon" not in back["text"] and "The ship left" in back["text"]
        with (
            openai.OpenAI(api_key="wrong-0123456789", base_url=f"{line['url']}/v1", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_a_port_in_use_is_said_before_anything_is_loaded(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        code, out, err = run("--model", "/nowhere", "--port", str(bound.getsockname()[1]))
    assert code == 1 and not out and "can't listen on 127.0.0.1" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "--without-keys"),
        (["--method", "magic"], 2, "no method 'magic'"),
        (["--log-level", "loud"], 2, "--log-level"),
        (["--port", "-1"], 2, "--port"),
        (["--api-keys", "/nowhere"], 1, "can't read the API keys"),
        (["--port", "0", "--model", "/nowhere"], 1, "/nowhere"),
    ],
)
def test_what_can_not_be_served_ends_in_one_line(
    run: Run, arguments: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVERASER_API_KEYS", raising=False)
    ended, out, err = run(*arguments)
    assert ended == code and not out and said in err and len(err.splitlines()) == 1


def test_a_short_key_in_the_environment_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVERASER_API_KEYS", "short")
    code, _, err = run("--model", "/nowhere")
    assert code == 1 and "API key 1" in err and "short" not in err


def test_names_that_point_elsewhere_are_refused_only_on_this_machine() -> None:
    from kveraser.cli.serve import _names

    assert _names("127.0.0.1", None) == {"127.0.0.1", "localhost", "::1"}
    assert _names("0.0.0.0", None) is None
    assert _names("0.0.0.0", ["Box.example"]) == {"127.0.0.1", "localhost", "::1", "0.0.0.0", "box.example"}
