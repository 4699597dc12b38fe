"""Attention whose heads share keys and values: to the bit what transformers' own gives, and only where it can run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention

from kveraser.attention import SHARED_HEADS, attend, share_heads
from kveraser.backbone import Backbone
from kveraser.methods import make_method
from kveraser.packed import score_together
from kveraser.spans import Span
from tests.tiny import random_tokens, same_bits, snapshot, tiny_backbone, tiny_model, tiny_tokenizer

TOKENS = random_tokens(40, seed=1)
PAIRS = [(random_tokens(5, seed=2), random_tokens(3, seed=3)), (random_tokens(4, seed=4), random_tokens(6, seed=5))]


def sharing() -> Backbone:
    backbone = tiny_backbone()
    share_heads(backbone.model)
    assert backbone.model.config._attn_implementation == SHARED_HEADS
    return backbone


@pytest.mark.parametrize("method", ["recompute", "repair(4)", "selective(0.3)", "follow(4)"])
def test_every_bit_is_as_with_repeated_heads(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
            make_method(method).settled(backbone)(backbone, cache, TOKENS, Span(10, 18))
        scores = score_together(backbone, cache, PAIRS)
        found.append((snapshot(cache), scores))
        passes.append(len(repeated))
    (first, one), (second, other) = found
    assert same_bits(first, second) and all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    # Guard: the first backbone repeats heads in masked passes, the second never.
    assert passes[0] > 0 and passes[1] == passes[0]


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
