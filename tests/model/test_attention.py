"""Attention whose heads share keys and values: what transformers' own gives, with less to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

from kveraser.measure.packing import score_together
from kveraser.methods import make_method
from kveraser.model.attention import SHARED_HEADS, attend, share_heads
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span
from tests.tiny import random_tokens, snapshot, tiny_backbone, tiny_model, tiny_tokenizer

TOKENS = random_tokens(40, seed=1)
PAIRS = [(random_tokens(5, seed=2), random_tokens(3, seed=3)), (random_tokens(4, seed=4), random_tokens(6, seed=5))]


def sharing() -> Backbone:
    backbone = tiny_backbone()
    share_heads(backbone.model)
    assert backbone.model.config._attn_implementation == SHARED_HEADS
    return backbone


@pytest.mark.parametrize("method", ["recompute", "repair(4)", "selective(0.3)", "follow(4)"])
def test_states_and_answers_are_as_with_repeated_heads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated: list[int] = []
    repeat = sdpa_attention.repeat_kv

    def counted(states: torch.Tensor, times: int) -> torch.Tensor:
        repeated.append(states.shape[2])
        return repeat(states, times)

    monkeypatch.setattr(sdpa_attention, "repeat_kv", counted)
    found, passes = [], []
    for backbone in (tiny_backbone(), sharing()):
        cache = backbone.prefill(TOKENS)
        with cache.edit():
            make_method(method).resolve(backbone)(backbone, cache, TOKENS, Span(10, 18))
        scores = score_together(backbone, cache, PAIRS)
        found.append((snapshot(cache), scores))
        passes.append(len(repeated))
    (first, one), (second, other) = found
    assert first.keys() == second.keys() and torch.equal(first["positions"], second["positions"])
    for kind in ("keys", "values"):
        for pair in zip(first[kind], second[kind], strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    for pair in zip(one, other, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)
    # Guard: the first backbone repeats heads in masked passes, the second never.
    assert passes[0] > 0 and passes[1] == passes[0]


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_no_token_reads_slots_that_the_mask_hides_from_its_neighbours(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *rest: object, **options: Any) -> torch.Tensor:
        read.append((query.shape[2], key.shape[2]))
        return kernel(query, key, *rest, **options)

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, 8, generator=generator) for heads, length in ((4, 70), (2, 300), (2, 300))
    )
    last = torch.cat([torch.arange(40, 72), torch.arange(90, 122), torch.tensor([130, 140, 150, 160, 170, 299])])
    visible = (torch.arange(300)[None, :] <= last[:, None])[None, None]
    mask = visible
    if kind == "float":
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = kernel(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    found, _ = attend(torch.nn.Module(), query, key, value, mask)
    assert read == [(32, 72), (32, 122), (6, 300)]
    torch.testing.assert_close(found, expected)
    # Rows of a batch are read in one go, as far as the longest of them sees.
    read.clear()
    batch = mask.repeat(2, 1, 1, 1)
    batch[0, :, -1] = batch[0, :, -2]
    both, _ = attend(torch.nn.Module(), *(states.repeat(2, 1, 1, 1) for states in (query, key, value)), batch)
    assert read == [(70, 300)] and both.shape == (2, 70, 4, 8)
    torch.testing.assert_close(both[1:], expected)


def test_what_it_has_no_kernel_for_goes_to_the_standard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    standard = sdpa_attention.sdpa_attention_forward

    def counted(*states: object, **options: object) -> object:
        asked.append(True)
        return standard(*states, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = (torch.randn(1, heads, 3, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with torch.no_grad():
        shared, _ = attend(module, query, key, value, mask)
    assert not asked
    repeated, _ = attend(module, query, key, value, mask)
    assert len(asked) == 1 and torch.equal(shared, repeated)
    repeated.sum().backward()
    assert key.grad is not None and float(key.grad.abs().sum()) > 0
    with torch.no_grad():
        attend(module, query, key, value, None)
    assert len(asked) == 2


def test_only_models_on_a_cpu_with_shared_heads_and_sdpa_take_it() -> None:
    eager, alone = tiny_model(attn_implementation="eager"), tiny_model(num_key_value_heads=4)
    standard = AttentionInterface()["sdpa"]
    for model in (eager, alone):
        before = model.config._attn_implementation
        share_heads(model)
        assert model.config._attn_implementation == before
    other = tiny_model()
    sharing()
    assert other.config._attn_implementation == "sdpa" and AttentionInterface()["sdpa"] is standard


def test_a_loaded_backbone_takes_it(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = Backbone.load(tmp_path, device="cpu")
    assert loaded.model.config._attn_implementation == SHARED_HEADS
    answered = loaded.model.generate(torch.tensor([TOKENS]), max_new_tokens=5, do_sample=False)
    assert torch.equal(
        answered, tiny_backbone().model.generate(torch.tensor([TOKENS]), max_new_tokens=5, do_sample=False)
    )
