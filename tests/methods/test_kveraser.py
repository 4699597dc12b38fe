"""The learned eraser: what it writes, what it leaves alone, both layouts, and the path that trains it."""

from __future__ import annotations

from functools import cache as once

import pytest
import torch

from kveraser.cache.editable import NO_TOKEN, KeyValue
from kveraser.cache.rotation import rotate_keys
from kveraser.errors import EraserError
from kveraser.methods import make_method
from kveraser.methods.kveraser import DEFAULT_WINDOW
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import Eraser, EraserSettings
from kveraser.steering.layouts import LAYOUTS, between
from kveraser.text.spans import Span
from kveraser.training.cases import TokenizedCase
from kveraser.training.distill import SplicedStore, prepare
from tests.methods.test_methods import (
    CHANGE,
    END,
    LENGTH,
    MIDDLE,
    QUERY,
    SPANS,
    TOKENS,
    TOLERANCE,
    answer,
    armed,
    changed_slots,
    equal_bits,
    erase,
    live,
    own_keys_moved_by,
    states,
    values,
)
from tests.tiny import FAMILIES, ROTARY_FAMILIES, attach_random_eraser, distance, randomize, tiny_backbone

STEERING = 1e-5
KEEP, CLOSED = "kveraser(layout='keep')", "kveraser(layout='closed')"
UNREAD_IN_LAST_LAYER = ("q_proj", "o_proj", "mlp", "dense", "c_proj")
"""Keys and values of the last layer are made before these: nothing that is cached depends on them."""


@once
def untrained(family: str) -> Backbone:
    """The family's backbone with an eraser whose B is zero."""
    backbone = tiny_backbone(family)
    backbone.eraser = Eraser.untrained(backbone.model, rank=4)
    return backbone


# The paper's layout


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_overwrites_the_interval_and_leaves_prefix_and_suffix_bit_for_bit(family: str) -> None:
    backbone, before = armed(family), armed(family).prefill(TOKENS)
    erased, journal = erase(backbone, KEEP)
    for start, end in ((0, MIDDLE.start), (MIDDLE.end, LENGTH)):
        assert equal_bits(states(erased.cache, start, end), states(before, start, end))
    steering, old = states(erased.cache, MIDDLE.start, MIDDLE.end), states(before, MIDDLE.start, MIDDLE.end)
    assert all(distance([new], [state]) > CHANGE for new, state in zip(steering, old, strict=True))
    assert erased.cache.positions.tolist() == list(range(LENGTH)) and erased.next_position == LENGTH
    assert erased.slots == (*range(MIDDLE.start), *[NO_TOKEN] * len(MIDDLE), *range(MIDDLE.end, LENGTH))
    assert erased.recomputed == len(MIDDLE) and not erased.exact
    span_bytes = backbone.prefill(TOKENS).nbytes // LENGTH * len(MIDDLE)
    assert journal.bytes == journal.bytes_written == span_bytes


