"""Every family of `kveraser models` on a tiny model of its config: decoding, moved keys, edits and undo."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache as once

import pytest
import torch

from kveraser.errors import RotationError
from kveraser.measure.packing import score_together
from kveraser.methods import make_method
from kveraser.model.attention import share_heads
from kveraser.model.backbone import Backbone
from kveraser.model.decode import score
from kveraser.model.families import FAMILIES, FULL_ATTENTION, Family
from kveraser.model.support import check_config
from kveraser.serve.batch import can_step_together, step_together
from kveraser.session.session import Session
from kveraser.text.spans import Span
from tests.sessions import EXACT, TEXT, consistent, far, same, state
from tests.tiny import (
    DEVICE,
    FAMILY_SETTINGS,
    attach_random_eraser,
    distance,
    random_tokens,
    same_bits,
    snapshot,
    tiny_backbone,
    tiny_config,
)

TOKENS, SPAN = random_tokens(40, seed=3), Span(12, 20)
TOLERANCE, CHANGE = 1e-4, 1e-2
KEEPING = ("recompute", "mask", "zero_value", "blank", "kveraser(layout='keep')")
MOVING = ("shift", "repair(4)", "follow(3, 0.25, 0.5)", "selective(0.3)", "kveraser(layout='closed')")

ABSOLUTE = ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral3")
"""Queries are scaled by their position or pass a norm after their rotation, so that later layers depend on positions
and not on distances alone. A key by itself turns as in other models."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


@once
def armed(model_type: str) -> Backbone:
    """The family's backbone, with a random eraser; as `Backbone.load` leaves it on a CPU."""
    backbone = tiny_backbone(model_type, chat=False)
    share_heads(backbone.model)
    attach_random_eraser(backbone)
    return backbone


def keys_at(backbone: Backbone, first: int, tokens: Sequence[int] = TOKENS) -> list[torch.Tensor]:
    """The model's own keys of `tokens` at positions `first`, `first + 1`, ..."""
    cache, positions = backbone.new_cache(), torch.arange(len(tokens), dtype=torch.float64) + first
    with cache.appending(positions):
        backbone.forward(tokens, cache, positions)
    return [keys.clone() for keys, _ in cache.read(0, cache.length)]


def test_every_family_has_a_tiny_config() -> None:
    assert [family.model_type for family in FAMILIES] == list(FAMILY_SETTINGS) and len(FAMILIES) >= 40


@every_family
def test_cached_decoding_equals_uncached(family: Family) -> None:
    config = tiny_config(family.model_type)
    check_config(config, family.model_type)
    text = config.get_text_config(decoder=True)
    assert set(getattr(text, "layer_types", None) or FULL_ATTENTION) == set(family.layer_types)
    backbone = armed(family.model_type)
    with torch.no_grad():
        whole = backbone.model(torch.tensor([TOKENS], device=DEVICE), use_cache=False).logits[0].float()
    cache = backbone.prefill(TOKENS[:30])
    stepped = torch.cat([backbone.logits(cache, [token]) for token in TOKENS[30:]])
    assert distance([stepped], [whole[30:]]) < TOLERANCE * float(whole.std()) < CHANGE
    # Guard: the context counts, and so do its order and its positions.
    turned = backbone.logits(backbone.prefill([*reversed(TOKENS[:30])]), TOKENS[30:], keep=10)
    assert distance([turned], [whole[30:]]) > CHANGE * float(whole.std())


@every_family
def test_questions_in_one_pass_and_rows_of_a_batch_are_as_alone(family: Family) -> None:
    backbone = armed(family.model_type)
    cache, short = backbone.prefill(TOKENS), backbone.prefill(TOKENS[:25])
    pairs = [(random_tokens(5, seed=2), random_tokens(3, seed=4)), (random_tokens(4, seed=5), random_tokens(6, seed=6))]
    alone = [score(backbone, cache, *pair) for pair in pairs]
    assert distance(score_together(backbone, cache, pairs), alone) < TOLERANCE * len(TOKENS)
    if can_step_together(backbone):
        steps = torch.cat([backbone.logits(each.fork(), [token]) for each, token in ((cache, 7), (short, 9))])
        together = step_together(backbone, [cache, short], [7, 9])
        assert distance([together], [steps]) < TOLERANCE * float(steps.std()) and distance([steps[0]], [steps[1]]) > 1


