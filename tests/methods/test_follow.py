"""`follow`: which suffix tokens it takes as repetitions of the span, and what computing them afresh does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kveraser.cache.editable import NO_TOKEN
from kveraser.methods import make_method
from kveraser.methods.apply import edit_tokens
from kveraser.methods.follow import Follow
from kveraser.methods.overlap import most_contaminated
from kveraser.methods.slots import Edit
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span
from tests.methods.test_methods import CHANGE, LENGTH, MIDDLE, TOKENS, TOLERANCE, changed_slots, erase, states, values
from tests.tiny import distance, random_tokens, same_bits, snapshot, tiny_backbone

#       0  1  2   3   4   5  6  7  8  9  10 11  12 13 14  15  16
TEXT = [1, 2, 70, 71, 72, 3, 4, 5, 6, 7, 8, 71, 9, 5, 70, 71, 6]
SPAN = Span(2, 5)


def test_words_of_the_span_are_found_again() -> None:
    # 70 71 repeat the span as a pair, the 71 alone does not, and what follows an echo comes before what doesn't.
    assert most_contaminated(TEXT, SPAN, 0, 1) == [15]
    assert most_contaminated(TEXT, SPAN, 0, 3) == [14, 15, 16]
    assert most_contaminated(TEXT, SPAN, 0, 5) == [11, 12, 14, 15, 16]
    assert most_contaminated(TEXT, SPAN, 2, 1) == [5, 6, 15]


def test_a_word_of_everywhere_is_no_echo() -> None:
    common = [9, 1, 9, 2, 9, 70, 9, 3, 9, 4, 9, 70, 9, 5]
    assert most_contaminated(common, Span(4, 6), 0, 1) == [11]


def test_without_overlap_it_recomputes_the_first_tokens() -> None:
    tokens = list(range(20))
    assert most_contaminated(tokens, Span(4, 8), 3, 4) == list(range(8, 15))
    assert most_contaminated(tokens, Span(4, 8), 30, 30) == list(range(8, 20))
    assert most_contaminated(tokens, Span(17, 20), 5, 5) == []


def test_slots_without_a_token_are_never_taken() -> None:
    tokens = [1, NO_TOKEN, 70, 71, NO_TOKEN, 2, NO_TOKEN, 70, 3]
    for window in range(6):
        taken = most_contaminated(tokens, Span(1, 4), window, 9)
        assert taken == [5, 7, 8]
    assert most_contaminated(tokens, Span(1, 4), 1, 1) == [5, 7]


def test_without_overlap_it_is_repair() -> None:
    backbone = tiny_backbone()
    for window in (5, LENGTH):
        followed, _ = erase(backbone, f"follow({window}, 0.5, 0)")
        repaired, _ = erase(backbone, f"repair({window}, 0.5)")
        assert followed.recomputed == repaired.recomputed and followed.exact == repaired.exact
        assert followed.cache.exact_length == repaired.cache.exact_length
        assert distance(states(followed.cache), states(repaired.cache)) < TOLERANCE
    # All of the suffix computed afresh is the exact reference.
    assert followed.exact and followed.cache.exact_length == LENGTH - len(MIDDLE)


@pytest.mark.parametrize("echo", [30, 40])
def test_an_echo_is_computed_as_if_all_before_it_were_what_the_cache_says(echo: int) -> None:
    backbone, tokens = tiny_backbone(), list(TOKENS)
    tokens[echo : echo + 2] = tokens[MIDDLE.start : MIDDLE.start + 2]
    followed, journal = erase(backbone, "follow(3, overlap=0.45, per_span=0)", tokens=tokens)
    shifted, _ = erase(backbone, "shift", tokens=tokens)
    seam, moved = MIDDLE.start, echo + 1 - len(MIDDLE)
    assert followed.recomputed == 7 and followed.slots == shifted.slots and not followed.exact
    assert followed.cache.exact_length == seam + 3
    changed = changed_slots(values(followed.cache)[2], values(shifted.cache)[2])
    assert changed == [*range(seam, seam + 3), *range(moved, moved + 4)]
    # The same by hand: the cache up to the echo, and the echo behind it.
    prefix = followed.cache.fork()
    prefix.truncate(moved)
    backbone.forward(tokens[echo + 1 : echo + 5], prefix, torch.arange(moved, moved + 4, dtype=torch.float64))
    assert distance(states(prefix, moved), states(followed.cache, moved, moved + 4)) < TOLERANCE
    assert distance(states(shifted.cache, moved, moved + 4), states(followed.cache, moved, moved + 4)) > CHANGE
    cache = followed.cache
    cache.revert(journal)
    assert same_bits(snapshot(cache), snapshot(backbone.prefill(tokens)))


@pytest.mark.parametrize(("recipe", "tokens"), [("follow", 32 + 2 + 7), ("follow(4, 1, 2)", 4 + 9 + 18)])
def test_its_cost_follows_the_span(recipe: str, tokens: int) -> None:
    assert make_method(recipe).estimate(10, len(MIDDLE), 100) == tokens
    assert make_method(recipe).estimate(10, len(MIDDLE), 7) == 7


class Counted(Backbone):
    """A backbone that notes how many tokens each pass of its decoder runs."""

    def __init__(self, like: Backbone) -> None:
        super().__init__(like.model, like.tokenizer)
        self.passes: list[int] = []

    def forward(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> None:
        self.passes.append(len(tokens))
        super().forward(tokens, *args, **kwargs)


def test_several_edits_run_in_one_pass_that_runs_no_token_twice() -> None:
    backbone = Counted(tiny_backbone())
    tokens, added = list(TOKENS), [random_tokens(2, seed=8), random_tokens(3, seed=9)]
    edits = [Edit({*range(6, 10)}, range(LENGTH, LENGTH + 2)), Edit({*range(20, 26)}, range(LENGTH + 2, LENGTH + 5))]
    tokens += added[0] + added[1]
    for window, exact in ((3, False), (LENGTH, True)):
        cache = backbone.prefill(TOKENS)
        before, backbone.passes = snapshot(cache), []
        with cache.edit() as journal:
            method = Follow(window, 0.0, 1.5).resolve(backbone)
            recomputed = edit_tokens(backbone, cache, method, tokens, edits)
        edited = [*tokens[:6], *added[0], *tokens[10:20], *added[1], *tokens[26:LENGTH]]
        assert [tokens[index] for index in cache.slot_to_token.tolist()] == edited
        assert backbone.passes == [recomputed] and cache.exact == exact
        fresh = backbone.prefill(edited)
        if exact:
            # Windows over the whole suffix: equal to a fresh prefill, and no token runs twice.
            assert recomputed == len(edited) - 6
            assert distance(states(cache), states(fresh)) < TOLERANCE
        else:
            # New tokens, windows, and at most 1.5 tokens for every token of the spans, where they are no windows.
            assert 5 + 2 * window < recomputed <= 5 + 2 * window + 6 + 9
            assert cache.exact_length == 6 + 2 + window
            assert distance(states(cache), states(fresh)) > CHANGE
        cache.revert(journal)
        assert same_bits(snapshot(cache), before)


def test_recompute_runs_the_suffix_once_for_several_edits() -> None:
    backbone = Counted(tiny_backbone())
    tokens = [*TOKENS, *random_tokens(3, seed=8)]
    edits = [Edit({*range(6, 10)}), Edit(frozenset(), range(LENGTH, LENGTH + 3)), Edit({*range(30, 33)})]
    cache, backbone.passes = backbone.prefill(TOKENS), []
    # New tokens take the indices after those of the text: they go to the end of it.
    with cache.edit():
        recomputed = edit_tokens(backbone, cache, make_method("recompute"), tokens, [edits[0], edits[2], edits[1]])
    edited = [*TOKENS[:6], *TOKENS[10:30], *TOKENS[33:], *tokens[LENGTH:]]
    assert backbone.passes == [recomputed] and recomputed == len(edited) - 6 and cache.exact
    assert distance(states(cache), states(backbone.prefill(edited))) < TOLERANCE
