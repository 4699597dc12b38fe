"""Layout `compact`: what it writes, what it leaves alone, and what erasers refuse."""

from __future__ import annotations

from functools import cache as once

import pytest
import torch

from kveraser.cache.editable import NO_TOKEN
from kveraser.cache.probe import concat_kv
from kveraser.errors import BackboneError, KVEraserError, MethodError, RotationError
from kveraser.methods import make_method
from kveraser.methods.kveraser import run_eraser
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import EraserSettings
from kveraser.steering.layouts import SLOT_EMBEDDINGS, between
from kveraser.text.spans import Span
from tests.methods.test_methods import (
    CHANGE,
    END,
    LENGTH,
    MIDDLE,
    SPANS,
    TOKENS,
    TOLERANCE,
    equal_bits,
    erase,
    own_keys_moved_by,
    states,
    values,
)
from tests.tiny import (
    DEVICE,
    ROTARY_FAMILIES,
    attach_random_eraser,
    distance,
    random_tokens,
    same_bits,
    snapshot,
    tiny_backbone,
)

SLOTS = 4
COMPACT = EraserSettings("compact", slots=SLOTS)
SAME = 1e-5


@once
def trained(settings: EraserSettings, family: str = "llama", scale: float = 0.2) -> Backbone:
    """A backbone with an eraser for `settings`, whose B is random, or zero with `scale` 0."""
    backbone = tiny_backbone(family)
    attach_random_eraser(backbone, settings=settings, scale=scale)
    return backbone


@pytest.mark.parametrize("place", SPANS)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_compact_puts_its_slots_in_the_spans_place_and_closes_the_gap(family: str, place: str) -> None:
    span, backbone = SPANS[place], trained(COMPACT, family)
    before = backbone.prefill(TOKENS)
    erased, _ = erase(backbone, "kveraser", span)
    cache, behind, length = erased.cache, span.start + SLOTS, LENGTH - len(span)
    assert cache.length == length + SLOTS and erased.recomputed == SLOTS and not erased.exact
    assert erased.slots == (*range(span.start), *[NO_TOKEN] * SLOTS, *range(span.end, LENGTH))
    positions = cache.positions.tolist()
    assert [*positions[: span.start], *positions[behind:]] == list(range(length)) and erased.next_position == length
    assert positions[span.start : behind] == pytest.approx([span.start - 1 + part / 5 for part in (1, 2, 3, 4)])
    assert equal_bits(states(cache, 0, span.start), states(before, 0, span.start))
    assert equal_bits(values(cache, behind), values(before, span.end))
    keys = [keys for keys, _ in cache.read(behind, cache.length)]
    own = [keys[:, :, span.end :] for keys in own_keys_moved_by(backbone, -len(span))]
    unmoved = [keys for keys, _ in before.read(span.end, LENGTH)]
    if span is not END:
        assert distance(keys, own) < TOLERANCE < CHANGE < distance(keys, unmoved)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_compact_states_are_those_of_tokens_behind_the_span(family: str) -> None:
    # With B = 0 and the embeddings of words, the slots are those words, read behind the span.
    words, backbone = random_tokens(SLOTS, 5), trained(COMPACT, family, scale=0)
    with torch.no_grad():
        extras = backbone.require_eraser().extras[SLOT_EMBEDDINGS]
        extras.copy_(backbone.model.get_input_embeddings()(torch.tensor(words, device=DEVICE)))
    erased, _ = erase(backbone, "kveraser")
    inside = erased.cache.positions[MIDDLE.start : MIDDLE.start + SLOTS]
    whole = backbone.new_cache()
    positions = torch.cat([torch.arange(MIDDLE.end, dtype=torch.float64), inside])
    with whole.appending(positions):
        backbone.forward([*TOKENS[: MIDDLE.end], *words], whole, positions)
    steering = states(erased.cache, MIDDLE.start, MIDDLE.start + SLOTS)
    assert distance(steering, states(whole, MIDDLE.end)) < TOLERANCE
    learnt, _ = erase(trained(COMPACT, family), "kveraser")
    assert distance(steering, states(learnt.cache, MIDDLE.start, MIDDLE.start + SLOTS)) > CHANGE


