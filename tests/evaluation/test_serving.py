"""The benchmark of the server: what it asks, what it compares, and that it notices when a server is wrong.

The servers are real ones, in processes of their own, of a tiny model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from evaluation.serving import history, streams, texts
from evaluation.serving.run import Measured, ServingSettings, bars, to_json
from evaluation.serving.run import run as measure
from evaluation.serving.server import Server, ServerSettings, numbers
from kveraser.cli.options import NO_ERASER
from kveraser.errors import InputError
from kveraser.model.backbone import Backbone
from tests.cli.test_cli import Run, read, run  # noqa: F401 (a fixture)

METHOD = "repair(8)"


@pytest.fixture(scope="module")
def settings(model: str) -> ServerSettings:
    return ServerSettings(model, NO_ERASER, method=METHOD).shared(memory=64, clients=2)


@pytest.fixture(scope="module")
def server(settings: ServerSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(settings, tmp_path_factory.mktemp("server")) as running:
        yield running


# What is said


def test_conversations_are_seeded_and_begin_apart(backbone: Backbone) -> None:
    one, same, other = (texts.agent_conversation(backbone.tokenizer, seed, 400, 40, 30) for seed in ("a", "a", "b"))
    assert one == same and one[0] != other[0]
    result = next(message for message in one if message["role"] == "tool")
    assert len(backbone.tokenizer.encode(result["content"], add_special_tokens=False)) == 40
    assert one.index(result) == 3 and one[-1] == {"role": "user", "content": texts.ASKED}
    held = sum(len(backbone.tokenizer.encode(message["content"], add_special_tokens=False)) for message in one)
    assert 400 <= held < 560


def test_every_sentence_is_one_of_a_kind() -> None:
    listed = texts.sentences(Random(0))
    assert len({next(listed) for _ in range(50)}) == 50


# Servers


def test_editing_runs_less_than_recomputing(server: Server, backbone: Backbone) -> None:
    found = history.measure(server, backbone, history.HistorySettings(tokens=400, result=60, repeats=1), METHOD)
    erased = {}
    for change, editing, without in zip(history.CHANGES, found.rows[::2], found.rows[1::2], strict=True):
        action = "erase" if change == "drop" else "edit"
        assert (editing.change, editing.way, editing.actions) == (change, "erase", (action,))
        assert (without.change, without.way, without.actions) == (change, "recompute", ("recompute",))
        assert editing.method == "repair" and without.method is None and without.erased_tokens == 0
        assert editing.cached_tokens > without.cached_tokens and editing.run_tokens < without.run_tokens
        assert found.ratios[change] == without.first_token_seconds / editing.first_token_seconds > 0
        erased[change] = editing.erased_tokens
    # The tool result, with the markers of its turn where the message goes; and messages of 120 tokens.
    assert 60 <= erased["placeholder"] < erased["drop"] < 90 and erased["three"] > 60 + 2 * 120
    assert found.agreement.erased == erased["drop"] and found.agreement.method == "repair"
    assert found.agreement.kl is not None and found.agreement.kl_unerased is not None
    assert 0 < found.agreement.kl != found.agreement.kl_unerased


def test_streams_are_counted(server: Server) -> None:
    found = streams.measure(server, streams.StreamSettings(streams=3, tokens=5, repeats=1))
    one, three = found.rows
    assert (one.streams, three.streams) == (1, 3)
    assert 0 < one.tokens <= 5 and 0 < three.tokens <= 15 and three.shortest <= 5
    assert found.ratio == three.rate / one.rate and three.rate == three.tokens / three.seconds


def test_metrics_are_read(server: Server) -> None:
    with server.http() as client:
        assert {"kveraser_bytes_held", "kveraser_bytes_spilled"} <= set(numbers(client))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended with code 1 before it was ready: no model"):
        Server(ServerSettings("nothing", NO_ERASER), tmp_path, (sys.executable, "-c", "raise SystemExit('no model')"))


# The command


def test_the_command_prints_bars(run: Run, model: str) -> None:  # noqa: F811
    asked = "evaluation", "serve", "--model", model, "--measure", "streams", "--streams", "2", "--answer", "3"
    result = read(run(*asked, "--repeats", "1", "--json"))
    assert result["command"] == "python -m evaluation serve" and result["settings"]["measures"] == ["streams"]
    assert result["settings"]["streams"] == {"streams": 2, "tokens": 3, "repeats": 1}
    (bar,) = result["rows"]
    assert bar["value"] == result["streams"]["ratio"] and bar["held"] == (bar["value"] >= 2)
    assert result["device"] == "cpu" and len(result["streams"]["rows"]) == 2


def test_bad_options_are_refused_before_a_model_is_loaded(run: Run) -> None:  # noqa: F811
    code, out, err = run("evaluation", "serve", "--model", "/nowhere", "--measure", "streams,nothing")
    assert code == 2 and out == "" and "nothing" in err


def test_an_unknown_measurement_is_refused(backbone: Backbone, settings: ServerSettings) -> None:
    chosen = ServingSettings(history.HistorySettings(), streams.StreamSettings())
    with pytest.raises(InputError, match="'speed'"):
        measure(backbone, settings, chosen, ["speed"])
    nothing = Measured()
    assert bars(nothing) == [] and to_json(nothing, backbone, {}, [])["rows"] == []
