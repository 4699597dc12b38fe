"""Layouts `compact` and `suffix`: what they are when nothing is learnt, what they leave alone, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache as once

import pytest
import torch
from pytest import MonkeyPatch

from kveraser.backbone import Backbone
from kveraser.eraser import SLOT_EMBEDDINGS, SPAN_BIAS, EraserSettings
from kveraser.errors import BackboneError, EraserError, KVEraserError, MethodError, RotationError
from kveraser.methods import NOT_LIVE, make_method
from kveraser.spans import Span
from kveraser.steering import compact_states, steering_positions, suffix_states
from tests.test_methods import (
    CHANGE,
    END,
    LENGTH,
    MIDDLE,
    SPANS,
    TOKENS,
    TOLERANCE,
    answer,
    changed_slots,
    equal_bits,
    erase,
    live,
    own_keys_moved_by,
    states,
    values,
)
from tests.tiny import (
    ROTARY_FAMILIES,
    attach_random_eraser,
    distance,
    random_tokens,
    same_bits,
    snapshot,
    tiny_backbone,
)

WINDOW, SLOTS = 6, 4
SUFFIX, COMPACT = EraserSettings("suffix", WINDOW), EraserSettings("compact", slots=SLOTS)
UNSEEN = -1e4
"""A span bias under which the span weighs nothing at all."""
SAME = 1e-5


@once
def trained(settings: EraserSettings, family: str = "llama", bias: float | None = None, scale: float = 0.2) -> Backbone:
    """A backbone with an eraser for `settings`, whose B is random, or zero with `scale` 0."""
    backbone = tiny_backbone(family)
    eraser = attach_random_eraser(backbone, settings=settings, scale=scale)
    if bias is not None:
        with torch.no_grad():
            eraser.extras[SPAN_BIAS].fill_(bias)
    return backbone


def unlearnt(family: str = "llama") -> Backbone:
    """Layout suffix with B = 0 and a span that nothing sees."""
    return trained(SUFFIX, family, UNSEEN, scale=0)


# suffix


@pytest.mark.parametrize("place", SPANS)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_suffix_with_nothing_learnt_and_nothing_seen_is_repair(family: str, place: str) -> None:
    span, backbone = SPANS[place], unlearnt(family)
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    erased, journal = erase(backbone, "kveraser", span, cache=cache)
    repaired, _ = erase(backbone, f"repair({WINDOW})", span)
    assert distance(states(cache), states(repaired.cache)) < SAME
    assert distance([answer(backbone, cache)], [answer(backbone, repaired.cache)]) < TOLERANCE
    assert torch.equal(cache.positions, repaired.cache.positions)
    assert (erased.slots, erased.recomputed, erased.next_position) == (
        repaired.slots, repaired.recomputed, repaired.next_position,
    )  # fmt: skip
    assert cache.length == LENGTH - len(span) and erased.exact == repaired.exact == (span is END)
    prefix = [state[:, :, : span.start] for state in before["keys"] + before["values"]]
    assert equal_bits(prefix, states(cache, 0, span.start))
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)
    if span is not END:
        for learnt in (trained(SUFFIX, family, 0.0, scale=0), trained(SUFFIX, family, UNSEEN)):
            assert distance(states(erase(learnt, "kveraser", span)[0].cache), states(repaired.cache)) > CHANGE


@pytest.mark.parametrize(
    "earlier",
    [[Span(26, 30)], [Span(40, 46)], [Span(3, 6)], [Span(23, 25)], [Span(3, 6), Span(26, 30), Span(40, 46)]],
    ids=["in the window", "at the end", "in the prefix", "next to the span", "all three"],
)
@pytest.mark.parametrize("window", [WINDOW, 500])
def test_suffix_after_masks_sits_where_repair_does(earlier: list[Span], window: int) -> None:
    # After a mask a slot's position is not its index, and the holes stay as they are.
    backbone, caches = unlearnt(), []
    for recipe in (f"kveraser(window={window})", f"repair({window})"):
        cache, tokens = backbone.prefill(TOKENS), TOKENS
        for span in reversed(earlier):
            masked, _ = erase(backbone, "mask", span, tokens, cache)
            tokens = live(tokens, masked)
        before = snapshot(cache)
        start = tokens.index(TOKENS[14], 8)
        erased, journal = erase(backbone, recipe, Span(start, start + len(MIDDLE)), tokens, cache)
        caches.append(snapshot(cache))
        assert not (erased.exact and recipe.startswith("kveraser"))
        cache.revert(journal)
        assert same_bits(snapshot(cache), before)
    steered, repaired = caches
    assert torch.equal(steered["positions"], repaired["positions"])
    assert steered["next_position"] == repaired["next_position"]
    assert distance(steered["keys"] + steered["values"], repaired["keys"] + repaired["values"]) < SAME


def test_spans_are_steered_one_after_the_other_as_repair_would() -> None:
    ends = []
    for recipe in ("kveraser", f"repair({WINDOW})"):
        backbone = unlearnt()
        cache, tokens = backbone.prefill(TOKENS), TOKENS
        # The second span lies in the steered tokens of the first, the third before both, the last at the end.
        for span in (MIDDLE, Span(16, 19), Span(4, 9), Span(25, 29)):
            erased, _ = erase(backbone, recipe, span, tokens, cache)
            tokens = live(tokens, erased)
        assert NOT_LIVE not in tokens and cache.positions.tolist() == list(range(cache.length))
        assert erased.next_position == cache.length == LENGTH - 9 - 3 - 5 - 4 and not erased.exact
        ends.append(states(cache))
    assert distance(*ends) < SAME


def test_the_window_follows_the_span_unless_it_is_given() -> None:
    backbone = trained(EraserSettings("suffix", 2, 0.5))
    shifted = values(erase(backbone, "shift")[0].cache)[2]
    suffix = LENGTH - MIDDLE.end
    for recipe, width in (
        ("kveraser", 2 + round(0.5 * len(MIDDLE))),
        ("kveraser(per_span=1)", 2 + len(MIDDLE)),
        ("kveraser(per_span=0)", 2),
        ("kveraser(window=5)", 5),
        ("kveraser(window=5, per_span=1)", 5 + len(MIDDLE)),
        ("kveraser(window=500)", suffix),
    ):
        erased, _ = erase(backbone, recipe)
        assert erased.recomputed == width and not erased.exact
        steered = list(range(MIDDLE.start, MIDDLE.start + width))
        assert changed_slots(values(erased.cache)[2], shifted) == steered
        settled = make_method(recipe).settled(backbone)
        assert settled.settled(backbone) == settled == make_method(str(settled))
        assert settled.estimate(MIDDLE.start, len(MIDDLE), suffix) == width
    whole, _ = erase(backbone, f"kveraser(window={suffix})")
    assert same_bits(snapshot(erased.cache), snapshot(whole.cache))


def test_steering_states_of_an_earlier_erase_stay_among_the_steered_tokens() -> None:
    compact, backbone, later = trained(COMPACT), trained(SUFFIX), Span(30, 36)
    caches = []
    for recipe in ("kveraser(window=12)", "shift"):
        steered, _ = erase(compact, "kveraser", later)
        tokens = live(TOKENS, steered)
        erased, _ = erase(backbone, recipe, MIDDLE, tokens, steered.cache)
        caches.append(erased)
    erased, shifted = caches
    assert erased.recomputed == 12 and erased.slots == shifted.slots and tokens.count(NOT_LIVE) == SLOTS
    assert torch.equal(erased.cache.positions, shifted.cache.positions) and not erased.exact
    assert erased.next_position == shifted.next_position == LENGTH - len(MIDDLE) - len(later)
    # All of the suffix's slots moved up; the states of no token stand among the twelve that were run.
    first = later.start - len(MIDDLE)
    steered_slots = [*range(MIDDLE.start, first), *range(first + SLOTS, MIDDLE.start + SLOTS + 12)]
    assert changed_slots(values(erased.cache)[2], values(shifted.cache)[2]) == steered_slots
    assert equal_bits(states(erased.cache, first, first + SLOTS), states(shifted.cache, first, first + SLOTS))
    # Next to such slots the tokens behind them are steered.
    steered, _ = erase(compact, "kveraser", Span(MIDDLE.end, 30))
    beside, _ = erase(backbone, "kveraser", MIDDLE, live(TOKENS, steered), steered.cache)
    assert beside.recomputed == WINDOW and beside.next_position == LENGTH - 16
    assert beside.cache.positions[MIDDLE.start + SLOTS :].tolist() == list(range(MIDDLE.start, LENGTH - 16))


def test_steered_tokens_see_the_prefix_the_span_and_each_other_but_nothing_later() -> None:
    backbone, other = trained(SUFFIX), list(reversed(TOKENS))

    def steered(tokens: list[int]) -> list[torch.Tensor]:
        return states(erase(backbone, "kveraser", tokens=tokens)[0].cache, MIDDLE.start + 1, MIDDLE.start + WINDOW)

    def with_others(start: int, end: int) -> list[int]:
        return [*TOKENS[:start], *other[start:end], *TOKENS[end:]]

    reference = steered(TOKENS)
    for seen in ((0, MIDDLE.start), (MIDDLE.start, MIDDLE.end), (MIDDLE.end, MIDDLE.end + 1)):
        assert distance(steered(with_others(*seen)), reference) > 10 * SAME
    assert distance(steered(with_others(MIDDLE.end + WINDOW, LENGTH)), reference) < SAME


# compact


@pytest.mark.parametrize("place", SPANS)
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_compact_puts_its_slots_in_the_spans_place_and_closes_the_gap(family: str, place: str) -> None:
    span, backbone = SPANS[place], trained(COMPACT, family)
    before = backbone.prefill(TOKENS)
    erased, _ = erase(backbone, "kveraser", span)
    cache, behind, length = erased.cache, span.start + SLOTS, LENGTH - len(span)
    assert cache.length == length + SLOTS and erased.recomputed == SLOTS and not erased.exact
    assert erased.slots == (*range(span.start), *[NOT_LIVE] * SLOTS, *range(span.end, LENGTH))
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
        extras.copy_(backbone.model.get_input_embeddings()(torch.tensor(words)))
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
    assert erased.slots == (*range(14), NOT_LIVE, NOT_LIVE, *range(16, LENGTH))
    with torch.no_grad():
        positions = steering_positions(torch.full((2,), 14.0, dtype=torch.float64), "compact")
        expected = compact_states(backbone, backbone.prefill(TOKENS).read(0, 16), positions)
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


# Both


@pytest.mark.parametrize("settings", [SUFFIX, COMPACT], ids=["suffix", "compact"])
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


@pytest.mark.parametrize("bias", [-2.0, 0.0])
@pytest.mark.parametrize("chosen", [range(WINDOW), (0, 1, 4, 9)], ids=["window", "scattered"])
def test_suffix_out_of_place_equals_in_place(bias: float, chosen: Sequence[int], monkeypatch: MonkeyPatch) -> None:
    backbone = trained(SUFFIX, bias=bias)
    for span in (SPANS["start"], MIDDLE):
        slots, length = [span.end + place for place in chosen], LENGTH - span.end
        monkeypatch.setattr("kveraser.methods.kveraser.most_contaminated", lambda *_, slots=slots: slots)
        others = torch.tensor([[place for place in range(length) if place not in chosen]])
        with torch.no_grad():
            cache = backbone.prefill(TOKENS)
            keys = backbone.rotation.rotate([keys for keys, _ in cache.read(span.end, LENGTH)], -len(span))
            rest = [
                (key[:, :, others[0]], value[:, :, others[0]])
                for key, (_, value) in zip(keys, cache.read(span.end, LENGTH), strict=True)
            ]
            tokens, places = [[TOKENS[slot] for slot in slots]], torch.tensor([list(chosen)])
            steering = suffix_states(backbone, cache.read(0, span.end), rest, span, tokens, places, others)
        flat = [keys for keys, _ in steering] + [value for _, value in steering]
        erased, _ = erase(backbone, "kveraser", span)
        steered = [state[:, :, [span.start + place for place in chosen]] for state in states(erased.cache)]
        assert distance(flat, steered) < SAME


FLASH = "flash_attention_2"
REFUSALS: list[tuple[EraserSettings, str, str, type[KVEraserError], str]] = [
    (SUFFIX, "llama", "kveraser+repair", EraserError, "use kveraser"),
    (SUFFIX, "llama", "kveraser+repair(3)", EraserError, "use kveraser"),
    (SUFFIX, "llama", "kveraser('keep')", MethodError, "was trained for layout suffix, and can't be used for keep"),
    (SUFFIX, "llama", "kveraser('compact')", MethodError, "can't be used for compact"),
    (COMPACT, "llama", "kveraser('closed')", MethodError, "can't be used for closed"),
    (COMPACT, "llama", "kveraser+repair(3, 'suffix')", MethodError, "can't be used for suffix"),
    (COMPACT, "llama", "kveraser(window=3)", MethodError, "window, per_span and echoes are of layout suffix"),
    (EraserSettings(), "llama", "kveraser('suffix')", MethodError, "trained for layout keep"),
    (EraserSettings("closed", 3), "llama", "kveraser('compact')", MethodError, "trained for layout closed"),
    (EraserSettings(), "llama", "kveraser(per_span=1)", MethodError, "the loaded eraser's is keep"),
    (SUFFIX, "gpt2", "kveraser", RotationError, "no rotary position embedding"),
    (COMPACT, "gpt2", "kveraser", RotationError, "no rotary position embedding"),
    (SUFFIX, FLASH, "kveraser", BackboneError, "which takes no mask of its own"),
]


@pytest.mark.parametrize(("settings", "family", "recipe", "error", "message"), REFUSALS)
def test_what_the_eraser_or_the_backbone_can_not_do_is_refused_before_any_write(
    settings: EraserSettings, family: str, recipe: str, error: type[KVEraserError], message: str
) -> None:
    backbone = tiny_backbone() if family == FLASH else trained(settings, family)
    cache = backbone.prefill(TOKENS)
    if family == FLASH:
        attach_random_eraser(backbone, settings=settings)
        backbone.model.config._attn_implementation = FLASH
    before = snapshot(cache)
    with cache.edit() as journal:
        with pytest.raises(error, match=message):
            make_method(recipe)(backbone, cache, TOKENS, MIDDLE)
        assert not journal.steps and journal.bytes_written == 0
    assert same_bits(snapshot(cache), before)
    with pytest.raises(error, match=message):
        make_method(recipe).settled(backbone)