def test_a_span_shorter_than_the_slots_has_room_for_as_many_as_it_has_tokens() -> None:
    backbone, short = trained(COMPACT), Span(14, 16)
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    erased, journal = erase(backbone, "kveraser", short, cache=cache)
    assert erased.recomputed == 2 and cache.length == LENGTH and erased.next_position == LENGTH - 2
    assert erased.slots == (*range(14), NO_TOKEN, NO_TOKEN, *range(16, LENGTH))
    with torch.no_grad():
        before_it = concat_kv(backbone.prefill(TOKENS).read(0, 16))
        embeddings = backbone.require_eraser().extras[SLOT_EMBEDDINGS][:2]
        positions = between(torch.tensor(14.0, dtype=torch.float64), 2)
        expected = run_eraser(backbone, before_it, positions, embeddings=embeddings)
    flat = [keys for keys, _ in expected] + [value for _, value in expected]
    assert distance(states(cache, 14, 16), flat) < SAME < CHANGE < distance(before["keys"], states(cache)[:3])
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)


def test_the_learned_tokens_see_prefix_and_span_and_never_the_suffix() -> None:
    backbone, cache = trained(COMPACT), trained(COMPACT).prefill(TOKENS)

    def steering() -> list[torch.Tensor]:
        fork = cache.fork()
        erase(backbone, "kveraser", cache=fork)
        return states(fork, MIDDLE.start, MIDDLE.start + SLOTS)

    reference = steering()
    for start, end, seen in ((0, 1, True), (22, 23, True), (MIDDLE.end, LENGTH, False)):
        with cache.edit() as journal:
            cache.zero_values(start, end)
        assert (distance(steering(), reference) > 10 * SAME) == seen
        cache.revert(journal)


@pytest.mark.parametrize("settings", [EraserSettings(), COMPACT], ids=["keep", "compact"])
def test_eager_attention_and_half_precision_steer_alike(settings: EraserSettings) -> None:
    reference = states(erase(trained(settings), "kveraser")[0].cache)
    eager = tiny_backbone(attn_implementation="eager")
    attach_random_eraser(eager, settings=settings)
    assert distance(states(erase(eager, "kveraser")[0].cache), reference) < TOLERANCE
    half = tiny_backbone()
    half.model.to(torch.bfloat16)
    attach_random_eraser(half, settings=settings)
    erased, _ = erase(half, "kveraser")
    rounded = states(erased.cache)
    assert {state.dtype for state in rounded} == {torch.bfloat16}
    errors = [float((one.float() - other).norm() / other.norm()) for one, other in zip(rounded, reference, strict=True)]
    assert max(errors) < 0.05


FLASH = "flash_attention_2"
REFUSALS: list[tuple[EraserSettings, str, str, type[KVEraserError], str]] = [
    (COMPACT, "llama", "kveraser('closed')", MethodError, "can't be used for closed"),
    (COMPACT, "llama", "kveraser+repair(3, 'keep')", MethodError, "can't be used for keep"),
    (EraserSettings("closed", 3), "llama", "kveraser('compact')", MethodError, "trained for layout closed"),
    (COMPACT, "gpt2", "kveraser", RotationError, "no rotary position embedding"),
    (EraserSettings(), FLASH, "follow", BackboneError, "which takes no mask of its own"),
]


@pytest.mark.parametrize(("settings", "family", "recipe", "error", "message"), REFUSALS)
def test_what_the_eraser_or_the_backbone_can_not_do_is_refused_before_any_write(
    settings: EraserSettings, family: str, recipe: str, error: type[KVEraserError], message: str
) -> None:
    backbone = tiny_backbone() if family == FLASH else trained(settings, family)
    cache = backbone.prefill(TOKENS)
    if family == FLASH:
        backbone.model.config._attn_implementation = FLASH
    before = snapshot(cache)
    with cache.edit() as journal:
        with pytest.raises(error, match=message):
            make_method(recipe).resolve(backbone)(backbone, cache, TOKENS, MIDDLE)
        assert not journal.steps and journal.bytes_written == 0
    assert same_bits(snapshot(cache), before)
    with pytest.raises(error, match=message):
        make_method(recipe).resolve(backbone)
