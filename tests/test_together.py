"""Copies of caches asked together answer as each does alone, whatever their lengths and positions are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kveraser.backbone import Backbone
from kveraser.bench.together import Rows
from kveraser.cache import EditableCache
from kveraser.decode import greedy, score
from kveraser.errors import ContextLengthError
from kveraser.packed import Pair
from tests.test_packed import ANSWERS, PROMPTS, filled
from tests.tiny import random_tokens, same_bits, snapshot, tiny_backbone

PAIRS: list[Pair] = [*zip(PROMPTS, ANSWERS, strict=True), (PROMPTS[0], [*ANSWERS[0], *ANSWERS[1]])]
EDITS = (None, "mask", "shift", "erratum")
"""Caches of 40 slots, of 40 with a hole, of 32, and of more than 40."""


def rows_of(backbone: Backbone, caches: Sequence[EditableCache]) -> Rows:
    rows = Rows(backbone)
    for cache in caches:
        rows.add(cache)
    return rows


@pytest.mark.parametrize("order", [EDITS, EDITS[::-1], EDITS[2:3]])
def test_scores_are_those_of_each_cache_alone(rotary_backbone: Backbone, order: Sequence[str | None]) -> None:
    caches = [filled(rotary_backbone, method) for method in order]
    rows = rows_of(rotary_backbone, caches)
    lengths = [cache.length for cache in caches]
    assert rows.slots == lengths and len(set(lengths)) == (3 if len(order) > 1 else 1)
    together = rows.score(PAIRS)
    for cache, scores in zip(caches, together, strict=True):
        for (prompt, answer), packed in zip(PAIRS, scores, strict=True):
            alone = score(rotary_backbone, cache, prompt, answer)
            assert packed.shape == alone.shape and float((packed - alone).abs().max()) < 1e-3
    # Guard: the caches do not say the same.
    firsts = [scores[0] for scores in together]
    assert all(float((one - firsts[0]).abs().max()) > 0.01 for one in firsts[1:])


def test_answers_are_those_of_each_cache_alone(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    asked = [PROMPTS, PROMPTS[:1], [PROMPTS[2], *PROMPTS[:2]], [random_tokens(30, 7)]]
    together = rows_of(backbone, caches).greedy(asked, 12)
    alone = [[greedy(backbone, cache, one, 12) for one in own] for cache, own in zip(caches, asked, strict=True)]
    assert together == alone and len({tuple(answer) for own in alone for answer in own}) > 5


def test_a_question_that_ends_leaves_the_others_going(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(backbone, [filled(backbone, method) for method in EDITS])
    free = rows.greedy([PROMPTS] * len(EDITS), 12)
    ending = free[1][1][3]
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", ending)

    def cut(answer: list[int]) -> list[int]:
        return answer[: answer.index(ending)] if ending in answer else answer

    expected = [[cut(answer) for answer in own] for own in free]
    assert rows.greedy([PROMPTS] * len(EDITS), 12) == expected
    lengths = {len(answer) for own in expected for answer in own}
    assert min(lengths) <= 3 and max(lengths) == 12


def test_rows_are_copies_and_can_be_chosen(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    before = [snapshot(cache) for cache in caches]
    rows = rows_of(backbone, caches)
    first = rows.score(PAIRS)
    rows.greedy([PROMPTS] * len(EDITS), 5)
    assert all(same_bits(snapshot(cache), held) for cache, held in zip(caches, before, strict=True))
    backbone.extend(caches[0], random_tokens(5))
    caches[2].truncate(10)
    for one, other in zip(first, rows.score(PAIRS), strict=True):
        assert all(torch.equal(mine, again) for mine, again in zip(one, other, strict=True))
    chosen = rows.only([2, 0])
    for place, row in enumerate((2, 0)):
        for mine, again in zip(first[row], chosen.score(PAIRS)[place], strict=True):
            assert float((mine - again).abs().max()) < 1e-3


def test_answers_stop_at_the_last_position() -> None:
    short = tiny_backbone(max_position_embeddings=50)
    caches = [filled(short, method) for method in (None, "shift")]
    rows = rows_of(short, caches)
    together = rows.greedy([PROMPTS] * 2, 30)
    assert together == [[greedy(short, cache, prompt, 30) for prompt in PROMPTS] for cache in caches]
    # Position 50 does not exist: what follows the token at 49 is decoded, and nothing after it.
    assert (len(together[0][1]), len(together[0][2])) == (9, 2)
    with pytest.raises(ContextLengthError, match="50"):
        rows.score([(random_tokens(8), random_tokens(4))])


def test_an_attention_with_additive_masks_gives_the_same() -> None:
    scores = []
    for name in ("eager", "sdpa"):
        backbone = tiny_backbone(attn_implementation=name)
        made = rows_of(backbone, [filled(backbone, method) for method in EDITS]).score(PAIRS)
        scores.append(torch.cat([scored for row in made for scored in row]))
    assert torch.allclose(*scores, atol=1e-3)
