"""A decode step of several contexts in one pass is each one's own step, whatever goes beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import ContextLengthError
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.serve.batch import can_step_together, step_together
from kveraser.text.spans import Span
from tests.tiny import POSITIONS, random_tokens, same_bits, snapshot, tiny_backbone

LENGTHS = (5, 57, 23, 110)
NEW = (40, 50, 60, 70)


def prefilled(backbone: Backbone) -> list[EditableCache]:
    return [backbone.prefill(random_tokens(length, seed)) for seed, length in enumerate(LENGTHS)]


def edited(backbone: Backbone, method: str, cache: EditableCache) -> EditableCache:
    tokens = random_tokens(cache.length, LENGTHS.index(cache.length))
    with cache.edit():
        make_method(method).resolve(backbone)(backbone, cache, tokens, Span(3, 9))
    return cache


def far(together: torch.Tensor, alone: torch.Tensor) -> float:
    return float((together - alone).abs().max())


def test_every_row_has_the_logits_and_the_cache_of_its_own_step(backbone_of_family: Backbone) -> None:
    backbone = backbone_of_family
    assert can_step_together(backbone)
    caches = prefilled(backbone)
    edited(backbone, "mask", caches[1])
    expected = [cache.fork() for cache in caches]
    for _ in range(3):
        alone = torch.cat([backbone.logits(cache, [token]) for cache, token in zip(expected, NEW, strict=True)])
        assert far(step_together(backbone, caches, NEW), alone) < 1e-4
        assert far(alone[0], alone[1]) > 1
    for cache, other in zip(caches, expected, strict=True):
        assert (cache.length, cache.next_position) == (other.length, other.next_position)
        assert cache.exact_length == other.exact_length and torch.equal(cache.positions, other.positions)
        for (keys, values), (other_keys, other_values) in zip(
            cache.read(0, cache.length), other.read(0, other.length), strict=True
        ):
            assert far(keys, other_keys) < 1e-4 and far(values, other_values) < 1e-4


@pytest.mark.parametrize("method", ["shift", "kveraser", "kveraser+repair", "repair(4)", "zero_value"])
def test_edited_caches_go_beside_others(erasing_backbone: Backbone, method: str) -> None:
    caches = prefilled(erasing_backbone)
    edited(erasing_backbone, method, caches[2])
    alone = torch.cat(
        [erasing_backbone.logits(cache.fork(), [token]) for cache, token in zip(caches, NEW, strict=True)]
    )
    assert far(step_together(erasing_backbone, caches, NEW), alone) < 1e-4


def test_a_row_does_not_feel_its_neighbours(backbone: Backbone) -> None:
    caches = prefilled(backbone)
    first = step_together(backbone, [cache.fork() for cache in caches], NEW)
    others = [backbone.prefill(random_tokens(length, 9)) for length in (80, 12, 3)]
    second = step_together(backbone, [caches[0].fork(), *others], [NEW[0], 9, 8, 7])
    assert torch.equal(first[0], second[0]) and far(first[1:], second[1:]) > 1


def test_caches_are_written_in_place(backbone: Backbone) -> None:
    caches = [cache.fork() for cache in prefilled(backbone)]
    for cache in caches:
        cache.reserve(cache.length + 1)
    before = [layer.keys.data_ptr() for cache in caches for layer in cache.layers]  # type: ignore[union-attr]
    step_together(backbone, caches, NEW)
    assert [layer.keys.data_ptr() for cache in caches for layer in cache.layers] == before  # type: ignore[union-attr]


def test_what_does_not_fit_is_refused_before_anything_runs(backbone: Backbone) -> None:
    caches = prefilled(backbone)
    with caches[2].edit():
        caches[2].set_next_position(POSITIONS)
    before = [snapshot(cache) for cache in caches]
    with pytest.raises(ContextLengthError, match=str(POSITIONS)):
        step_together(backbone, caches, NEW)
    assert all(same_bits(snapshot(cache), state) for cache, state in zip(caches, before, strict=True))


def test_an_interrupted_pass_leaves_caches_and_model_as_they_were() -> None:
    backbone = tiny_backbone()
    caches = prefilled(backbone)
    before = [snapshot(cache) for cache in caches]
    attention = backbone.model.config._attn_implementation
    expected = backbone.logits(caches[0].fork(), [5])

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = backbone.model.base_model.layers[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step_together(backbone, caches, NEW)
    handle.remove()
    assert all(same_bits(snapshot(cache), state) for cache, state in zip(caches, before, strict=True))
    assert backbone.model.config._attn_implementation == attention
    assert torch.equal(backbone.logits(caches[0], [5]), expected)


def test_attention_that_transformers_does_not_call_by_name_takes_no_rows() -> None:
    backbone = tiny_backbone()
    backbone.model.set_attn_implementation("eager")
    assert not can_step_together(backbone)


def test_a_model_whose_code_takes_no_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    attention = type(backbone.model.base_model.layers[0].self_attn)
    own = attention.forward

    class Touched:
        """As code would that works on what the cache gives it."""

        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, *states: Any) -> Any:
            keys, values = self.cache.update(*states)
            return keys.contiguous(), values

    def touching(self: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        return own(self, *args, past_key_values=past_key_values and Touched(past_key_values), **kwargs)

    monkeypatch.setattr(attention, "forward", touching)
    assert not can_step_together(backbone)
    assert backbone.model.config._attn_implementation == "sdpa"
