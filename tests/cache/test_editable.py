"""The editable cache: growth, writing in place, undo bit for bit, the ledger of exactness, use by transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
import torch

from kveraser.cache import editable as cache_module
from kveraser.cache import layer as layer_module
from kveraser.cache.editable import EditableCache
from kveraser.cache.layer import GROWTH_MULTIPLE
from kveraser.cache.probe import concat_kv
from kveraser.errors import CacheError
from kveraser.model.backbone import Backbone
from tests.tiny import DEVICE, distance, random_tokens, same_bits, snapshot

LENGTH = 40
TOKENS = random_tokens(LENGTH)
QUERY = random_tokens(6, seed=9)
TOLERANCE = 1e-4

Primitive = Callable[[Backbone, EditableCache], None]


def overwrite(backbone: Backbone, cache: EditableCache) -> None:
    positions = torch.arange(10, 18, dtype=torch.float64) + 0.25
    with cache.overwriting(10, positions):
        backbone.forward(random_tokens(8, seed=1), cache, positions)


def overwrite_scattered(backbone: Backbone, cache: EditableCache) -> None:
    slots = torch.tensor([11, 14, 15, 20])
    with cache.overwriting_scattered(10, slots):
        mask = backbone.attention_mask(torch.arange(cache.length)[None, :] <= slots[:, None])
        backbone.forward(random_tokens(4, seed=1), cache, cache.positions[slots], mask)


def drop(backbone: Backbone, cache: EditableCache) -> None:
    cache.drop(10, 18)


def rotate(backbone: Backbone, cache: EditableCache) -> None:
    keys = [keys for keys, _ in cache.read(10, cache.length)]
    cache.rotate(10, cache.length, backbone.rotation.rotate(keys, 5), 5)


def zero_values(backbone: Backbone, cache: EditableCache) -> None:
    cache.zero_values(10, 18)


def truncate(backbone: Backbone, cache: EditableCache) -> None:
    cache.truncate(12)


def append(backbone: Backbone, cache: EditableCache) -> None:
    backbone.extend(cache, random_tokens(5, seed=2))


def truncate_and_append(backbone: Backbone, cache: EditableCache) -> None:
    cache.truncate(12)
    backbone.extend(cache, random_tokens(40, seed=2))


def everything(backbone: Backbone, cache: EditableCache) -> None:
    for primitive in (overwrite, drop, rotate, overwrite_scattered, zero_values, truncate_and_append, drop):
        primitive(backbone, cache)


PRIMITIVES: tuple[Primitive, ...] = (
    overwrite, overwrite_scattered, drop, rotate, zero_values, truncate, append, truncate_and_append, everything,
)  # fmt: skip


def name_of(primitive: Primitive) -> str:
    return primitive.__name__


def query_logits(backbone: Backbone, cache: Any) -> torch.Tensor:
    return backbone.logits(cache, QUERY, keep=len(QUERY))


@contextmanager
def interrupted_at(line: int, error: type[BaseException]) -> Iterator[list[int]]:
    """Raise `error` at the `line`-th line that runs in the cache's own files; yields a count of the lines run."""
    files, lines, before = {cache_module.__file__, layer_module.__file__}, [0], sys.gettrace()

    def trace_lines(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            lines[0] += 1
            if lines[0] == line:
                raise error
        return trace_lines

    sys.settrace(lambda frame, event, argument: trace_lines if frame.f_code.co_filename in files else None)
    try:
        yield lines
    finally:
        sys.settrace(before)


# Writing in place


def test_edits_write_into_the_same_buffers(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS).fork()
    before = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    unedited = snapshot(cache)
    with cache.edit() as journal:
        overwrite(backbone, cache)
    assert not same_bits(snapshot(cache), unedited)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == before
    layers, heads, head_dim = len(cache.layers), cache.layers[0].keys.shape[1], cache.layers[0].keys.shape[3]
    assert journal.bytes == 2 * layers * heads * 8 * head_dim * 4, "undo holds the eight old slots and nothing more"


def test_nbytes_counts_the_slots_in_use_and_not_the_capacity(backbone: Backbone) -> None:
    cache = backbone.new_cache(capacity=512)
    assert cache.nbytes == 0
    backbone.extend(cache, TOKENS)
    once = cache.nbytes
    backbone.extend(cache, TOKENS)
    assert once == 2 * 3 * 2 * 8 * 4 * LENGTH and cache.nbytes == 2 * once


def test_bytes_allocated_count_the_room_behind_the_slots_in_use(backbone: Backbone) -> None:
    cache = backbone.new_cache(capacity=LENGTH)
    assert cache.bytes_allocated == 0 and backbone.bytes_per_token == 2 * 3 * 2 * 8 * 4
    backbone.extend(cache, TOKENS)
    assert cache.bytes_allocated == cache.nbytes == LENGTH * backbone.bytes_per_token
    before = snapshot(cache)
    cache.reserve(LENGTH + 7)
    assert cache.capacity == LENGTH + 7 and cache.bytes_allocated == (LENGTH + 7) * backbone.bytes_per_token
    assert same_bits(snapshot(cache), before)
    cache.reserve(3)
    assert cache.capacity == LENGTH + 7
    # What nobody made room for grows by half, in steps.
    backbone.extend(cache, TOKENS[:8])
    assert cache.capacity == GROWTH_MULTIPLE


def test_scattered_overwrites_keep_the_slots_that_they_write_and_no_others(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    with cache.edit() as journal:
        overwrite_scattered(backbone, cache)
    assert journal.bytes == journal.bytes_written == 4 * backbone.bytes_per_token
    assert cache.exact_length == 10
    before = snapshot(cache)
    slots = torch.tensor([12, 19])
    keys, values = (torch.ones(1, 2, 2, 8, device=DEVICE) for _ in range(2))
    with cache.edit() as journal:
        cache.write_layer(1, slots, keys, values)
    assert not same_bits(snapshot(cache), before)
    assert journal.bytes == journal.bytes_written == 2 * backbone.bytes_per_token // len(cache.layers)
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)


# Undo


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=name_of)
def test_revert_restores_every_bit(backbone: Backbone, primitive: Primitive) -> None:
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    with cache.edit() as journal:
        primitive(backbone, cache)
    assert not same_bits(snapshot(cache), before)
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)
    assert torch.equal(query_logits(backbone, cache), query_logits(backbone, backbone.prefill(TOKENS)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("primitive", PRIMITIVES, ids=name_of)
def test_an_interrupt_at_any_line_of_an_edit_restores_every_bit(
    backbone: Backbone, primitive: Primitive, error: type[BaseException]
) -> None:
    original = backbone.prefill(TOKENS)
    before = snapshot(original)
    backbone.rotation  # noqa: B018 - measured beforehand, so that it adds no lines
    cache = original.fork()
    with cache.edit(), interrupted_at(0, error) as lines:
        primitive(backbone, cache)
    assert lines[0] > 10
    # Long primitives are interrupted at a sample of their lines, so that the test stays quick.
    for line in range(1, lines[0] + 1, max(1, lines[0] // 150)):
        cache = original.fork()
        with pytest.raises(error), cache.edit(), interrupted_at(line, error):
            primitive(backbone, cache)
        assert same_bits(snapshot(cache), before), f"interrupted at line {line} of {lines[0]}"
        with cache.edit():
            drop(backbone, cache)


def test_an_error_after_the_primitives_restores_every_bit(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    with pytest.raises(ZeroDivisionError), cache.edit():
        everything(backbone, cache)
        assert not same_bits(snapshot(cache), before)
        raise ZeroDivisionError
    assert same_bits(snapshot(cache), before)


def test_edits_revert_one_after_the_other(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    states, journals = [snapshot(cache)], []
    for primitive in PRIMITIVES:
        with cache.edit() as journal:
            primitive(backbone, cache)
        journals.append(journal)
        states.append(snapshot(cache))
        assert not same_bits(states[-1], states[-2])
    for journal, state in zip(reversed(journals), reversed(states[:-1]), strict=True):
        cache.revert(journal)
        assert same_bits(snapshot(cache), state)


# Misuse


def misuse(action: Callable[[Backbone, EditableCache], Any], message: str, inside: bool = True) -> Any:
    return pytest.param(action, message, inside, id=message.replace(" ", "-"))


def write_other_number(backbone: Backbone, cache: EditableCache, context: Any, count: int) -> None:
    with context:
        backbone.forward(random_tokens(count), cache, torch.arange(count, dtype=torch.float64))


@pytest.mark.parametrize(
    ("action", "message", "inside"),
    [
        misuse(lambda b, c: c.edit().__enter__(), "an edit is already open"),
        misuse(lambda b, c: c.revert(c._journal), "an edit is open"),
        misuse(lambda b, c: c.drop(3, 5), "need an open journal", inside=False),
        misuse(lambda b, c: c.zero_values(3, 5), "in-place edits need", inside=False),
        misuse(lambda b, c: c.set_next_position(5), "moves only inside", inside=False),
        misuse(lambda b, c: c.drop(3, LENGTH + 1), r"\[3, 41\) lie outside the cache's 40"),
        misuse(lambda b, c: c.zero_values(-1, 3), r"\[-1, 3\) lie outside"),
        misuse(lambda b, c: c.truncate(LENGTH + 1), r"\[41, 40\) lie outside"),
        misuse(lambda b, c: c.read(7, 5), r"\[7, 5\) lie outside", inside=False),
        misuse(lambda b, c: c.mark_exact(LENGTH + 1), r"lie outside the cache", inside=False),
        misuse(lambda b, c: c.overwriting(36, torch.arange(5)).__enter__(), r"\[36, 41\) lie outside"),
        misuse(
            lambda b, c: write_other_number(b, c, c.appending(torch.arange(3)), 5),
            "wrote 5 slots where 3 were announced", inside=False,
        ),
        misuse(
            lambda b, c: write_other_number(b, c, c.overwriting(10, torch.arange(3)), 5),
            "up to slot 15 where 13 is the last one allowed",
        ),
        misuse(
            lambda b, c: write_other_number(b, c, c.overwriting(10, torch.arange(5)), 3),
            "wrote 3 slots where 5 were announced",
        ),
        misuse(
            lambda b, c: write_other_number(b, c, c.overwriting_scattered(10, torch.tensor([12, 20])), 3),
            "wrote 3 slots where 2 were announced",
        ),
        misuse(
            lambda b, c: c.overwriting_scattered(10, torch.tensor([9, 12])).__enter__(),
            r"\[9, 12\] lie outside \[10, 40\)",
        ),
    ],
)  # fmt: skip
def test_misuse_is_refused_and_changes_nothing(
    backbone: Backbone, action: Callable[[Backbone, EditableCache], Any], message: str, inside: bool
) -> None:
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    with pytest.raises(CacheError, match=message):
        if inside:
            with cache.edit():
                action(backbone, cache)
        else:
            action(backbone, cache)
    assert same_bits(snapshot(cache), before)


# The ledger of exactness


def test_appends_behind_exact_slots_are_exact_and_behind_a_hole_are_not(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    assert cache.exact_length == cache.length == LENGTH
    with cache.edit():
        cache.drop(10, 18)
    assert cache.exact_length == 10
    backbone.extend(cache, QUERY)
    assert cache.exact_length == 10 and cache.next_position == LENGTH + len(QUERY)
    cache.truncate(10)
    assert cache.next_position == 18, "the next token goes where the first one forgotten was"
    backbone.extend(cache, QUERY)
    assert cache.exact_length == 10, "a fresh prefill would not leave a hole before them"


def test_truncation_lowers_the_ledger_and_appends_raise_it_again(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    cache.truncate(12)
    assert (cache.length, cache.exact_length, cache.next_position) == (12, 12, 12)
    backbone.extend(cache, TOKENS[12:])
    assert cache.exact_length == LENGTH
    fresh = backbone.prefill(TOKENS)
    assert distance([query_logits(backbone, cache)], [query_logits(backbone, fresh)]) < TOLERANCE


@pytest.mark.parametrize("lower", [overwrite, overwrite_scattered, drop, rotate, zero_values], ids=name_of)
def test_every_edit_lowers_the_ledger_to_where_it_began(backbone: Backbone, lower: Primitive) -> None:
    cache = backbone.prefill(TOKENS)
    with cache.edit():
        lower(backbone, cache)
    assert cache.exact_length == 10 < cache.length


def test_cropping_continues_where_the_first_cropped_slot_was(backbone: Backbone) -> None:
    cropped, truncated = backbone.prefill(TOKENS), backbone.prefill(TOKENS)
    for cache in (cropped, truncated):
        with cache.edit():
            cache.drop(10, 18)
    cropped.crop(-22)
    truncated.truncate(10)
    assert cropped.length == 10 and same_bits(snapshot(cropped), snapshot(truncated))


def test_marking_moves_the_ledger(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    cache.mark_inexact(7)
    assert cache.exact_length == 7
    cache.mark_inexact(9)
    assert cache.exact_length == 7
    cache.mark_exact(30)
    assert cache.exact_length == 30


# Copies and splices


def test_a_fork_and_its_source_never_write_into_each_other(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    with cache.edit():
        drop(backbone, cache)
    fork, before = cache.fork(), snapshot(cache)
    assert same_bits(snapshot(fork), before)
    with fork.edit():
        everything(backbone, fork)
    assert same_bits(snapshot(cache), before) and not same_bits(snapshot(fork), before)
    edited = snapshot(fork)
    backbone.extend(cache, QUERY)
    assert same_bits(snapshot(fork), edited)


def test_a_fork_of_an_empty_cache_is_an_empty_cache(backbone: Backbone) -> None:
    fork = backbone.new_cache().fork()
    assert fork.length == 0
    backbone.extend(fork, TOKENS)
    assert same_bits(snapshot(fork), snapshot(backbone.prefill(TOKENS)))


def test_a_splice_continues_as_the_whole_and_carries_gradients(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    parts = [
        [(keys.clone().requires_grad_(), values.clone().requires_grad_()) for keys, values in cache.read(start, end)]
        for start, end in ((0, 10), (10, 30), (30, LENGTH))
    ]
    logits = backbone.model(torch.tensor([QUERY], device=DEVICE), past_key_values=concat_kv(*parts)).logits[0]
    assert distance([logits.detach()], [query_logits(backbone, cache.fork())]) < TOLERANCE
    logits.square().mean().backward()
    gradients = [float(tensor.grad.norm()) for part in parts for pair in part for tensor in pair]
    assert len(gradients) == 3 * 3 * 2 and min(gradients) > 1e-6


def test_a_cache_born_in_inference_mode_can_be_written_outside_it(backbone: Backbone) -> None:
    with torch.inference_mode():
        cache = backbone.prefill(TOKENS).fork()
    reference = backbone.prefill(TOKENS)
    for each in (cache, reference):
        with each.edit():
            everything(backbone, each)
        backbone.extend(each, random_tokens(300, seed=4))
    assert same_bits(snapshot(cache), snapshot(reference))


# Overwriting what is left


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=name_of)
def test_a_copied_journal_reverts_after_the_first_was_wiped(backbone: Backbone, primitive: Primitive) -> None:
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    with cache.edit() as journal:
        primitive(backbone, cache)
    copied = journal.copy()
    assert copied.bytes == journal.bytes
    journal.wipe()
    states = [state for step in journal.steps for pair in step.states for state in pair if state is not None]
    assert not any(bool(state.any()) for state in states)
    cache.revert(copied)
    assert same_bits(snapshot(cache), before)


def test_wiping_unused_slots_leaves_those_in_use(backbone: Backbone) -> None:
    cache = backbone.prefill(TOKENS)
    cache.truncate(12)
    before = snapshot(cache)
    buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values) if buffer is not None]
    assert all(bool(buffer[:, :, 12:].any()) for buffer in buffers)
    cache.wipe_unused()
    assert not any(bool(buffer[:, :, 12:].any()) for buffer in buffers)
    assert same_bits(snapshot(cache), before)
    EditableCache(3).wipe_unused()
