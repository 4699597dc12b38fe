"""A context in this process: what is truncated was never read, and what is forgotten is nowhere."""

from __future__ import annotations

import gc

import pytest
import torch

from kveraser.errors import SessionError
from kveraser.model.backbone import Backbone
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.held import HeldSession
from kveraser.session.erase import Change
from kveraser.text.spans import Span
from tests.engines import alone, answer, finished, first, read, words
from tests.sessions import EXACT, far, same, state

SPAN = [Change(Span(10, 21))]


@pytest.fixture
def engine(erasing_backbone: Backbone) -> TransformersEngine:
    return TransformersEngine(erasing_backbone, "shift")


@pytest.fixture
def held(engine: TransformersEngine) -> HeldSession:
    return read(engine, words(60))


# Going back


def test_what_is_truncated_was_never_read(engine: TransformersEngine, held: HeldSession) -> None:
    said = answer(engine, held, keep=True)
    assert said == answer(engine, read(engine, words(60)))
    engine.truncate(held, 60)
    assert held.pending in (0, 1) and held.undo_steps == 0 and held.transcript.text == "x" * 60
    assert answer(engine, held, keep=True) == said
    engine.truncate(held, 25)
    assert held.pending == 0 and held.exact and held.transcript.offsets[-1] == (24, 25)
    assert answer(engine, held) == answer(engine, read(engine, first(25))) != []


@pytest.mark.parametrize("method", ["mask", "shift", "kveraser", "zero_value"])
@pytest.mark.parametrize("kept", [10, 15, 30])
def test_truncating_an_edited_context_keeps_the_erase_or_forgets_it(
    engine: TransformersEngine, held: HeldSession, method: str, kept: int
) -> None:
    engine.edit(held, SPAN, method, None, True)
    engine.truncate(held, kept)
    assert len(held.transcript.tokens) == kept
    assert len(held.receipts) == (kept > 10)
    assert held.live_tokens == [*words(60).tokens[:10], *words(60).tokens[21:kept]]
    engine.append(held, words(10, 5))
    while engine.prefill(held, 50):
        pass
    assert finished(held)
    if kept == 10:
        assert held.exact and far_of(held) < EXACT
    assert answer(engine, held) == alone(held)


def far_of(held: HeldSession) -> float:
    """How far a context is from a fresh prefill of its live tokens."""
    held.run_pending(1)
    return far(held)


def test_truncating_never_brings_back_what_a_notice_took_back(engine: TransformersEngine) -> None:
    held = read(engine, words(120))
    engine.edit(held, SPAN, "erratum", None, True)
    engine.append(held, words(20, 3))
    while engine.prefill(held, 50):
        pass
    engine.truncate(held, 40)
    assert held.live_tokens == [*words(120).tokens[:10], *words(120).tokens[21:40]]
    assert held.pending == 19
    while engine.prefill(held, 50):
        pass
    assert held.exact and far_of(held) < EXACT


def test_undo_steps_that_lie_behind_go_with_what_is_truncated(engine: TransformersEngine, held: HeldSession) -> None:
    before = state(held)
    engine.edit(held, SPAN, "shift", None, True)
    erased = state(held)
    answer(engine, held, keep=True)
    engine.truncate(held, 60)
    assert held.undo_steps == 1
    engine.undo(held, 1)
    assert same(state(held), before)
    engine.append(held, words(10, 4))
    while engine.prefill(held, 50):
        pass
    engine.edit(held, SPAN, "shift", None, True)
    engine.truncate(held, 60)
    assert held.undo_steps == 0
    assert held.live_tokens == [*words(60).tokens[:10], *words(60).tokens[21:]]
    assert held.cache.slot_to_token.tolist()[:48] == erased["slots"]
    for wrong in (0, -1, 61):
        with pytest.raises(SessionError, match="can't keep"):
            engine.truncate(held, wrong)


# Forgetting for good


