"""Questions asked together are answered as each is alone, and leave the cache as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import ContextLengthError
from kveraser.measure.packing import greedy_start, greedy_together, pack, score_together
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy, score
from kveraser.text.spans import Span
from tests.tiny import random_tokens, same_bits, snapshot, tiny_backbone

PROMPTS = [random_tokens(count, seed=count) for count in (5, 2, 9)]
ANSWERS = [random_tokens(count, seed=20 + count) for count in (3, 6, 1)]


def filled(backbone: Backbone, method: str | None) -> EditableCache:
    """A cache of 40 tokens, edited by `method` so that slots and positions part."""
    tokens = random_tokens(40, seed=1)
    cache = backbone.prefill(tokens)
    if method is not None:
        with cache.edit():
            make_method(method)(backbone, cache, tokens, Span(10, 18))
    return cache


@pytest.mark.parametrize("method", [None, "mask", "shift"])
def test_scores_are_those_of_each_question_alone(rotary_backbone: Backbone, method: str | None) -> None:
    cache = filled(rotary_backbone, method)
    before = snapshot(cache)
    together = score_together(rotary_backbone, cache, list(zip(PROMPTS, ANSWERS, strict=True)))
    assert same_bits(snapshot(cache), before)
    for prompt, answer, packed in zip(PROMPTS, ANSWERS, together, strict=True):
        alone = score(rotary_backbone, cache, prompt, answer)
        assert packed.shape == alone.shape and float((packed - alone).abs().max()) < 1e-3
        # Guard: without the context, or behind another question, the scores are others.
        other = score(rotary_backbone, cache, [*PROMPTS[0], *prompt], answer)
        assert float((other - alone).abs().max()) > 0.05


@pytest.mark.parametrize("method", [None, "mask", "shift"])
def test_answers_are_those_of_each_question_alone(backbone: Backbone, method: str | None) -> None:
    cache = filled(backbone, method)
    before = snapshot(cache)
    together = greedy_together(backbone, cache, PROMPTS, 12)
    assert same_bits(snapshot(cache), before)
    assert together == [greedy(backbone, cache, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in together}) == len(PROMPTS)


def test_a_question_that_ends_leaves_the_others_going(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = filled(backbone, None)
    free = greedy_together(backbone, cache, PROMPTS, 12)
    ending = free[1][3]
    assert all(ending not in answer[:6] for answer in (free[0], free[2])), "choose another seed"
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", ending)
    assert greedy_together(backbone, cache, PROMPTS, 6) == [free[0][:6], free[1][:3], free[2][:6]]


def test_answers_stop_at_the_last_position() -> None:
    short = tiny_backbone(max_position_embeddings=50)
    cache = filled(short, None)
    together = greedy_together(short, cache, PROMPTS, 30)
    assert together == [greedy(short, cache, prompt, 30) for prompt in PROMPTS]
    # Position 50 does not exist: what follows the token at 49 is decoded, and nothing after it.
    assert (len(together[1]), len(together[2])) == (9, 2)
    before = snapshot(cache)
    with pytest.raises(ContextLengthError, match="50"):
        greedy_together(short, cache, [random_tokens(11)], 1)
    with pytest.raises(ContextLengthError, match="50"):
        score_together(short, cache, [(random_tokens(8), random_tokens(4))])
    assert same_bits(snapshot(cache), before)


def test_nothing_asked_is_nothing_answered(backbone: Backbone) -> None:
    cache = filled(backbone, None)
    assert score_together(backbone, cache, []) == [] and greedy_together(backbone, cache, [], 5) == []


def test_an_attention_with_additive_masks_gives_the_same() -> None:
    eager, standard = (tiny_backbone(attn_implementation=name) for name in ("eager", "sdpa"))
    pairs = list(zip(PROMPTS, ANSWERS, strict=True))
    for one, other in zip(*(score_together(b, filled(b, None), pairs) for b in (eager, standard)), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("method", [None, "shift"])
def test_answers_to_one_question_are_branches_of_it(backbone: Backbone, method: str | None) -> None:
    cache = filled(backbone, method)
    begun = [*ANSWERS[1][:4], *ANSWERS[0]]
    pairs = [
        (PROMPTS[0], ANSWERS[0]), (PROMPTS[1], ANSWERS[1]), (PROMPTS[0], ANSWERS[1]), (PROMPTS[0], begun),
    ]  # fmt: skip
    saved = 2 * len(PROMPTS[0]) + 4
    assert len(pack(pairs, 40, 40, shared=True).tokens) == len(pack(pairs, 40, 40).tokens) - saved
    for (prompt, answer), packed in zip(pairs, score_together(backbone, cache, pairs), strict=True):
        assert float((packed - score(backbone, cache, prompt, answer)).abs().max()) < 1e-3
        # Guard: behind the answer of another branch the scores are others.
        other = score(backbone, cache, [*prompt, *ANSWERS[1]], answer)
        assert float((packed - other).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["right", "too long", "half right", "wrong", "several"])
def test_drafts_save_steps_and_change_no_answer(backbone: Backbone, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, limits = filled(backbone, "mask"), (12, 9, 10)
    answers = [greedy(backbone, cache, prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    assert max(map(len, answers)) > 5
    agreed = [{"wrong": 0, "half right": len(answer) // 2}.get(kind, len(answer)) for answer in answers]
    # After the agreed part, another token than the right one.
    wrong = [
        [*answer[:part], (answer[part] + 1) % 50 if part < len(answer) else 9, 7, 8]
        for answer, part in zip(answers, agreed, strict=True)
    ]
    drafts = {
        "right": [[answer] for answer in answers],
        "too long": [[[*answer, *random_tokens(30)]] for answer in answers],
        "several": [[[9, 9], answer, answer[:2]] for answer in answers],
    }.get(kind, [[draft] for draft in wrong])
    before = snapshot(cache)
    passes: list[int] = []
    logits = Backbone.logits

    def counted(*given: Any, **named: Any) -> torch.Tensor:
        passes.append(1)
        return logits(*given, **named)

    monkeypatch.setattr(Backbone, "logits", counted)
    pairs = [(prompt, (*draft, 0)) for prompt, of in zip(PROMPTS, drafts, strict=True) for draft in of]
    starts = iter(map(greedy_start, (draft for of in drafts for draft in of), score_together(backbone, cache, pairs)))
    begun = [max((next(starts)[:limit] for _ in of), key=len) for of, limit in zip(drafts, limits, strict=True)]
    assert greedy_together(backbone, cache, PROMPTS, limits, begun) == answers
    # The token after the agreed part comes with the verification. The end of an answer is a token too.
    left = [min(limit, len(answer) + 1) - part - 1 for answer, limit, part in zip(answers, limits, agreed, strict=True)]
    assert len(passes) == 1 + max(0, *left) and (len(passes) == 1) == (kind not in ("half right", "wrong"))
    assert same_bits(snapshot(cache), before)
