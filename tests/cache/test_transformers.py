"""An editable cache behaves as a transformers cache: its own `DynamicCache` is the oracle of every operation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kveraser.cache.editable import EditableCache
from kveraser.model.backbone import Backbone
from tests.tiny import distance, random_tokens, tiny_model

LAYERS = 2


def states(cache: Any) -> list[torch.Tensor]:
    """Keys and values in use, for every layer."""
    length = cache.get_seq_length()
    return [part[:, :, :length] for layer in cache.layers for part in (layer.keys, layer.values)]


def grow(caches: list[Any], tokens: int, batch: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        keys, values = (torch.randn(batch, 3, tokens, 4, generator=generator) for _ in "kv")
        for cache in caches:
            cache.update(keys, values, layer)


def pair(tokens: int = 120, batch: int = 1) -> list[Any]:
    caches = [EditableCache(LAYERS), DynamicCache()]
    grow(caches, tokens, batch)
    return caches


@pytest.mark.parametrize("count", [100, -20, -1, 1, 0, 119, 120, 121, 500, -119, -120])
def test_crop_leaves_what_transformers_leaves(count: int) -> None:
    ours, theirs = pair()
    for cache in (ours, theirs):
        cache.crop(count)
    assert ours.get_seq_length() == theirs.get_seq_length() == ours.positions.numel()
    assert (ours.get_seq_length() < 120) is (count not in (0, 120, 121, 500))
    assert not ours.length or distance(states(ours), states(theirs)) == 0


def test_crop_of_a_hundred_out_of_a_hundred_and_twenty_leaves_a_hundred() -> None:
    ours, _ = pair(120)
    ours.crop(100)
    assert ours.length == ours.next_position == 100


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_operations_leaves_the_same_states(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    caches, batch, done = pair(30, batch=2), 2, set[int]()
    for step in range(30):
        done.add(kind := draw(6))
        length = caches[0].get_seq_length()
        count, rows = draw(length + 4) - length // 2, [draw(batch) for _ in range(2)]
        if kind == 0:
            grow(caches, 1 + draw(40), batch, step)
        for cache in caches:
            match kind:
                case 1:
                    # transformers removes nothing by a number larger than its length, and ours all of it.
                    cache.crop(max(count, -length))
                case 2:
                    cache.reorder_cache(torch.tensor([draw_ for draw_ in rows for _ in range(batch)][:batch]))
                case 3 if batch < 6:
                    cache.batch_repeat_interleave(2)
                case 4:
                    cache.batch_select_indices(torch.tensor(rows))
                case 5 if step % 3 == 0:
                    cache.reset()
        if kind == 3 and batch < 6:
            batch *= 2
        elif kind == 4:
            batch = len(rows)
        ours, theirs = caches
        assert ours.get_seq_length() == theirs.get_seq_length() == ours.positions.numel() == ours.next_position
        assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
        if ours.get_seq_length():
            assert distance(states(ours), states(theirs)) == 0
        else:
            # An empty batch may begin again with another number of rows.
            grow(caches, 2, batch, step)
    assert len(done) == 6


def test_a_cropped_hole_is_not_hidden_by_what_is_appended_next(backbone: Backbone) -> None:
    cache = backbone.prefill(random_tokens(30))
    with cache.edit():
        cache.drop(5, 15)
    cache.crop(-5)
    length = cache.length
    backbone.model(input_ids=torch.tensor([random_tokens(5, seed=2)]), past_key_values=cache, use_cache=True)
    # Without position_ids a model numbers by slot.
    assert cache.length == length + 5 and cache.positions[-5:].tolist() == list(range(length, length + 5))


def test_a_reset_cache_begins_at_the_first_position(backbone: Backbone) -> None:
    cache, tokens = backbone.prefill(random_tokens(30)), random_tokens(12, seed=4)
    with cache.edit():
        cache.drop(0, 10)
    cache.reset()
    backbone.extend(cache, tokens)
    assert cache.positions.tolist() == list(range(12)) and cache.exact_length == 12
    fresh = backbone.prefill(tokens)
    assert distance(states(cache), states(fresh)) < 1e-4


def test_a_cropped_edit_comes_back_on_undo() -> None:
    ours, _ = pair(40)
    before = [part.clone() for part in states(ours)]
    with ours.edit() as journal:
        ours.crop(10)
    assert ours.length == 10
    ours.revert(journal)
    assert ours.length == 40 and distance(states(ours), before) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
)
def test_generate_says_the_same_with_either_cache(settings: dict[str, Any]) -> None:
    model = tiny_model()
    prompt = torch.tensor([random_tokens(12) * 2])
    said = []
    for cache in (EditableCache(3), DynamicCache()):
        torch.manual_seed(0)
        options = {**settings, "max_new_tokens": 12, "pad_token_id": 0}
        said.append(model.generate(prompt, past_key_values=cache, **options))
    assert torch.equal(*said) and said[0].shape[1] > prompt.shape[1]


def test_assisted_decoding_says_the_same_with_either_cache() -> None:
    model, assistant = tiny_model(), tiny_model(seed=1)
    prompt = torch.tensor([random_tokens(12)])
    said = [
        model.generate(prompt, past_key_values=cache, assistant_model=assistant, max_new_tokens=12, do_sample=False)
        for cache in (EditableCache(3), DynamicCache())
    ]
    assert torch.equal(*said)


def test_padded_batches_say_the_same_with_either_cache() -> None:
    model = tiny_model()
    prompt = torch.tensor([random_tokens(10), [0, 0, 0, *random_tokens(7, seed=1)]])
    mask = (prompt != 0).long()
    said = [
        model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False)
        for cache in (EditableCache(3), DynamicCache())
    ]
    assert torch.equal(*said)


def test_a_prompt_is_prefilled_once_and_its_copies_go_on_from_it() -> None:
    model = tiny_model()
    prompt = torch.tensor([random_tokens(20)])
    shared = EditableCache(3)
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=shared, use_cache=True)
    before = [part.clone() for part in states(shared)]
    for seed in (5, 6):
        whole = torch.cat([prompt, torch.tensor([random_tokens(6, seed=seed)])], dim=1)
        got = model.generate(whole, past_key_values=copy.deepcopy(shared), max_new_tokens=8, do_sample=False)
        assert torch.equal(got, model.generate(whole, max_new_tokens=8, do_sample=False))
    assert shared.length == 20 and distance(states(shared), before) == 0


def test_a_cache_initialized_early_serves_as_one_that_is_not() -> None:
    early, plain = EditableCache(LAYERS), EditableCache(LAYERS)
    early.early_initialization(1, 3, 4, torch.float32, torch.device("cpu"))
    assert early.is_initialized and not plain.is_initialized and early.get_seq_length() == 0
    grow([early, plain], 300, 1)
    assert distance(states(early), states(plain)) == 0 and early.get_max_length() == plain.get_max_length() == -1
    assert len(early) == LAYERS and not any(early.is_sliding) and early.is_croppable