def holds(row: torch.Tensor) -> int:
    """How many tensors in this process have `row` in their memory."""
    gc.collect()
    seen: dict[int, torch.Tensor] = {}
    for thing in gc.get_objects():
        if (
            type(thing) is torch.Tensor
            and thing.dtype == row.dtype
            and thing.dim() == 4
            and thing.shape[-1] == len(row)
        ):
            seen.setdefault(thing.untyped_storage().data_ptr(), thing)
    found = 0
    for tensor in seen.values():
        whole = torch.empty(0, dtype=row.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        rows = whole[: whole.numel() // len(row) * len(row)].view(-1, len(row))
        found += bool((rows == row).all(dim=-1).any())
    return found


def key_of(held: HeldSession, token: int) -> torch.Tensor:
    """The key of the last layer's first head at a token: a value that no other context has."""
    slot = held.cache.slot_to_token.tolist().index(token)
    return held.cache.layers[-1].keys[0, 0, slot].clone()  # type: ignore[index]


@pytest.mark.usefixtures("own_objects")
@pytest.mark.parametrize("method", ["recompute", "mask", "shift", "kveraser", "repair(8)", "selective"])
def test_an_erase_that_can_not_be_undone_leaves_no_copy(engine: TransformersEngine, method: str) -> None:
    held = read(engine, words(60, 11))
    inside, behind = key_of(held, 15), key_of(held, 58)
    engine.edit(held, [Change(Span(30, 34))], "shift", None, undoable=True)
    earlier = held.state.history[-1].journal
    assert holds(inside) == 1 and earlier is not None and earlier.bytes > 0
    engine.edit(held, SPAN, method, None, undoable=True)
    assert holds(inside) >= 1 and held.undo_steps == 2
    engine.undo(held, 1)
    receipt = engine.edit(held, SPAN, method, None, undoable=False)
    assert receipt.undo_bytes == 0 == held.receipts[-1].undo_bytes and held.undo_steps == 0
    assert holds(inside) == 0 and holds(behind) <= 1
    assert all(not bool(states.any()) for step in earlier.steps for pair in step.states for states in pair
               if states is not None)  # fmt: skip
    assert answer(engine, held) == alone(held)


@pytest.mark.usefixtures("own_objects")
def test_a_shorter_undo_window_overwrites_what_it_leaves_out(engine: TransformersEngine) -> None:
    held = read(engine, words(60, 12))
    first, second = key_of(held, 15), key_of(held, 40)
    engine.edit(held, SPAN, "mask", None, True)
    between = state(held)
    kept = holds(second)
    engine.edit(held, [Change(Span(38, 42))], "mask", None, True)
    forked = engine.fork(held)
    assert holds(first) == 2 and holds(second) == kept + 1
    engine.forget_undo(held, 1)
    assert holds(first) == 1 and holds(second) == kept + 1 and held.undo_steps == 1
    engine.undo(held, 1)
    assert same(state(held), between | {"history": 0})
    # The other has its own.
    engine.undo(forked, 2)
    assert forked.live_tokens == list(words(60, 12).tokens) and torch.equal(key_of(forked, 15), first)
    with pytest.raises(SessionError):
        engine.undo(held, 1)


@pytest.mark.usefixtures("own_objects")
def test_a_wiped_context_is_nowhere(engine: TransformersEngine) -> None:
    held = read(engine, words(60, 13))
    row = key_of(held, 15)
    buffers = [layer.keys for layer in held.cache.layers]
    engine.edit(held, SPAN, "mask", None, True)
    assert holds(row) == 1
    engine.drop(held, wipe=True)
    assert holds(row) == 0 and held.nbytes == 0 and not any(bool(buffer.any()) for buffer in buffers)  # type: ignore[union-attr]


def test_bytes_count_what_undo_holds(engine: TransformersEngine, held: HeldSession) -> None:
    before = held.nbytes
    receipt = engine.edit(held, SPAN, "mask", None, True)
    # Slots that are free again are still there.
    assert receipt.undo_bytes > 0 and held.nbytes == before + receipt.undo_bytes
    engine.forget_undo(held, 0)
    assert held.nbytes == before == held.cache.capacity * held.backbone.bytes_per_token


def test_a_context_takes_what_was_set_aside_for_it_and_no_more(engine: TransformersEngine) -> None:
    def most(tokens: int) -> int:
        return (tokens + engine.spare_tokens) * engine.bytes_per_token

    held = read(engine, words(300, 4))
    assert 300 * engine.bytes_per_token <= held.nbytes <= most(300)
    for seed in range(4):
        # Buffers that grow by themselves would grow by half.
        engine.append(held, words(60, seed))
        while engine.prefill(held, 50):
            pass
        assert held.nbytes <= most(len(held.transcript.tokens))
    said = answer(engine, held, keep=True)
    assert held.nbytes <= most(540 + len(said))
    forked = engine.fork(held)
    receipt = engine.edit(forked, SPAN, "erratum", None, False)
    assert receipt.recomputed > 0 and forked.nbytes <= most(540 + len(said) + receipt.recomputed)
