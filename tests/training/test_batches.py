"""Batches and the order of cases: every case once an epoch, with common contexts and shapes together."""

from __future__ import annotations

from collections import Counter

import pytest

from kveraser.errors import ContextLengthError
from kveraser.measure.questions import Query
from kveraser.model.backbone import Backbone
from kveraser.training.batches import Order, batches, tokenized, trimmed
from kveraser.training.cases import Case, TokenizedCase, tokenize
from kveraser.training.distill import context, shape
from tests.tiny import POSITIONS, random_tokens


def case(number: int, prefix: int, span: int, suffix: int, seed: int | None = None) -> TokenizedCase:
    tokens = random_tokens(prefix + span + suffix, number if seed is None else seed)
    return TokenizedCase(
        id=str(number),
        task="test",
        prefix=tuple(tokens[:prefix]),
        span=tuple(tokens[prefix : prefix + span]),
        suffix=tuple(tokens[prefix + span :]),
        queries=(((5, 6), (7,)),),
        kinds=("influence",),
    )


def test_an_epoch_takes_every_case_once_in_an_order_by_seed_and_epoch() -> None:
    cases = [case(number, 4 + number % 3, 2, 3) for number in range(12)]

    def ids(seed: int, epoch: int) -> list[str]:
        order = Order(cases, seed, cases_per_step=4, cases_per_batch=2)
        return [one.id for step in range(3) for one in order.cases_of(3 * epoch + step)]

    assert sorted(ids(1, 0)) == sorted(one.id for one in cases)
    assert ids(1, 0) == ids(1, 0)
    assert ids(1, 0) != ids(2, 0) and ids(1, 0) != ids(1, 1)


def test_whole_batches_of_one_shape_stay_within_a_step() -> None:
    # Seven and six cases of two shapes hold a batch of four each; the rest, of three shapes, is shuffled.
    cases = [case(number, 4 if number < 7 else 5 if number < 13 else 6, 2, 3) for number in range(16)]
    order = Order(cases, 3, cases_per_step=8, cases_per_batch=4)
    pieces = [order.cases_of(step)[start : start + 4] for step in range(2) for start in (0, 4)]
    assert sum(len({shape(one) for one in piece}) == 1 for piece in pieces) >= 2


def test_spans_of_one_context_come_in_one_step() -> None:
    cases = [case(number, 4 + number % 3, 2, 8 - number % 3, seed=number // 3) for number in range(18)]
    assert len({context(one) for one in cases}) == 6
    order = Order(cases, 1, cases_per_step=6, cases_per_batch=1)
    for step in range(3):
        assert set(Counter(context(one) for one in order.cases_of(step)).values()) == {3}


def test_batches_have_one_shape_and_at_most_their_size() -> None:
    cases = [case(number, 4 + number % 2, 2, 3) for number in range(7)]
    assert batches(cases, 3) == [[0, 2, 4], [6], [1, 3, 5]]
    assert batches(cases, 1) == [[0], [2], [4], [6], [1], [3], [5]]


@pytest.mark.parametrize(
    ("length", "multiple", "kept"),
    [
        (3, 16, 3),
        (9, 16, 8),
        (15, 16, 12),
        (31, 16, 24),
        (47, 32, 32),
        (70, 16, 64),
        (100, 16, 96),
        (100, 1, 100),
        (100, 24, 96),
    ],
)
def test_a_part_is_cut_to_its_multiple_and_loses_no_more_than_a_third(length: int, multiple: int, kept: int) -> None:
    one = case(0, 6 + length, length, length)
    cut = trimmed(one, multiple, opening=6)
    assert shape(cut) == (6 + kept, kept, kept) and kept > 2 / 3 * length
    # The opening stays, and so does all that touches the span's start.
    assert cut.prefix[:6] == one.prefix[:6] and one.prefix.index(cut.prefix[6]) >= 6
    assert cut.prefix[6:] == one.prefix[len(one.prefix) - kept :]
    assert one.span[:kept] == cut.span and one.suffix[:kept] == cut.suffix


def test_the_opening_of_the_template_is_not_cut(backbone: Backbone) -> None:
    text = " ".join(f"word{number}" for number in range(60))
    source = Case("one", "test", text, (203, 260), (Query("What?", "Nothing at all."),))
    whole = tokenize(backbone.tokenizer, source)
    (uncut,) = tokenized(backbone, [source])
    assert uncut == whole
    (cut,) = tokenized(backbone, [source], shape_multiple=8)
    opening = next(i for i, (one, other) in enumerate(zip(cut.prefix, whole.prefix, strict=False)) if one != other)
    assert "You are helpful." in backbone.tokenizer.decode(cut.prefix[:opening])
    assert backbone.tokenizer.decode(cut.prefix[opening:]) in text
    assert len(cut.span) % 8 == len(cut.suffix) % 8 == 0 and cut.tokens < whole.tokens


def test_a_case_beyond_the_backbone_s_positions_is_refused(backbone: Backbone) -> None:
    source = Case("one", "test", "a b " * POSITIONS, (4, 8), (Query("What?", "Nothing."),))
    with pytest.raises(ContextLengthError, match=str(POSITIONS)):
        list(tokenized(backbone, [source]))
