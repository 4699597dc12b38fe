"""The stress tools find a right server right and a wrong one wrong. The servers are real processes of a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evaluation.serving import texts
from evaluation.serving.server import Server, ServerSettings
from kveraser.cli.options import NO_ERASER
from kveraser.model.backbone import Backbone
from tests.stress import __main__ as command
from tests.stress import crashes, soak
from tests.stress.operations import Done, Fault, Followed, LoadSettings, Operation, Said, Worker, ask
from tests.stress.replay import Alone, Compared, Reference

LOAD = LoadSettings(turn=12, most_tokens=500, answer=6)
METHOD = "repair(8)"


@pytest.fixture(scope="module")
def settings(model: str) -> ServerSettings:
    return ServerSettings(model, NO_ERASER, method=METHOD).shared(memory=64, clients=2)


@pytest.fixture(scope="module")
def server(settings: ServerSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(settings, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def reference(backbone: Backbone) -> Iterator[Reference]:
    with Reference(backbone) as alone:
        yield alone


@pytest.fixture
def worker(server: Server, backbone: Backbone) -> Iterator[Worker]:
    with server.http() as client:
        yield Worker(client, backbone.tokenizer, Random(5), LOAD, 2)


def said(text: str, logprobs: tuple[float, ...], gaps: tuple[float, ...]) -> Said:
    return Said(text, tuple(text), logprobs, gaps)


# What is compared


def test_answers_agree_when_they_are_the_same_or_part_at_a_tie() -> None:
    served = said("abc", (-1.0, -2.0, -3.0), (1.0, 1.0, 1.0))
    same = Compared.of(said("abc", (-1.0, -2.5, -3.0), (1.0, 1.0, 1.0)), served)
    assert same.same and same.agree and same.largest == 0.5
    tie = Compared.of(said("axc", (-1.25, -2.0, -9.0), (1.0, 1e-5, 1.0)), served)
    assert not tie.same and tie.agree and tie.largest == 0.25, "behind the first difference nothing is compared"
    assert not Compared.of(said("axc", (-1.0, -2.0, -3.0), (1e-5, 0.5, 1e-5)), served).agree
    # One ends where the other goes on, and only that one tells how sure it was.
    assert not Compared.of(said("ab", (-1.0, -2.0), (1.0, 1.0)), served).agree
    assert Compared.of(said("ab", (-1.0, -2.0), (1.0, 1.0)), replace(served, gaps=(1.0, 1.0, 1e-6))).agree


def conversation(backbone: Backbone, seed: int = 0) -> Operation:
    return Operation("create", {"messages": texts.short_conversation(backbone.tokenizer, Random(seed), 12)})


ERASE = Operation("erase", {"spans": [{"message": 3}], "method": "shift", "undoable": True})
QUESTION = ask(texts.QUESTIONS[0], 6)


def answered(reference: Reference, *operations: Operation) -> list[Done]:
    """What a right server would have said."""
    one = Alone("right", reference)
    return [Done(operation, said=one.apply(operation)) for operation in operations]


def test_a_right_server_is_found_right(backbone: Backbone, reference: Reference) -> None:
    undo = Operation("undo", {"steps": 1})
    done = answered(reference, conversation(backbone), QUESTION, ERASE, QUESTION, undo, QUESTION)
    assert done[1].said == done[5].said and done[1].said != done[3].said, "erase and undo must show in the answers"
    one = Alone("served", reference)
    one.follow(done)
    assert (one.compared, one.ties, one.unchecked, one.differences) == (3, 0, 0, [])
    assert one.largest == 0.0


@pytest.mark.parametrize("wrong", ["another session's answer", "refused", "taken"])
def test_a_wrong_server_is_found_wrong(backbone: Backbone, reference: Reference, wrong: str) -> None:
    done = answered(reference, conversation(backbone), ERASE, QUESTION)
    if wrong == "another session's answer":
        done[2] = answered(reference, conversation(backbone, 1), QUESTION)[1]
    elif wrong == "refused":
        done[1] = Done(ERASE, refused="no")
    else:
        done.append(Done(ERASE))
    one = Alone("served", reference)
    one.follow(done)
    assert {"another session's answer": 2, "refused": 1, "taken": 3}[wrong] in [
        difference.number for difference in one.differences
    ]


def test_an_undo_may_be_refused_since_undo_is_kept_for_a_while(backbone: Backbone, reference: Reference) -> None:
    undo = Operation("undo", {"steps": 1})
    done = answered(reference, conversation(backbone), ERASE)
    after = answered(reference, conversation(backbone), ERASE, QUESTION)[2]
    one = Alone("served", reference)
    one.follow([*done, Done(undo, refused="put away meanwhile"), after])
    assert one.compared == 1 and not one.differences


def test_behind_a_kept_tie_nothing_is_compared(backbone: Backbone, reference: Reference) -> None:
    keep = ask(texts.QUESTIONS[0], 6, keep=True)
    done = answered(reference, conversation(backbone), keep, QUESTION)
    assert done[1].said is not None
    other = replace(done[1].said, text="?", tokens=("?",), gaps=(0.0,))
    one = Alone("served", reference)
    one.follow([done[0], Done(keep, said=other), done[2]])
    assert (one.compared, one.ties, one.unchecked, one.parted) == (1, 1, 1, True) and not one.differences


def test_questions_before_a_fork_are_its_origins(backbone: Backbone, reference: Reference) -> None:
    done = answered(reference, conversation(backbone), QUESTION, ERASE, QUESTION)
    assert done[3].said is not None
    done[1] = Done(QUESTION, said=done[3].said)
    one = Alone("fork", reference)
    one.follow(done, inherited=3)
    assert one.compared == 1 and not one.differences


def test_a_soak_finds_a_right_server_right(server: Server, backbone: Backbone) -> None:
    found = soak.measure(server, backbone, soak.SoakSettings(sessions=4, clients=2, seconds=1.5, load=LOAD))
    assert (found.errors, found.differences, found.unchecked) == (0, 0, 0), found
    assert found.compared > 0 and found.states >= 4 and found.sessions >= 4 and found.most_held > 0
    assert found.foreign > 0
    everything, *kinds = found.rows
    assert everything.kind == soak.ALL and everything.count == sum(row.count for row in kinds)
    assert {"create", "ask", "erase"} <= {row.kind for row in kinds}
    assert all(row.p50_seconds <= row.p95_seconds <= row.most_seconds for row in found.rows)


def test_what_another_client_can_get_at_is_an_error(
    server: Server, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = server.http
    # All clients have the first one's key.
    monkeypatch.setattr(server, "http", lambda client=0: mine(0))
    found = soak.measure(server, backbone, soak.SoakSettings(sessions=2, clients=2, seconds=1.5, load=LOAD))
    assert found.foreign < found.errors and "another key's session: " in found.shown_errors[0]


def test_what_no_client_should_get_is_a_fault(worker: Worker, server: Server) -> None:
    session = worker.create()
    with server.http() as client:
        client.delete(session.path)
    with pytest.raises(Fault, match="404"):
        worker.perform(session, QUESTION)
    assert session.sent == QUESTION and len(session.done) == 1
    other = worker.create()
    refused = worker.perform(other, Operation("undo", {"steps": 9}))
    assert refused.refused is not None and other.sent is None and worker.refused == {"undo": 1}


def test_only_what_was_acknowledged_is_back(worker: Worker, server: Server, reference: Reference) -> None:
    session = worker.create()
    worker.perform(session, ERASE)
    worker.perform(session, QUESTION)

    def state(seen: Followed) -> tuple[str, str]:
        return crashes.came_back(worker.client, seen, {}, reference, 6)

    def seen(**changes: Any) -> Followed:
        return replace(session, done=list(session.done), **changes)

    assert state(seen()) == ("back", "")
    assert state(seen(revision=1))[1].startswith("revision 2")
    # The erase was under way when the server was killed, and the server had done it.
    under_way = Followed(session.id, session.done[:1], 1, sent=ERASE)
    assert state(under_way) == ("back", "") and len(under_way.done) == 2 and under_way.revision == 2
    lost = Followed(session.id, session.done[:1], 2)
    assert state(lost)[0] == "wrong" and "its text is" in state(lost)[1]
    assert state(seen(id="sess_nobody"))[1].startswith("404")


def test_killed_servers_bring_sessions_back_or_say_that_they_are_gone(
    settings: ServerSettings, backbone: Backbone, tmp_path: Path
) -> None:
    chosen = crashes.CrashSettings(times=1, sessions=3, clients=2, moment=(1.0, 1.5), pause=0.05, load=LOAD)
    found = crashes.measure(settings, tmp_path, backbone, chosen)
    (row,) = found.rows
    assert found.wrong == row.wrong == 0 and not found.faults, found
    assert row.back + row.gone == row.sessions and row.acknowledged > 0


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["stress", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return int(ended.value.code or 0)


def test_the_command_prints_bars(model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked = "--model", model, "--measure", "soak", "--sessions", "2", "--clients", "2", "--seconds", "0.5", "--json"
    assert run(monkeypatch, *asked) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["command"] == command.COMMAND and result["settings"]["measures"] == ["soak"]
    assert result["settings"]["soak"]["sessions"] == 2 and "crashes" not in result
    assert [row["held"] for row in result["rows"]] == [True] * 3 and result["soak"]["sessions"] >= 2


@pytest.mark.parametrize(
    ("asked", "named"), [(["--measure", "soak,nothing"], "nothing"), (["--moment", "3", "1"], "earliest")]
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    asked: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run(monkeypatch, "--model", "/nowhere", *asked) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and named in captured.err
