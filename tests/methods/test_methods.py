"""Every erasing method against the exact reference and against its own promise, over all families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from math import ceil

import pytest
import torch

from kveraser.cache.editable import NO_TOKEN, EditableCache, Journal
from kveraser.cache.probe import concat_kv
from kveraser.errors import MethodError, RotationError
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Span
from tests.tiny import (
    FAMILIES,
    ROTARY_FAMILIES,
    attach_random_eraser,
    distance,
    random_tokens,
    same_bits,
    snapshot,
    tiny_backbone,
)

LENGTH = 46
TOKENS = random_tokens(LENGTH)
QUERY = random_tokens(6, seed=9)
SPANS = {"start": Span(0, 9), "middle": Span(14, 23), "end": Span(37, LENGTH)}
MIDDLE, END = SPANS["middle"], SPANS["end"]
TOLERANCE = 1e-4
"""Largest difference that float32 kernels of other shapes make; what erasing changes is beyond CHANGE."""
CHANGE = 1e-2

RECIPES = (
    "recompute", "mask", "shift", "zero_value", "blank", "repair(4)", "follow(3, 0.25, 0.5)", "selective(0.3)",
    "erratum",
    "kveraser(layout='keep')", "kveraser(layout='closed')",
    "kveraser(layout='compact')",
    "kveraser+repair(4, 'keep')", "kveraser+repair(4, 'closed')", "kveraser+repair(4, 'compact')",
)  # fmt: skip
MOVING = (
    "shift", "repair(4)", "follow(3, 0.25, 0.5)", "selective(0.3)", "kveraser(layout='closed')",
    "kveraser(layout='compact')",
    "kveraser+repair(4, 'closed')", "kveraser+repair(4, 'compact')",
)  # fmt: skip
DROPPING = (
    "recompute", "mask", "shift", "repair(4)", "follow(3, 0.25, 0.5)", "selective(0.3)",
)  # fmt: skip
TRAINED_FOR = {"compact": EraserSettings("compact", slots=4)}
"""Layouts that only an eraser trained for them can serve."""


@once
def _armed(family: str, settings: EraserSettings) -> Backbone:
    backbone = tiny_backbone(family)
    attach_random_eraser(backbone, settings=settings)
    return backbone


def armed(family: str, recipe: str = "") -> Backbone:
    """The family's backbone with a random eraser that can serve `recipe`."""
    fit = (settings for layout, settings in TRAINED_FOR.items() if f"'{layout}'" in recipe)
    return _armed(family, next(fit, EraserSettings()))


@dataclass(frozen=True)
class Erased:
    """A cache after an erase, and its figures at that time."""

    cache: EditableCache
    recomputed: int
    slots: tuple[int, ...]
    next_position: int
    exact: bool


def erase(
    backbone: Backbone, recipe: str, span: Span = MIDDLE, tokens: Sequence[int] = TOKENS,
    cache: EditableCache | None = None,
) -> tuple[Erased, Journal]:  # fmt: skip
    cache = backbone.prefill(tokens) if cache is None else cache
    with cache.edit() as journal:
        recomputed = make_method(recipe)(backbone, cache, tokens, span)
    slots = tuple(cache.slot_to_token.tolist())
    return Erased(cache, recomputed, slots, cache.next_position, cache.exact), journal


def without(span: Span, tokens: Sequence[int] = TOKENS) -> list[int]:
    return [*tokens[: span.start], *tokens[span.end :]]


def live(tokens: Sequence[int], erased: Erased) -> list[int]:
    return [NO_TOKEN if slot == NO_TOKEN else tokens[slot] for slot in erased.slots]


def states(cache: EditableCache, start: int = 0, end: int | None = None) -> list[torch.Tensor]:
    """Keys, then values, of all layers."""
    pairs = cache.read(start, cache.length if end is None else end)
    return [keys for keys, _ in pairs] + [values for _, values in pairs]


def values(cache: EditableCache, start: int = 0, end: int | None = None) -> list[torch.Tensor]:
    pairs = cache.read(start, cache.length if end is None else end)
    return [value for _, value in pairs]


def changed_slots(one: torch.Tensor, other: torch.Tensor) -> list[int]:
    return (one != other).any(dim=3).any(dim=1)[0].nonzero().flatten().tolist()


def answer(backbone: Backbone, cache: EditableCache) -> torch.Tensor:
    return backbone.logits(cache.fork(), QUERY, keep=len(QUERY))


