"""The benchmark of the server: what it asks, what it compares, and that it notices when a server is wrong.

The servers are real ones, in processes of their own, of a tiny model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from evaluation.serving import crashes, history, soak, streams, texts
from evaluation.serving.operations import Done, Fault, Followed, LoadSettings, Operation, Said, Worker, ask
from evaluation.serving.replay import Alone, Compared, Reference
from evaluation.serving.run import Measured, ServingSettings, bars, to_json
from evaluation.serving.run import run as measure
from evaluation.serving.server import Server, ServerSettings, numbers
from kveraser.cli.options import NO_ERASER
from kveraser.errors import InputError
from kveraser.model.backbone import Backbone
from tests.cli.test_cli import Run, read, run  # noqa: F401 (a fixture)

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


# Servers


def test_erasing_runs_less_than_recomputing(server: Server, backbone: Backbone) -> None:
    found = history.measure(server, backbone, history.HistorySettings(tokens=400, result=60, repeats=1), METHOD)
    erasing, without = found.rows
    assert (erasing.way, erasing.actions, erasing.method) == ("erase", ("erase",), "repair")
    assert (without.way, without.actions, without.method) == ("recompute", ("recompute",), None)
    # The tool result and the markers of its turn.
    assert 60 <= erasing.erased_tokens < 90 and without.erased_tokens == 0
    assert erasing.cached_tokens > without.cached_tokens and erasing.run_tokens < without.run_tokens
    assert found.ratio == without.first_token_seconds / erasing.first_token_seconds > 0
    assert found.agreement.erased == erasing.erased_tokens and found.agreement.method == "repair"
    assert found.agreement.kl is not None and found.agreement.kl_unerased is not None
    assert 0 < found.agreement.kl != found.agreement.kl_unerased


def test_streams_are_counted(server: Server) -> None:
    found = streams.measure(server, streams.StreamSettings(streams=3, tokens=5, repeats=1))
    one, three = found.rows
    assert (one.streams, three.streams) == (1, 3)
    assert 0 < one.tokens <= 5 and 0 < three.tokens <= 15 and three.shortest <= 5
    assert found.ratio == three.rate / one.rate and three.rate == three.tokens / three.seconds


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


def test_metrics_are_read(server: Server) -> None:
    with server.http() as client:
        assert {"kveraser_bytes_held", "kveraser_bytes_spilled"} <= set(numbers(client))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended with code"):
        Server(ServerSettings(str(tmp_path / "nothing"), NO_ERASER), tmp_path)


# The command


def test_the_command_prints_bars(run: Run, model: str) -> None:  # noqa: F811
    asked = "evaluation", "serve", "--model", model, "--measure", "streams", "--streams", "2", "--answer", "3"
    result = read(run(*asked, "--repeats", "1", "--json"))
    assert result["command"] == "python -m evaluation serve" and result["settings"]["measures"] == ["streams"]
    assert result["settings"]["streams"] == {"streams": 2, "tokens": 3, "repeats": 1} and "soak" not in result
    (bar,) = result["rows"]
    assert bar["value"] == result["streams"]["ratio"] and bar["held"] == (bar["value"] >= 2)
    assert result["device"] == "cpu" and len(result["streams"]["rows"]) == 2


@pytest.mark.parametrize(
    ("asked", "named"), [(["--measure", "streams,nothing"], "nothing"), (["--moment", "3", "1"], "earliest")]
)
def test_bad_options_are_refused_before_a_model_is_loaded(run: Run, asked: list[str], named: str) -> None:  # noqa: F811
    code, out, err = run("evaluation", "serve", "--model", "/nowhere", *asked)
    assert code == 2 and out == "" and named in err


def test_an_unknown_measurement_is_refused(backbone: Backbone, settings: ServerSettings) -> None:
    chosen = ServingSettings(
        history.HistorySettings(), streams.StreamSettings(), soak.SoakSettings(), crashes.CrashSettings()
    )
    with pytest.raises(InputError, match="'speed'"):
        measure(backbone, settings, chosen, ["speed"])
    nothing = Measured()
    assert bars(nothing) == [] and to_json(nothing, backbone, {}, [])["rows"] == []