@pytest.mark.parametrize("place", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_eraser_with_b_zero_writes_what_was_there(family: str, place: str) -> None:
    # Not bit for bit: a pass over the span alone uses other kernels than the prefill of the whole text did.
    backbone, before = untrained(family), untrained(family).prefill(TOKENS)
    erased, _ = erase(backbone, KEEP, SPANS[place])
    assert distance(states(erased.cache), states(before)) < STEERING
    assert distance([answer(backbone, erased.cache)], [answer(backbone, before)]) < TOLERANCE
    randomly, _ = erase(armed(family), KEEP, SPANS[place])
    assert distance(states(randomly.cache), states(before)) > CHANGE


def test_steering_depends_on_prefix_and_span_and_never_on_the_suffix() -> None:
    backbone, other = armed("llama"), list(reversed(TOKENS))

    def steering(tokens: list[int]) -> list[torch.Tensor]:
        return states(erase(backbone, KEEP, tokens=tokens)[0].cache, MIDDLE.start, MIDDLE.end)

    reference = steering(TOKENS)
    assert distance(steering([*TOKENS[: MIDDLE.end], *other[MIDDLE.end :]]), reference) < STEERING
    assert distance(steering([*other[: MIDDLE.start], *TOKENS[MIDDLE.start :]]), reference) > CHANGE
    span = range(MIDDLE.start, MIDDLE.end)
    changed = [other[slot] if slot in span else token for slot, token in enumerate(TOKENS)]
    assert distance(steering(changed), reference) > CHANGE


# The closed layout


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_closed_moves_suffix_keys_by_the_rotation_and_touches_nothing_else(family: str) -> None:
    backbone, before = armed(family), armed(family).prefill(TOKENS)
    erased, _ = erase(backbone, CLOSED)
    assert equal_bits(states(erased.cache, 0, MIDDLE.start), states(before, 0, MIDDLE.start))
    assert equal_bits(values(erased.cache, MIDDLE.end), values(before, MIDDLE.end))
    keys = [keys for keys, _ in erased.cache.read(MIDDLE.end, LENGTH)]
    own = [keys[:, :, MIDDLE.end :] for keys in own_keys_moved_by(backbone, -len(MIDDLE))]
    assert distance(keys, own) < TOLERANCE < CHANGE < distance(keys, [keys for keys, _ in before.read(23, LENGTH)])
    assert erased.next_position == LENGTH - len(MIDDLE) and not erased.exact


@pytest.mark.parametrize("place", SPANS)
def test_closed_steering_states_sit_between_prefix_and_suffix(place: str) -> None:
    span, backbone = SPANS[place], armed("llama")
    erased, _ = erase(backbone, CLOSED, span)
    positions = erased.cache.positions.tolist()
    assert positions[: span.start] == list(range(span.start))
    assert positions[span.end :] == list(range(span.start, LENGTH - len(span)))
    between = positions[span.start : span.end]
    assert between == sorted(set(between)) and span.start - 1 < between[0] and between[-1] < span.start
    steps = {round(right - left, 9) for left, right in zip(between, [*between[1:], span.start], strict=True)}
    assert steps == {round(1 / (len(span) + 1), 9)}
    backbone.extend(erased.cache, QUERY)
    first = LENGTH - len(span)
    assert erased.cache.positions[LENGTH:].tolist() == list(range(first, first + len(QUERY)))


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_fractional_positions_reach_the_rotary_embedding(family: str) -> None:
    # In the first layer a key is its token turned to its position, so the untrained eraser's is the old key, moved.
    backbone, before = untrained(family), untrained(family).prefill(TOKENS)
    old = before.read(MIDDLE.start, MIDDLE.end)[0][0]
    keys = erase(backbone, CLOSED)[0].cache.read(MIDDLE.start, MIDDLE.end)[0][0]
    rotation = backbone.rotation
    for index, position in enumerate(between(before.positions[MIDDLE.start], len(MIDDLE))):
        here, delta = old[:, :, index], float(position) - (MIDDLE.start + index)
        moved = rotate_keys(here, rotation.inverse_frequencies, rotation.conventions[0], delta)
        assert distance([keys[:, :, index]], [moved]) < STEERING
        assert index == 0 or distance([keys[:, :, index]], [here]) > CHANGE


def test_spans_are_closed_one_after_the_other() -> None:
    backbone = armed("llama")
    erased, _ = erase(backbone, CLOSED)
    again, _ = erase(backbone, CLOSED, Span(30, 35), TOKENS, erased.cache)
    held = zip(live(TOKENS, again), again.cache.positions.tolist(), strict=True)
    kept = [position for token, position in held if token != NO_TOKEN]
    assert kept == list(range(LENGTH - len(MIDDLE) - 5)) and again.next_position == len(kept)


# With repair


@pytest.mark.parametrize("layout", ["keep", "closed"])
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_kveraser_with_repair_computes_the_window_on_prefix_and_steering_states(family: str, layout: str) -> None:
    backbone, window = armed(family), 4
    steered, _ = erase(backbone, f"kveraser(layout='{layout}')")
    repaired, _ = erase(backbone, f"kveraser+repair({window}, '{layout}')")
    end = MIDDLE.end + window
    assert repaired.recomputed == len(MIDDLE) + window and repaired.slots == steered.slots
    assert equal_bits(states(repaired.cache, 0, MIDDLE.end), states(steered.cache, 0, MIDDLE.end))
    assert equal_bits(states(repaired.cache, end), states(steered.cache, end))
    assert changed_slots(values(repaired.cache)[2], values(steered.cache)[2]) == list(range(MIDDLE.end, end))
    by_hand = steered.cache.fork()
    by_hand.truncate(MIDDLE.end)
    backbone.extend(by_hand, TOKENS[MIDDLE.end : end])
    assert distance(states(repaired.cache, 0, end), states(by_hand)) < TOLERANCE


def test_an_eraser_is_used_as_it_was_trained() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings("closed", 3))
    for open_recipe, settled in (
        ("kveraser", "kveraser(layout='closed')"),
        ("kveraser+repair", "kveraser+repair(window=3, layout='closed', per_span=0.0)"),
        ("kveraser+repair(5)", "kveraser+repair(window=5, layout='closed', per_span=0.0)"),
        ("kveraser('keep')", "kveraser(layout='keep')"),
    ):
        assert str(make_method(open_recipe).resolve(backbone)) == settled
        assert equal_bits(states(erase(backbone, open_recipe)[0].cache), states(erase(backbone, settled)[0].cache))
    attach_random_eraser(backbone)
    untrained = {"window": DEFAULT_WINDOW, "layout": "keep", "per_span": 0.0}
    assert make_method("kveraser+repair").resolve(backbone).parameters == untrained


