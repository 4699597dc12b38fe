"""`follow`: which suffix tokens it takes as repetitions of the span, and what computing them afresh does."""

from __future__ import annotations

import pytest
import torch

from kveraser.cache.editable import NO_TOKEN
from kveraser.methods import make_method
from kveraser.methods.overlap import most_contaminated
from kveraser.text.spans import Span
from tests.methods.test_methods import CHANGE, LENGTH, MIDDLE, TOKENS, TOLERANCE, changed_slots, erase, states, values
from tests.tiny import distance, same_bits, snapshot, tiny_backbone

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
