"""Copies of caches asked together answer as each does alone, whatever their lengths and positions are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import CacheError, ContextLengthError
from kveraser.measure.packing import Pair
from kveraser.measure.together import Memory, Rows
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy, score
from tests.measure.test_packing import ANSWERS, PROMPTS, filled
from tests.tiny import random_tokens, same_bits, snapshot, tiny_backbone

PAIRS: list[Pair] = [*zip(PROMPTS, ANSWERS, strict=True), (PROMPTS[0], [*ANSWERS[0], *ANSWERS[1]])]
EDITS = (None, "mask", "shift", "erratum")
"""Caches of 40 slots, of 40 with a hole, of 32, and of more than 40."""
ALL = range(len(EDITS))


def rows_of(
    backbone: Backbone, caches: Sequence[EditableCache], memory: Memory | None = None, appended: int = 200
) -> Rows:
    rows = Rows(backbone, len(caches), max(cache.length for cache in caches), appended, memory or Memory())
    for cache in caches:
        rows.add(cache)
    return rows


@pytest.mark.parametrize("order", [EDITS, EDITS[::-1], EDITS[2:3]])
def test_scores_are_those_of_each_cache_alone(rotary_backbone: Backbone, order: Sequence[str | None]) -> None:
    caches = [filled(rotary_backbone, method) for method in order]
    rows = rows_of(rotary_backbone, caches)
    lengths = [cache.length for cache in caches]
    assert rows.slots == lengths and len(set(lengths)) == (3 if len(order) > 1 else 1)
    # What was asked before is not heard.
    for pairs in (PAIRS, PAIRS[::-1]):
        together = rows.score(range(len(order)), pairs)
        for cache, scores in zip(caches, together, strict=True):
            for (prompt, answer), packed in zip(pairs, scores, strict=True):
                alone = score(rotary_backbone, cache, prompt, answer)
                assert packed.shape == alone.shape and float((packed - alone).abs().max()) < 1e-3
    # Guard: the caches do not say the same.
    firsts = [scores[0] for scores in together]
    assert all(float((one - firsts[0]).abs().max()) > 0.01 for one in firsts[1:])


def test_answers_go_on_from_the_questions_of_each_row(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    rows = rows_of(backbone, caches)
    # Groups with other questions, of which some want no answer, and words for every row of its own.
    rows.score(range(0, 1), PAIRS, [None, 12, 5, None])
    rows.score(range(1, 4), PAIRS[::-1], [7, None, None, 12])
    own = [random_tokens(length, length) for length in (3, 9, 9)]
    rows.ask(range(1, 4), own, 10)
    rows.ask(range(0, 1), [PROMPTS[0]], 1)
    expected = [[(PROMPTS[1], 12), (PROMPTS[2], 5), (PROMPTS[0], 1)]]
    expected += [[(PROMPTS[0], 7), (PROMPTS[0], 12), (prompt, 10)] for prompt in own]
    alone = [
        [greedy(backbone, cache, prompt, limit) for prompt, limit in asked]
        for cache, asked in zip(caches, expected, strict=True)
    ]
    assert rows.decode() == alone
    assert len({tuple(answer) for of_row in alone for answer in of_row}) > 5
    assert len({len(answer) for of_row in alone for answer in of_row}) > 4


@pytest.mark.parametrize("draft", ["right", "too long", "half right", "wrong", "none"])
def test_a_draft_changes_no_answer_and_saves_the_steps_it_foretells(
    backbone: Backbone, draft: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, limits = filled(backbone, "mask"), (12, 9, 10)
    answers = [greedy(backbone, cache, prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    foretold = [{"right": len(one), "too long": len(one), "half right": len(one) // 2}.get(draft, 0) for one in answers]
    drafts = [
        [
            *answer[:right],
            *([] if draft in ("right", "none") else [(answer[right] + 1) % 50 if right < len(answer) else 9, 7, 8]),
        ]
        for answer, right in zip(answers, foretold, strict=True)
    ]
    if draft == "too long":
        drafts = [[*answer, *random_tokens(30)] for answer in answers]
    steps: list[int] = []
    forward = Rows._forward

    def counted(rows: Rows, *states: object) -> torch.Tensor:
        steps.append(1)
        return forward(rows, *states)  # type: ignore[arg-type]

    monkeypatch.setattr(Rows, "_forward", counted)
    rows = rows_of(backbone, [cache, filled(backbone, "erratum")])
    without = rows_of(backbone, [cache]).score(range(1), PAIRS[:2])
    scores = rows.score(range(1), PAIRS[:2], limits[:2], drafts[:2])
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(scores[0], without[0], strict=True))
    rows.ask(range(1), [PROMPTS[2]], limits[2], drafts[2])
    steps.clear()
    assert rows.decode()[0] == answers
    # A token behind what was foretold comes with the question; the end of an answer is a token too.
    wanted = [
        min(limit, len(answer) + 1) - right - 1 for answer, limit, right in zip(answers, limits, foretold, strict=True)
    ]
    assert len(steps) == max(0, *wanted)
    assert (draft in ("right", "too long")) == (not steps) and max(map(len, answers)) > 5


def test_rows_of_one_draft_part_where_they_disagree(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    expected = [
        [greedy(backbone, cache, PROMPTS[0], 12), greedy(backbone, cache, own, 10)]
        for cache, own in zip(caches, (PROMPTS[1], *PROMPTS), strict=True)
    ]
    rows = rows_of(backbone, caches)
    rows.score(ALL, PAIRS[:1], [12], [expected[1][0]])
    rows.ask(ALL, [PROMPTS[1], *PROMPTS], 10, expected[0][1])
    assert rows.decode() == expected
    # Guard: the draft is some rows' answer and not others'.
    assert len({tuple(own[0]) for own in expected}) > 2


def test_nothing_asked_is_nothing_answered(backbone: Backbone) -> None:
    rows = rows_of(backbone, [filled(backbone, "mask")])
    rows.score(range(1), PAIRS, [None] * len(PAIRS))
    assert rows.decode() == [[]]


def test_a_question_that_ends_leaves_the_others_going(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [filled(backbone, method) for method in EDITS]

    def answers() -> list[list[list[int]]]:
        rows = rows_of(backbone, caches)
        rows.score(ALL, PAIRS, [12] * len(PAIRS))
        return rows.decode()

    free = answers()
    # Most rows end early, so that the others move up.
    ending = free[1][1][3]
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", ending)

    def cut(answer: list[int]) -> list[int]:
        return answer[: answer.index(ending)] if ending in answer else answer

    expected = [[cut(answer) for answer in own] for own in free]
    assert answers() == expected
    lengths = {len(answer) for own in expected for answer in own}
    assert min(lengths) <= 3 and max(lengths) == 12


def test_rows_that_are_done_make_room(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    limits = (2, 2, 1, 12)
    expected = [[greedy(backbone, cache, PROMPTS[0], limit)] for cache, limit in zip(caches, limits, strict=True)]
    rows = rows_of(backbone, caches)
    for row, limit in enumerate(limits):
        rows.score(range(row, row + 1), PAIRS[:1], [limit])
    assert rows.decode() == expected and [len(own[0]) for own in expected][::3] == [2, 7]


def test_rows_are_copies_and_their_memory_is_used_again(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in EDITS]
    before = [snapshot(cache) for cache in caches]
    memory = Memory()
    # What other rows left, in other places.
    used = rows_of(backbone, [filled(backbone, "erratum")] * 5, memory, appended=150)
    used.score(range(1), PAIRS, [12] * len(PAIRS))
    used.decode()
    spoken = []
    for store in (Memory(), memory):
        rows = rows_of(backbone, caches, store)
        scores = rows.score(ALL, PAIRS, [6] * len(PAIRS))
        spoken.append(([one for row in scores for one in row], rows.decode()))
    assert all(torch.equal(one, other) for one, other in zip(spoken[0][0], spoken[1][0], strict=True))
    assert spoken[0][1] == spoken[1][1]
    assert all(same_bits(snapshot(cache), held) for cache, held in zip(caches, before, strict=True))


def test_a_larger_memory_is_taken_when_it_is_needed(backbone: Backbone) -> None:
    memory, caches = Memory(), [filled(backbone, method) for method in EDITS]
    small = rows_of(backbone, caches[2:3], memory, appended=60)
    first = small.score(range(1), PAIRS)[0]
    large = rows_of(backbone, caches, memory)
    for one, other in zip(first, large.score(ALL, PAIRS)[2], strict=True):
        assert float((one - other).abs().max()) < 1e-3


def test_equal_caches_share_a_row(backbone: Backbone) -> None:
    caches = [filled(backbone, method) for method in ("erratum", "shift", "erratum", "shift")]
    rows = Rows(backbone, 4, 60, 100, Memory())
    assert [rows.add(cache) for cache in caches] == [0, 1, 0, 1]
    # Only with rows from `since` on.
    assert [rows.add(caches[0], since=1), rows.add(caches[1], since=2)] == [2, 3]
    assert not rows.fits(caches[0]) and rows.slots == [caches[0].length, caches[1].length] * 2
    moved = filled(backbone, "erratum")
    with moved.edit():
        moved.set_next_position(moved.next_position + 1)
    other = Rows(backbone, 4, 60, 100, Memory())
    # The same states, but what follows stands elsewhere.
    assert [other.add(caches[0]), other.add(moved)] == [0, 1]


def test_a_cache_that_is_too_long_does_not_fit(backbone: Backbone) -> None:
    rows = Rows(backbone, 2, 40, 100, Memory())
    assert rows.fits(filled(backbone, None)) and not rows.fits(filled(backbone, "erratum"))


def test_more_questions_than_were_announced_are_refused(backbone: Backbone) -> None:
    rows = rows_of(backbone, [filled(backbone, None)], appended=10)
    with pytest.raises(CacheError, match="stop at 50"):
        rows.score(range(1), PAIRS)


def test_answers_stop_at_the_last_position() -> None:
    short = tiny_backbone(max_position_embeddings=50)
    caches = [filled(short, method) for method in (None, "shift")]
    rows = rows_of(short, caches)
    rows.ask(range(2), [PROMPTS[1], PROMPTS[1]], 30)
    rows.ask(range(2), [PROMPTS[2], PROMPTS[0]], 30)
    expected = [[greedy(short, caches[row], PROMPTS[place], 30) for place in (1, 2 - 2 * row)] for row in range(2)]
    answers = rows.decode()
    assert answers == expected
    # Position 50 does not exist: what follows the token at 49 is decoded, and nothing after it.
    assert [len(answer) for answer in answers[0]] == [9, 2]
    with pytest.raises(ContextLengthError, match="50"):
        rows.score(range(1), [(random_tokens(8), random_tokens(4))])


def test_an_attention_with_additive_masks_gives_the_same() -> None:
    scores = []
    for name in ("eager", "sdpa"):
        backbone = tiny_backbone(attn_implementation=name)
        made = rows_of(backbone, [filled(backbone, method) for method in EDITS]).score(ALL, PAIRS)
        scores.append(torch.cat([scored for row in made for scored in row]))
    assert torch.allclose(*scores, atol=1e-3)