def test_the_repair_window_follows_the_span_as_it_was_trained_to() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings("keep", 2, 0.5))
    for recipe, width in (
        ("kveraser+repair", 2 + round(0.5 * len(MIDDLE))),
        ("kveraser+repair(3)", 3),
        ("kveraser+repair(per_span=0)", 2),
        ("kveraser+repair(3, per_span=1)", 3 + len(MIDDLE)),
    ):
        erased, _ = erase(backbone, recipe)
        assert erased.recomputed == len(MIDDLE) + width
        settled = make_method(recipe).resolve(backbone)
        assert settled.estimate(MIDDLE.start, len(MIDDLE), LENGTH - MIDDLE.end) == len(MIDDLE) + width


@pytest.mark.parametrize("recipe", ["kveraser", CLOSED, "kveraser+repair"])
def test_without_an_eraser_the_learned_methods_refuse(backbone: Backbone, recipe: str) -> None:
    with pytest.raises(EraserError, match="no eraser is loaded for tiny-llama"):
        erase(backbone, recipe)
    with pytest.raises(EraserError, match="no eraser is loaded"):
        make_method("kveraser").resolve(backbone)


def test_a_span_at_the_end_leaves_nothing_to_repair() -> None:
    erased, _ = erase(armed("llama"), "kveraser+repair(4, 'keep')", END)
    steered, _ = erase(armed("llama"), KEEP, END)
    assert erased.recomputed == len(END)
    assert equal_bits(states(erased.cache), states(steered.cache))


# Training


def spliced(backbone: Backbone, span: Span, layout: str) -> list[KeyValue]:
    """The steering states that a layout writes in training."""
    prefix, inside, suffix = TOKENS[: span.start], TOKENS[span.start : span.end], TOKENS[span.end :]
    queries = (((60, 61), (62, 63)),)
    case = TokenizedCase("1", "any", tuple(prefix), tuple(inside), tuple(suffix), queries, ("influence",))
    store = SplicedStore(backbone, prepare(backbone, [case]))
    LAYOUTS[layout].write(store, backbone.require_eraser().extras)
    return store.steering


@pytest.mark.parametrize(
    ("family", "layout"),
    [(family, "keep") for family in FAMILIES] + [(family, "closed") for family in ROTARY_FAMILIES],
)
def test_steering_out_of_place_equals_steering_in_place(family: str, layout: str) -> None:
    backbone = armed(family)
    for span in SPANS.values():
        cache = backbone.prefill(TOKENS)
        with torch.no_grad():
            steering = spliced(backbone, span, layout)
        flat = [keys for keys, _ in steering] + [value for _, value in steering]
        erased, _ = erase(backbone, f"kveraser(layout='{layout}')", span)
        assert distance(flat, states(erased.cache, span.start, span.end)) < STEERING
        assert distance(flat, states(cache, span.start, span.end)) > CHANGE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_reaches_every_matrix_that_steering_depends_on_and_nothing_else(family: str) -> None:
    backbone = tiny_backbone(family)
    eraser = attach_random_eraser(backbone)
    randomize(eraser, seed=3)
    steering = spliced(backbone, MIDDLE, "keep")
    sum(keys.square().sum() + value.square().sum() for keys, value in steering).backward()  # type: ignore[union-attr]
    last = f".{backbone.layers - 1}."
    matrices = eraser.parameters()
    reached = {name for name, matrix in matrices.items() if matrix.grad is not None and float(matrix.grad.norm()) > 0}
    unread = {name for name in matrices if last in name and any(f".{part}." in name for part in UNREAD_IN_LAST_LAYER)}
    assert reached == set(matrices) - unread and 0 < len(unread) < len(matrices) / 3
    others = {name: value for name, value in backbone.model.named_parameters() if name not in matrices}
    assert others and not any(value.requires_grad or value.grad is not None for value in others.values())