def equal_bits(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def assert_fresh(backbone: Backbone, cache: EditableCache, tokens: Sequence[int]) -> None:
    """The cache is that of a fresh prefill of `tokens`: states, positions, and what it answers."""
    fresh = backbone.prefill(tokens)
    assert distance(states(cache), states(fresh)) < TOLERANCE
    assert torch.equal(cache.positions, fresh.positions) and cache.next_position == fresh.next_position
    assert distance([answer(backbone, cache)], [answer(backbone, fresh)]) < TOLERANCE


def own_keys_moved_by(backbone: Backbone, delta: int) -> list[torch.Tensor]:
    """The model's own keys of TOKENS read `delta` positions further on; rotary states depend on distances alone."""
    moved = backbone.new_cache()
    positions = torch.arange(LENGTH, dtype=torch.float64) + delta
    with moved.appending(positions):
        backbone.forward(TOKENS, moved, positions)
    return [keys for keys, _ in moved.read(0, LENGTH)]


# Contracts of all methods


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_keeps_the_contract_and_is_undone_bit_for_bit(family: str, recipe: str) -> None:
    backbone = armed(family, recipe)
    cache = backbone.prefill(TOKENS)
    before, prefix = snapshot(cache), [state.clone() for state in states(cache, 0, MIDDLE.start)]
    if family == "gpt2" and recipe in MOVING:
        with pytest.raises(RotationError, match="no rotary position embedding"):
            erase(backbone, recipe, cache=cache)
        assert same_bits(snapshot(cache), before)
        return
    unerased = answer(backbone, cache)
    erased, journal = erase(backbone, recipe, cache=cache)
    assert len(erased.slots) == cache.length == len(cache.positions)
    assert [slot for slot in erased.slots if slot != NO_TOKEN] == [*range(MIDDLE.start), *range(MIDDLE.end, LENGTH)]
    assert equal_bits(states(cache, 0, MIDDLE.start), prefix)
    assert distance([answer(backbone, cache)], [unerased]) > CHANGE, "an erase that changes nothing proves nothing"
    exact = distance([answer(backbone, cache)], [answer(backbone, backbone.prefill(without(MIDDLE)))]) < CHANGE
    assert erased.exact == exact == (recipe == "recompute")
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)
    assert distance([answer(backbone, cache)], [unerased]) == 0


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_slots_tell_which_token_every_slot_holds(family: str, recipe: str) -> None:
    # The first layer's values depend on nothing but the token, however a slot was moved or recomputed; steered suffix
    # tokens are the exception.
    backbone = armed(family, recipe)
    before = values(backbone.prefill(TOKENS))[0]
    erased, _ = erase(backbone, recipe)
    kept = [slot for slot, source in enumerate(erased.slots) if source != NO_TOKEN]
    sources = [erased.slots[slot] for slot in kept]
    after = values(erased.cache)[0]
    assert distance([after[:, :, kept]], [before[:, :, sources]]) < 1e-5
    assert distance([before[:, :, 1:]], [before[:, :, :-1]]) > CHANGE


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_span_at_the_very_end_is_exactly_gone_where_its_slots_are_dropped(recipe: str) -> None:
    backbone = armed("llama", recipe)
    erased, journal = erase(backbone, recipe, END)
    assert erased.exact == (recipe in DROPPING)
    if recipe in DROPPING:
        assert same_bits(snapshot(erased.cache), snapshot(erase(backbone, "recompute", END)[0].cache))
        assert erased.next_position == END.start and erased.slots == tuple(range(END.start))
        assert_fresh(backbone, erased.cache, TOKENS[: END.start])
    erased.cache.revert(journal)
    assert same_bits(snapshot(erased.cache), snapshot(backbone.prefill(TOKENS)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_span_at_the_very_start_is_erased(recipe: str) -> None:
    backbone = armed("llama", recipe)
    erased, _ = erase(backbone, recipe, SPANS["start"])
    reference = answer(backbone, backbone.prefill(without(SPANS["start"])))
    assert (distance([answer(backbone, erased.cache)], [reference]) < TOLERANCE) == erased.exact
    assert bool(torch.isfinite(answer(backbone, erased.cache)).all())


# recompute


@pytest.mark.parametrize("place", SPANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_equals_a_fresh_prefill(family: str, place: str) -> None:
    backbone, span = armed(family), SPANS[place]
    unerased = answer(backbone, backbone.prefill(TOKENS))
    erased, _ = erase(backbone, "recompute", span)
    assert erased.exact and erased.recomputed == LENGTH - span.end
    assert erased.slots == (*range(span.start), *range(span.end, LENGTH))
    assert_fresh(backbone, erased.cache, without(span))
    assert distance([answer(backbone, erased.cache)], [unerased]) > CHANGE


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["then-later", "then-earlier"])
def test_recompute_removes_the_traces_of_an_earlier_erase(recipe: str, order: tuple[int, int]) -> None:
    backbone, spans = armed("llama", recipe), (MIDDLE, Span(30, 35))
    first, second = (spans[index] for index in order)
    erased, _ = erase(backbone, recipe, first)
    start = erased.slots.index(second.start)
    again, _ = erase(backbone, "recompute", Span(start, start + len(second)), TOKENS, erased.cache)
    remaining = [token for slot, token in enumerate(TOKENS) if not any(span.start <= slot < span.end for span in spans)]
    assert again.exact and live(TOKENS, again) == remaining
    assert_fresh(backbone, again.cache, remaining)


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_of_two_spans_agrees_in_either_order(family: str) -> None:
    backbone, early, late = armed(family), Span(5, 11), Span(20, 29)
    forward, _ = erase(backbone, "recompute", early)
    moved = Span(late.start - len(early), late.end - len(early))
    forward, _ = erase(backbone, "recompute", moved, TOKENS, forward.cache)
    backward, _ = erase(backbone, "recompute", late)
    backward, _ = erase(backbone, "recompute", early, TOKENS, backward.cache)
    assert distance(states(forward.cache), states(backward.cache)) < TOLERANCE
    assert_fresh(backbone, forward.cache, [*TOKENS[:5], *TOKENS[11:20], *TOKENS[29:]])


# mask, shift, zero_value, blank, erratum


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_drops_the_span_and_moves_nothing(family: str) -> None:
    backbone, before = armed(family), armed(family).prefill(TOKENS)
    erased, _ = erase(backbone, "mask")
    for start, end, source in ((0, MIDDLE.start, 0), (MIDDLE.start, LENGTH - len(MIDDLE), MIDDLE.end)):
        assert equal_bits(states(erased.cache, start, end), states(before, source, source + end - start))
    assert erased.cache.positions.tolist() == [*range(MIDDLE.start), *range(MIDDLE.end, LENGTH)]
    assert erased.next_position == LENGTH and erased.recomputed == 0


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_shift_gives_suffix_keys_the_rotation_of_their_new_positions(family: str) -> None:
    backbone, before = armed(family), armed(family).prefill(TOKENS)
    erased, _ = erase(backbone, "shift")
    keys = [pair[0] for pair in erased.cache.read(MIDDLE.start, erased.cache.length)]
    own = [keys[:, :, MIDDLE.end :] for keys in own_keys_moved_by(backbone, -len(MIDDLE))]
    unmoved = [pair[0] for pair in before.read(MIDDLE.end, LENGTH)]
    assert distance(keys, own) < TOLERANCE < CHANGE < distance(keys, unmoved)
    assert equal_bits(values(erased.cache, MIDDLE.start), values(before, MIDDLE.end))
    assert erased.cache.positions.tolist() == list(range(LENGTH - len(MIDDLE)))
    assert erased.next_position == LENGTH - len(MIDDLE) and erased.recomputed == 0


def test_zero_value_silences_values_and_keeps_all_else(backbone: Backbone) -> None:
    before = backbone.prefill(TOKENS)
    erased, _ = erase(backbone, "zero_value")
    assert all(not value.any() for value in values(erased.cache, MIDDLE.start, MIDDLE.end))
    assert equal_bits(states(erased.cache)[:3], states(before)[:3])
    assert equal_bits(values(erased.cache, MIDDLE.end), values(before, MIDDLE.end))
    assert erased.slots[MIDDLE.start : MIDDLE.end] == (NO_TOKEN,) * len(MIDDLE) and erased.next_position == LENGTH


@pytest.mark.parametrize("filler", ["\n", "nothing. "])
@pytest.mark.parametrize("family", FAMILIES)
def test_blank_equals_a_fresh_prefill_of_the_filler_in_the_spans_slots(family: str, filler: str) -> None:
    backbone, before = armed(family), armed(family).prefill(TOKENS)
    erased, _ = erase(backbone, f"blank({filler!r})")
    words = (backbone.tokenizer.encode(filler, add_special_tokens=False) * 9)[: len(MIDDLE)]
    fresh = backbone.prefill([*TOKENS[: MIDDLE.start], *words])
    assert distance(states(erased.cache, 0, MIDDLE.end), states(fresh)) < TOLERANCE
    assert equal_bits(states(erased.cache, MIDDLE.end), states(before, MIDDLE.end))
    assert erased.recomputed == len(MIDDLE) and erased.next_position == LENGTH


def test_a_filler_without_tokens_is_refused_and_changes_nothing(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = backbone.prefill(TOKENS)
    before = snapshot(cache)
    monkeypatch.setattr(backbone, "tokenize", lambda *arguments, **named: ([], []))
    with pytest.raises(MethodError, match="has no tokens"):
        erase(backbone, "blank('x')", cache=cache)
    assert same_bits(snapshot(cache), before)


def erratum_of(backbone: Backbone, text: str, quoted: str) -> tuple[list[int], Erased, str]:
    """Erase `quoted` from `text`: its tokens, the result, and the text that was appended."""
    tokens, offsets = backbone.tokenize(text)
    start = text.index(quoted)
    inside = [i for i, (left, right) in enumerate(offsets) if left >= start and right <= start + len(quoted)]
    erased, _ = erase(backbone, "erratum", Span(inside[0], inside[-1] + 1), tokens)
    notices = [
        backbone.tokenizer.decode(backbone.tokenizer.encode(words, add_special_tokens=False))
        for words in (f"\n\n{notice_for(quoted)}", f"<|im_start|>user\n{notice_for(quoted)}<|im_end|>\n")
    ]
    for notice in notices:
        both = [*tokens, *backbone.tokenizer.encode(notice, add_special_tokens=False)]
        if len(both) == erased.cache.length and distance(states(erased.cache), states(backbone.prefill(both))) < 1e-4:
            return tokens, erased, notice
    raise AssertionError("the cache holds none of the notices")


def notice_for(quoted: str) -> str:
    words = quoted.split()
    shown = words if len(words) <= 24 else [*words[:12], "...", *words[-12:]]
    wording = make_method("erratum").parameters["wording"]
    return str(wording).replace("{quote}", " ".join(shown))


@pytest.mark.parametrize(
    ("chat", "text", "quoted", "opening"),
    [
        (False, "The door is red. It opens at nine.", "The door is red.", "\n\nCorrection"),
        (True, "The door is red. It opens at nine.", "The door is red.", "\n\nCorrection"),
        (True, "<|im_start|>user\nThe door is red.<|im_end|>\n", "The door is red.", "<|im_start|>user\nCorrection"),
        (False, f"Numbers: {' '.join(map(str, range(40)))}. End.", " ".join(map(str, range(40))), "\n\nCorrection"),
    ],
    ids=["plain text", "open turn", "closed turn", "long quote"],
)
def test_erratum_appends_a_notice_that_quotes_the_span(chat: bool, text: str, quoted: str, opening: str) -> None:
    backbone = tiny_backbone(chat=chat)
    tokens, erased, notice = erratum_of(backbone, text, quoted)
    assert notice.startswith(opening) and (quoted in notice or " 11 ... 28 " in notice)
    appended = erased.cache.length - len(tokens)
    assert erased.recomputed == appended > 20 and erased.slots[-appended:] == (NO_TOKEN,) * appended
    assert NO_TOKEN in erased.slots[: len(tokens)] and not erased.exact
    assert not make_method("erratum").removes_text


# repair, selective


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_repair_recomputes_the_window_and_shifts_the_rest(family: str) -> None:
    backbone, window, start = armed(family), 5, MIDDLE.start
    repaired, shifted = erase(backbone, f"repair({window})")[0], erase(backbone, "shift")[0]
    assert repaired.recomputed == window and not repaired.exact
    assert equal_bits(states(repaired.cache, start + window), states(shifted.cache, start + window))
    fresh = backbone.prefill(without(MIDDLE))
    assert distance(states(repaired.cache, 0, start + window), states(fresh, 0, start + window)) < TOLERANCE
    for layer in (1, 2):
        changed = changed_slots(values(repaired.cache)[layer], values(shifted.cache)[layer])
        assert changed == list(range(start, start + window))


@pytest.mark.parametrize(("per_span", "width"), [(0.5, 3 + round(0.5 * len(MIDDLE))), (1, 3 + len(MIDDLE))])
def test_repair_follows_the_span(per_span: float, width: int) -> None:
    backbone = armed("llama")
    following, wide = (erase(backbone, recipe)[0] for recipe in (f"repair(3, {per_span})", f"repair({width})"))
    assert 3 < following.recomputed == width < LENGTH - MIDDLE.end
    assert equal_bits(states(following.cache, 0), states(wide.cache, 0))
    assert make_method(f"repair(3, {per_span})").estimate(10, len(MIDDLE), 100) == width


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
@pytest.mark.parametrize("window", [LENGTH - MIDDLE.end, 500])
def test_repair_of_the_whole_suffix_is_exact(family: str, window: int) -> None:
    erased, _ = erase(armed(family), f"repair({window})")
    assert erased.exact and erased.recomputed == LENGTH - MIDDLE.end
    assert_fresh(armed(family), erased.cache, without(MIDDLE))


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_selective_of_all_equals_recompute_and_does_not_call_itself_exact(family: str) -> None:
    erased, _ = erase(armed(family), "selective(1.0)")
    assert not erased.exact
    assert_fresh(armed(family), erased.cache, without(MIDDLE))


@pytest.mark.parametrize("ratio", [0.1, 0.34])
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_selective_recomputes_the_tokens_whose_early_values_deviate_most(family: str, ratio: float) -> None:
    backbone, start = armed(family), MIDDLE.start
    selective, shifted = erase(backbone, f"selective({ratio})")[0], erase(backbone, "shift")[0]
    fresh, suffix = backbone.prefill(without(MIDDLE)), LENGTH - MIDDLE.end
    deviation = (values(fresh, start)[1] - values(shifted.cache, start)[1]).square().sum(dim=(0, 1, 3))
    expected = sorted((deviation.topk(ceil(ratio * suffix)).indices + start).tolist())
    assert changed_slots(values(selective.cache)[2], values(shifted.cache)[2]) == expected
    assert len(changed_slots(values(selective.cache)[1], values(shifted.cache)[1])) == suffix
    assert distance([values(selective.cache)[1]], [values(fresh)[1]]) < TOLERANCE
    assert selective.recomputed == len(expected) + ceil(suffix / 3)


def test_selective_needs_two_layers_and_an_attention_that_takes_masks() -> None:
    with pytest.raises(MethodError, match="at least 2 layers, tiny-llama has 1"):
        erase(tiny_backbone(num_hidden_layers=1), "selective")
    eager = tiny_backbone(attn_implementation="eager")
    erased, reference = erase(eager, "selective(0.3)")[0], erase(armed("llama"), "selective(0.3)")[0]
    assert distance(states(erased.cache), states(reference.cache)) < TOLERANCE


# After an earlier erase that left slots without a token


def steered_later(recipe: str) -> Erased:
    """Slots 26-29 hold steering states, and then MIDDLE is erased by `recipe`."""
    steered, _ = erase(armed("llama"), "kveraser(layout='keep')", Span(26, 30))
    return erase(armed("llama"), recipe, MIDDLE, TOKENS, steered.cache)[0]


def test_repair_leaves_slots_without_a_token_and_reads_them() -> None:
    backbone, shifted, repaired = armed("llama"), steered_later("shift"), steered_later("repair(12)")
    start, steering, end = MIDDLE.start, range(17, 21), MIDDLE.start + 12
    assert changed_slots(values(repaired.cache)[2], values(shifted.cache)[2]) == [14, 15, 16, 21, 22, 23, 24, 25]
    assert equal_bits(states(repaired.cache, 17, 21), states(shifted.cache, 17, 21))
    assert repaired.recomputed == 12 - len(steering) and not repaired.exact
    by_hand = concat_kv(shifted.cache.read(0, start))
    for first, last in ((start, steering.start), (steering.stop, end)):
        with torch.no_grad():
            backbone.model(
                input_ids=torch.tensor([[TOKENS[slot + len(MIDDLE)] for slot in range(first, last)]]),
                position_ids=torch.arange(first, last)[None],
                past_key_values=by_hand,
            )
        if first == start:
            so_far = [(layer.keys, layer.values) for layer in by_hand.layers]
            by_hand = concat_kv(so_far, shifted.cache.read(steering.start, steering.stop))
    expected = [layer.keys for layer in by_hand.layers] + [layer.values for layer in by_hand.layers]
    assert distance(states(repaired.cache, 0, end), expected) < TOLERANCE


def test_selective_recomputes_only_slots_that_hold_a_token() -> None:
    shifted, selective = steered_later("shift"), steered_later("selective(1.0)")
    tokenless = range(17, 21)
    assert equal_bits(states(selective.cache, 17, 21), states(shifted.cache, 17, 21))
    changed = changed_slots(values(selective.cache)[2], values(shifted.cache)[2])
    assert changed == [slot for slot in range(MIDDLE.start, selective.cache.length) if slot not in tokenless]
