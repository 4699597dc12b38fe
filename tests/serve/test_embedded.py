"""The in-process engine: what is decoded together is what would be said alone, and a context is what it says it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kveraser.errors import (
    BackboneError,
    ContextLengthError,
    InputError,
    MethodError,
    SessionError,
    SessionFileError,
    SpanError,
)
from kveraser.model.backbone import Backbone
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Engine, Sampling
from kveraser.serve.held import HeldSession
from kveraser.session.erase import Change
from kveraser.text.spans import MessageRange, Span, Tokens
from tests.engines import GREEDY, alone, answer, contexts, finished, first, of, read, scripted, text_of, words
from tests.sessions import same, state
from tests.tiny import POSITIONS, tiny_backbone

SPAN = [Change(Span(10, 21))]


@pytest.fixture
def engine(erasing_backbone: Backbone) -> TransformersEngine:
    return TransformersEngine(erasing_backbone, "shift")


@pytest.fixture
def held(engine: TransformersEngine) -> HeldSession:
    return read(engine, words(60))


def complete(engine: TransformersEngine, streams: list[Any]) -> None:
    """Decode to the end of all streams."""
    while running := [stream for stream in streams if stream.finish_reason is None]:
        engine.step(running)


# Decoding together


@pytest.mark.parametrize("method", ["recompute", "auto"])
def test_long_works_let_others_in_and_nothing_changes_for_either(
    engine: TransformersEngine, held: HeldSession, method: str
) -> None:
    other, expected = read(engine, words(33, 26)), alone(read(engine, words(33, 26)))
    stream: Any = engine.begin(other, GREEDY)
    budget = 10.0 if method == "auto" else None

    def worked() -> tuple[Any, Any]:
        copy = engine.fork(held)
        receipt = engine.edit(copy, SPAN, method, budget, True)
        audit = engine.audit(copy, ["Where is item 3?"], ["21"])
        return replace(receipt, seconds=0.0, audit=None), audit.probes

    counted: list[int] = []
    engine.share_time(lambda: counted.append(1), 16)
    undisturbed = worked()
    assert len(counted) >= 12

    def step() -> None:
        if stream.finish_reason is None:
            engine.step([stream])
        # What comes in between is not divided in turn.
        assert finished(read(engine, words(40, 3)))

    engine.share_time(step, 16)
    assert worked() == undisturbed
    assert stream.tokens == expected and stream.finish_reason is not None


def test_it_is_an_engine(engine: TransformersEngine) -> None:
    checked: Engine = engine
    assert (checked.name, checked.max_positions) == ("tiny-llama", POSITIONS)


def test_streams_say_what_they_would_say_alone_whoever_joins_and_leaves(engine: TransformersEngine) -> None:
    held = contexts(engine)
    limits = [20, 3, 9, 24, 6]
    expected = [alone(context, limit) for context, limit in zip(held, limits, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) == len(expected) and [*map(len, expected)] == limits
    waiting = list(zip(held, limits, strict=True))
    streams: list[Any] = []
    running: list[Any] = []
    together = set()
    while waiting or running:
        if waiting:
            context, limit = waiting.pop(0)
            streams.append(engine.begin(context, Sampling(temperature=0.0, max_tokens=limit)))
            running.append(streams[-1])
        together.add(len(running))
        steps = engine.step(running)
        running = [stream for stream, step in zip(running, steps, strict=True) if step.finish_reason is None]
    assert [stream.tokens for stream in streams] == expected
    assert together == {1, 2, 3, 4}
    for stream, context in zip(streams, held, strict=True):
        engine.finish(stream, keep=True)
        assert finished(context)
    # What was kept is as good a context as one that was read.
    plain = held[1]
    assert plain.exact and len(plain.transcript.tokens) == 150 + len(expected[1])
    fresh = read(engine, of(plain.transcript.tokens))
    assert answer(engine, plain) == answer(engine, fresh)


def test_a_step_of_many_is_one_pass(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    held = contexts(engine)
    rows: list[int] = []
    handle = engine.backbone.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    streams = [engine.begin(context, GREEDY) for context in held]
    engine.step(streams)
    engine.step(streams[:1])
    handle.remove()
    assert rows == [5, 1]


def test_a_backbone_that_takes_no_rows_answers_one_by_one() -> None:
    backbone = tiny_backbone()
    backbone.model.set_attn_implementation("eager")
    engine = TransformersEngine(backbone)
    held = [read(engine, words(count, count)) for count in (30, 50)]
    expected = [alone(context) for context in held]
    streams = [engine.begin(context, GREEDY) for context in held]
    for _ in range(4):
        engine.step([stream for stream in streams if len(stream.tokens) < 4])
    assert [list(stream.tokens) for stream in streams] == [tokens[:4] for tokens in expected]


def test_logits_that_are_no_numbers_move_nobody(engine: TransformersEngine) -> None:
    held = contexts(engine)[:2]
    expected = [alone(context) for context in held]
    streams = [engine.begin(context, GREEDY) for context in held]
    engine.step(streams)

    def spoil(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(0, torch.tensor([1]), torch.nan)

    handle = engine.backbone.model.lm_head.register_forward_hook(spoil)
    with pytest.raises(BackboneError, match="not numbers"):
        engine.step(streams)
    handle.remove()
    complete(engine, streams)
    assert [list(stream.tokens) for stream in streams] == expected


# Prefill


def test_prefill_in_chunks_is_prefill(engine: TransformersEngine) -> None:
    held = engine.hold(words(30))
    assert held.pending == 30 and held.nbytes == 0
    left = [engine.prefill(held, 8) for _ in range(5)]
    assert left == [21, 13, 5, 0, 0] and held.pending == 1 and held.exact
    whole = engine.backbone.prefill(held.transcript.tokens[:29])
    assert held.cache.length == whole.length and held.cache.next_position == 29
    for (keys, _), (other, _) in zip(held.cache.read(0, 29), whole.read(0, 29), strict=True):
        assert torch.allclose(keys, other, atol=1e-4)


def test_what_is_added_waits_and_then_reads_on(engine: TransformersEngine) -> None:
    held, whole = read(engine, words(40, 1)), words(70, 1)
    added = replace(of(whole.tokens[40:]), messages=(MessageRange("user", 0, 30, 5, 25),))
    assert held.transcript.tokens == list(whole.tokens[:40])
    engine.append(held, added)
    assert held.pending == 31 and held.undo_steps == 1
    assert held.transcript.messages == [MessageRange("user", 40, 70, 45, 65)]
    assert held.transcript.offsets[-1] == (69, 70)
    while engine.prefill(held, 10):
        pass
    assert answer(engine, held) == answer(engine, read(engine, whole)) != []
    engine.undo(held, 1)
    assert held.transcript.tokens == list(whole.tokens[:40]) and held.pending == 1 and finished(held)


def test_texts_that_can_not_be_read_are_refused(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    with pytest.raises(ContextLengthError, match="1100"):
        engine.hold(words(1100))
    with pytest.raises(ContextLengthError, match="1000 tokens from position 60"):
        engine.append(held, words(1000))
    for tokens in ((), (3, 100_000), (-1,)):
        with pytest.raises(InputError):
            engine.hold(of(tokens))
        with pytest.raises(InputError):
            engine.append(held, of(tokens))
    assert same(state(held), before)


# Answers


def test_an_answer_that_is_not_kept_leaves_every_bit(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    assert answer(engine, held) == alone(held) != []
    assert same(state(held), before)
    assert answer(engine, held) == alone(held)


def test_a_kept_answer_can_be_undone(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    tokens = answer(engine, held, keep=True)
    assert held.transcript.tokens[60:] == tokens and held.undo_steps == 1 and held.pending == 1
    engine.undo(held, 1)
    assert same(state(held), before)


def test_an_answer_that_is_closed_early_keeps_what_was_said(engine: TransformersEngine, held: HeldSession) -> None:
    stream = engine.begin(held, GREEDY)
    for _ in range(3):
        engine.step([stream])
    engine.finish(stream, keep=True)
    engine.finish(stream, keep=False)
    assert held.transcript.tokens[60:] == list(stream.tokens) and len(stream.tokens) == 3 and finished(held)
    with pytest.raises(SessionError, match="finished"):
        engine.step([stream])


def test_nothing_said_is_nothing_kept(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    stream = engine.begin(held, GREEDY)
    engine.finish(stream, keep=True)
    assert same(state(held), before)
    stream, steps = scripted(engine, held, [2])
    assert [step.finish_reason for step in steps] == ["stop"] and steps[0].tokens == () and steps[0].text == ""
    engine.finish(stream, keep=True)
    assert same(state(held), before)


def test_during_an_answer_the_context_takes_nothing_else(
    engine: TransformersEngine, held: HeldSession, tmp_path: Path
) -> None:
    stream = engine.begin(held, GREEDY)
    engine.step([stream])
    before = state(held)
    calls: list[Any] = [
        lambda: engine.begin(held, GREEDY), lambda: engine.edit(held, SPAN, "mask", None, True),
        lambda: engine.append(held, words(3)), lambda: engine.prefill(held, 5), lambda: engine.truncate(held, 5),
        lambda: engine.undo(held, 1), lambda: engine.fork(held), lambda: engine.exact_copy(held),
        lambda: engine.forget_undo(held, 0), lambda: engine.drop(held, True), lambda: engine.audit(held, None, None),
        lambda: engine.save(held, tmp_path / "held"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SessionError, match="streamed"):
            call()
        assert same(state(held), before)
    engine.finish(stream, keep=False)
    assert answer(engine, held) == alone(held)


def test_an_answer_ends_at_its_limit_and_at_the_last_position(engine: TransformersEngine) -> None:
    held = read(engine, words(POSITIONS - 5))
    expected = alone(held, 50)
    stream, steps = scripted(engine, held, [50] * 30, Sampling(temperature=0.0))
    assert len(stream.tokens) == 6 >= len(expected) and steps[-1].finish_reason == "length"
    engine.finish(stream, keep=True)
    with pytest.raises(ContextLengthError):
        engine.begin(held, GREEDY)
    stream, steps = scripted(engine, read(engine, words(9)), [50] * 30, Sampling(max_tokens=4))
    assert [step.finish_reason for step in steps] == [None, None, None, "length"]
    with pytest.raises(SessionError, match="ended"):
        engine.step([stream])


def test_an_answer_needs_a_context_that_is_ready_and_sampling_that_can_be(
    engine: TransformersEngine, held: HeldSession
) -> None:
    with pytest.raises(SessionError, match="39 tokens"):
        engine.begin(engine.hold(words(40)), GREEDY)
    with pytest.raises(InputError, match="temperature"):
        engine.begin(held, Sampling(temperature=-1))
    assert answer(engine, held) == alone(held)


def pieces(backbone: Backbone, text: str) -> list[int]:
    return backbone.tokenize(text)[0]


def test_half_a_character_is_not_shown(engine: TransformersEngine, held: HeldSession) -> None:
    ship = pieces(engine.backbone, "a🙂b")
    assert len(ship) == 6
    stream, steps = scripted(engine, held, ship)
    assert [step.text for step in steps] == ["a", "", "", "", "🙂", "b"]
    assert [len(step.tokens) for step in steps] == [1, 0, 0, 0, 4, 1]
    engine.finish(stream, keep=True)
    assert held.transcript.text.endswith("a🙂b") and finished(held)


def test_a_stop_text_is_not_shown_and_not_kept(engine: TransformersEngine, held: HeldSession) -> None:
    said = pieces(engine.backbone, "ab st. stop more")
    stream, steps = scripted(engine, held, said, Sampling(max_tokens=50, stop=("stop", "zz")))
    assert "".join(step.text for step in steps) == "ab st. " and steps[-1].finish_reason == "stop"
    assert all(not step.text.endswith(("s", "st")) for step in steps)
    tokens = [token.token for step in steps for token in step.tokens]
    assert tokens == said[: len(tokens)] == list(stream.tokens)
    assert engine.tokenizer.decode(tokens) == "ab st. "
    engine.finish(stream, keep=True)
    assert held.transcript.text.endswith("ab st. ") and finished(held)


def test_what_looked_like_a_stop_text_is_shown_in_the_end(engine: TransformersEngine, held: HeldSession) -> None:
    said = pieces(engine.backbone, "a st")
    _, steps = scripted(engine, held, [*said, 2], Sampling(stop=("stop",)))
    assert [step.text for step in steps][-1] == "st" and "".join(step.text for step in steps) == "a st"
    assert sum(len(step.tokens) for step in steps) == len(said) and steps[-1].finish_reason == "stop"


def test_a_seed_gives_the_same_answer_in_any_company(engine: TransformersEngine) -> None:
    held = contexts(engine)
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=3, max_tokens=10)
    first = answer(engine, held[0], sampling)
    streams = [engine.begin(context, Sampling(max_tokens=10)) for context in held[1:]]
    streams.append(engine.begin(held[0], sampling))
    complete(engine, streams)
    assert list(streams[-1].tokens) == first
    engine.finish(streams[-1], keep=False)
    assert answer(engine, held[0], replace(sampling, seed=4)) != first


# Erasing


@pytest.mark.parametrize("method", ["recompute", "mask", "shift", "kveraser", "repair(8)", "selective"])
def test_an_erase_is_the_librarys(engine: TransformersEngine, held: HeldSession, method: str) -> None:
    before, other = state(held), read(engine, words(60))
    receipt = engine.edit(held, SPAN, method, None, True)
    assert receipt.erased == 11 and held.receipts == [receipt] and held.undo_steps == 1 and finished(held)
    assert receipt.exact == held.exact == (method == "recompute")
    other.erase(Tokens(SPAN[0].span.start, SPAN[0].span.end), method)
    for (keys, _), (expected, _) in zip(held.cache.read(0, 40), other.cache.read(0, 40), strict=True):
        assert torch.equal(keys, expected)
    assert answer(engine, held) == alone(held)
    engine.undo(held, 1)
    assert same(state(held), before)


def test_the_engines_method_is_used_where_none_is_named(engine: TransformersEngine, held: HeldSession) -> None:
    assert engine.edit(held, SPAN, None, None, True).method == "shift"
    assert engine.edit(held, [Change(Span(30, 35))], "mask", None, True).method == "mask"
    with pytest.raises(MethodError, match="max_kl"):
        engine.edit(held, [Change(Span(40, 45))], "mask", 0.1, True)


def test_a_budget_is_met(engine: TransformersEngine) -> None:
    text = " ".join(f"item {number} is in box {number * 7}." for number in range(12))
    held = read(engine, text_of(engine.backbone, text))
    receipt = engine.edit(held, [Change(Span(30, 50))], None, 1e-9, True)
    assert receipt.exact and receipt.method == "recompute" and held.exact
    assert answer(engine, held) == alone(held)
    loose = engine.edit(held, [Change(Span(60, 70))], None, 100.0, False)
    assert not loose.exact and loose.audit is not None and loose.undo_bytes == 0 and held.undo_steps == 0
    assert engine.audit(held, ["Where is item 3?"], ["21"]).kl is not None
    assert held.receipts[-1].audit is not None
    assert len(answer(engine, held)) > 0


def test_a_refused_erase_changes_nothing(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    for spans, method in (([Change(Span(50, 70))], "mask"), (SPAN, "no such"), ([Change(Span(0, 60))], "mask")):
        with pytest.raises((SpanError, MethodError)):
            engine.edit(held, spans, method, None, True)
        assert same(state(held), before)
    with pytest.raises(SessionError, match="prefill"):
        engine.edit(engine.hold(words(60)), SPAN, "mask", None, True)


def test_an_erased_last_token_leaves_the_one_before_it_to_go_on_from(
    engine: TransformersEngine, held: HeldSession
) -> None:
    before = state(held)
    engine.edit(held, [Change(Span(55, 60))], "mask", None, True)
    assert held.pending == 0
    after = state(held)
    assert answer(engine, held) == answer(engine, read(engine, first(55)))
    assert held.pending == 1 and not same(state(held), after)
    answer(engine, held, keep=True)
    engine.undo(held, 2)
    assert same(state(held), before)


def test_where_nothing_can_be_gone_on_from_an_answer_is_refused(engine: TransformersEngine, held: HeldSession) -> None:
    held.erase(Tokens(50, 60), "zero_value", force=True)
    before = state(held)
    with pytest.raises(SessionError, match="ends in what was erased"):
        engine.begin(held, GREEDY)
    assert same(state(held), before)


def test_an_exact_copy_is_a_fresh_context_of_what_is_left(engine: TransformersEngine, held: HeldSession) -> None:
    engine.edit(held, SPAN, "mask", None, True)
    made = engine.exact_copy(held)
    assert made.pending == 49 and made.receipts == held.receipts and made.transcript == held.transcript
    while engine.prefill(made, 16):
        pass
    assert made.exact and not held.exact and made.undo_steps == 0
    fresh = read(engine, of(held.live_tokens))
    assert answer(engine, made, keep=True) == answer(engine, fresh) != []
    assert len(made.transcript.tokens) > 60 == len(held.transcript.tokens)


# Snapshots


def test_a_snapshot_goes_on_where_the_context_was(
    engine: TransformersEngine, held: HeldSession, tmp_path: Path
) -> None:
    engine.edit(held, SPAN, "mask", None, True)
    path = tmp_path / "held.safetensors"
    engine.save(held, path)
    loaded = engine.load(path)
    assert loaded.pending == 1 and loaded.undo_steps == 0 and loaded.transcript == held.transcript
    assert answer(engine, loaded) == answer(engine, held) != []
    engine.append(loaded, words(5))
    waiting = tmp_path / "waiting.safetensors"
    engine.save(loaded, waiting)
    assert engine.load(waiting).pending == 6
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SessionFileError):
        engine.load(path)


def test_contexts_and_streams_of_others_are_refused(engine: TransformersEngine, held: HeldSession) -> None:
    other: Any = object()
    with pytest.raises(SessionError, match="object"):
        engine.prefill(other, 1)
    with pytest.raises(SessionError):
        engine.step([other])
