"""The cache's buffers: growth, and use by the models' own forward and `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kveraser.cache.editable import EditableCache
from kveraser.cache.layer import GROWTH_MULTIPLE
from kveraser.errors import CacheError
from kveraser.model.backbone import Backbone
from tests.tiny import DEVICE, distance, random_tokens

LENGTH = 40
TOKENS = random_tokens(LENGTH)
TOLERANCE = 1e-4


def test_growing_keeps_what_was_written(backbone: Backbone) -> None:
    tokens = random_tokens(600, seed=3)
    whole, grown = backbone.prefill(tokens), backbone.new_cache(capacity=7)
    capacities = set()
    for start in range(0, len(tokens), 25):
        backbone.extend(grown, tokens[start : start + 25])
        capacities.add(grown.layers[0].capacity)
    assert len(capacities) > 2
    for (keys, values), (exact_keys, exact_values) in zip(grown.read(0, 600), whole.read(0, 600), strict=True):
        assert distance([keys, values], [exact_keys, exact_values]) < TOLERANCE < float(exact_values.abs().max())


def test_capacity_grows_by_a_factor_so_appending_costs_amortised_constant_time() -> None:
    cache, copies, capacity = EditableCache(1, capacity=1), 0, 1
    one = torch.ones(1, 1, 1, 4)
    for _ in range(10_000):
        cache.layers[0].update(one, one)
        if cache.layers[0].capacity != capacity:
            assert cache.layers[0].capacity % GROWTH_MULTIPLE == 0
            copies, capacity = copies + 1, cache.layers[0].capacity
    assert 3 < copies < 15 and cache.length == 10_000


def test_unused_slots_hold_nothing_of_memory_given_back() -> None:
    # Uninitialized buffers of this size would be given the same memory.
    freed = [torch.ones(1, 1, 64, 8) for _ in range(16)]
    freed.clear()
    grown, states = EditableCache(8, capacity=64), torch.ones(1, 1, 2, 8)
    for layer in grown.layers:
        layer.update(states, states)
    for capacity in (64, 96):
        grown.reserve(capacity)
        for layer in grown.layers:
            assert layer.keys is not None and layer.values is not None
            assert layer.capacity == capacity and not layer.keys[:, :, 2:].any() and not layer.values[:, :, 2:].any()
            assert layer.keys[:, :, :2].all()


def test_gradients_are_refused() -> None:
    cache, states = EditableCache(1), torch.ones(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(CacheError, match="can't carry gradients"):
        cache.layers[0].update(states, states)
    with torch.no_grad():
        cache.layers[0].update(states, states)
    assert cache.length == 2


# Use by transformers


def test_model_forward_on_it_equals_a_dynamic_cache(backbone_of_family: Backbone) -> None:
    model, cache = backbone_of_family.model, backbone_of_family.new_cache(capacity=3)
    reference = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, end in ((0, 20), (20, 21), (21, LENGTH)):
            ids = torch.tensor([TOKENS[start:end]], device=DEVICE)
            got = model(ids, past_key_values=cache).logits
            expected = model(ids, past_key_values=reference).logits
            assert torch.equal(got, expected)
    assert cache.length == cache.get_seq_length() == LENGTH and cache.get_max_length() == -1
    assert cache.exact_length == cache.next_position == LENGTH
    cache.reset()
    assert cache.length == cache.exact_length == cache.next_position == 0


def test_cached_decoding_equals_uncached(backbone_of_family: Backbone) -> None:
    cache = backbone_of_family.prefill(TOKENS[:20])
    steps = [backbone_of_family.logits(cache, [token])[0] for token in TOKENS[20:]]
    with torch.no_grad():
        uncached = backbone_of_family.model(torch.tensor([TOKENS], device=DEVICE), use_cache=False).logits[0, 20:]
    assert distance([torch.stack(steps)], [uncached]) < TOLERANCE < float(uncached.std())


@pytest.mark.parametrize("prefilled", [False, True], ids=["empty", "prefilled"])
def test_generate_on_it_equals_a_dynamic_cache(backbone_of_family: Backbone, prefilled: bool) -> None:
    model, cache = backbone_of_family.model, backbone_of_family.new_cache()
    reference = DynamicCache(config=model.config)
    if prefilled:
        backbone_of_family.extend(cache, TOKENS[:-4])
        with torch.no_grad():
            model(torch.tensor([TOKENS[:-4]], device=DEVICE), past_key_values=reference)
    settings: dict[str, Any] = {
        "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    got = model.generate(torch.tensor([TOKENS]), past_key_values=cache, **settings)
    expected = model.generate(torch.tensor([TOKENS]), past_key_values=reference, **settings)
    assert got.past_key_values is cache
    assert torch.equal(got.sequences, expected.sequences) and got.sequences.shape[1] == LENGTH + 12
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))
    assert cache.length == cache.exact_length == cache.next_position == LENGTH + 11


def test_beam_search_on_it_equals_a_dynamic_cache(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[list[int]] = []
    reorder = EditableCache.reorder_cache
    monkeypatch.setattr(
        EditableCache, "reorder_cache", lambda self, beams: (orders.append(beams.tolist()), reorder(self, beams))[1]
    )
    settings: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 3, "do_sample": False}
    prompt = torch.tensor([TOKENS])
    got = backbone.model.generate(prompt, past_key_values=backbone.new_cache(), **settings)
    assert any(order != [0, 1, 2] for order in orders)
    assert torch.equal(got, backbone.model.generate(prompt, **settings))


def test_cropping_by_assisted_generation_keeps_the_ledger(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    cropped: list[int] = []
    crop = EditableCache.crop
    monkeypatch.setattr(EditableCache, "crop", lambda self, count: (cropped.append(abs(count)), crop(self, count))[1])
    prompt, cache = torch.tensor([TOKENS[:8] * 4]), backbone.new_cache()
    got = backbone.model.generate(
        prompt, past_key_values=cache, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3
    )
    assert any(cropped)
    assert torch.equal(got, backbone.model.generate(prompt, max_new_tokens=16, do_sample=False))
    assert cache.positions.tolist() == list(range(cache.length)) and cache.length < got.shape[1]
    assert cache.exact_length == cache.next_position == cache.length