@every_family
def test_keys_are_those_of_the_positions_that_the_model_is_given(family: Family) -> None:
    backbone = armed(family.model_type)
    here, there = keys_at(backbone, 0), keys_at(backbone, 300)
    assert distance(here, there) > CHANGE
    if not family.moves_keys:
        with pytest.raises(RotationError, match="Use a method that keeps positions"):
            _ = backbone.rotation
        return
    alone = keys_at(backbone, 0, TOKENS[:1]), keys_at(backbone, 300, TOKENS[:1])
    layers = 1 if family.model_type in ABSOLUTE else backbone.layers
    for (one, other), count in (((here, there), layers), (alone, backbone.layers)):
        moved, back = backbone.rotation.rotate(one, 300), backbone.rotation.rotate(other, -300)
        assert distance(moved[:count], other[:count]) < 2 * TOLERANCE
        assert distance(back[:count], one[:count]) < 2 * TOLERANCE
    # Guard: what is told apart above is there.
    assert (distance(backbone.rotation.rotate(here, 300), there) > CHANGE) == (layers == 1)
    assert ("part of each head" in family.positions) == (
        2 * backbone.rotation.inverse_frequencies.numel() < here[0].shape[-1]
    )
    conventions = {convention for convention in ("interleaved", "clockwise") if convention in family.positions}
    assert set(backbone.rotation.conventions) - {"none"} == (conventions or {"half"})
    assert ("before a norm" in family.positions) == any(scale is not None for scale in backbone.rotation.scales)
    assert ("layers without" in family.positions) == ("none" in backbone.rotation.conventions)


@every_family
def test_methods_keep_their_promise_and_are_undone_to_the_bit(family: Family) -> None:
    backbone = armed(family.model_type)
    cache = backbone.prefill(TOKENS)
    before, unerased = snapshot(cache), backbone.logits(cache.fork(), [7, 9], keep=2)
    remaining = [*TOKENS[: SPAN.start], *TOKENS[SPAN.end :]]
    fresh = backbone.prefill(remaining)
    expected = backbone.logits(fresh.fork(), [7, 9], keep=2)
    for recipe in (*KEEPING, *MOVING):
        method = make_method(recipe)
        if recipe in MOVING and not family.moves_keys:
            with pytest.raises(RotationError):
                method.resolve(backbone)
            continue
        with cache.edit() as journal:
            method.resolve(backbone)(backbone, cache, TOKENS, SPAN)
        answer = backbone.logits(cache.fork(), [7, 9], keep=2)
        scale = float(expected.std())
        assert distance([answer], [unerased]) > CHANGE * scale
        if recipe == "recompute":
            assert cache.exact and torch.equal(cache.positions, fresh.positions)
            states = [[state for pair in each.read(0, each.length) for state in pair] for each in (cache, fresh)]
            assert distance(*states) < TOLERANCE and distance([answer], [expected]) < TOLERANCE * scale
        else:
            assert not cache.exact and distance([answer], [expected]) > TOLERANCE * scale
        if recipe == "shift":
            # The first layer's keys depend on nothing but the token and its position.
            assert distance([cache.read(0, cache.length)[0][0]], [fresh.read(0, fresh.length)[0][0]]) < TOLERANCE
        cache.revert(journal)
        assert same_bits(snapshot(cache), before), recipe


@every_family
def test_a_random_script_of_edits_stays_exact_and_is_undone(family: Family) -> None:
    backbone, draw = armed(family.model_type), random.Random(family.model_type)
    session = Session(backbone, text=TEXT)
    steps, methods = [], ["recompute", "follow"] if family.moves_keys else ["recompute"]
    sentences = draw.sample([f"{sentence}." for sentence in TEXT.rstrip(".").split(". ")], 4)
    for sentence, kind in zip(sentences, draw.sample(["erase", "replace", "insert", "replace"], 4), strict=True):
        steps.append(state(session))
        method = draw.choice(methods)
        if kind == "erase":
            session.erase(sentence, method)
        elif kind == "replace":
            session.replace(sentence, "It is late in the year.", method)
        else:
            session.insert(session.transcript.text.index(sentence), "So they say. ", method)
        assert consistent(session)
    steps.append(state(session))
    # What approximate edits left is gone once everything behind the first of them is computed again.
    session.insert(0, "Note: ", "recompute")
    assert session.exact and consistent(session) and far(session) < EXACT
    for before in reversed(steps):
        session.undo()
        assert same(before, state(session))
    assert session.text == TEXT and session.exact
