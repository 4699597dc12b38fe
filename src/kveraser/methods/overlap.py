"""Choose the suffix tokens that an erased span influenced most, from the token ids alone.

Influence decreases with the distance from the span, and is high again where later text repeats the span's words: a
name, a value, a restatement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log

from kveraser.text.spans import Span

REPEATED_PAIR = 1.5
"""Factor for a token that repeats the span together with the token before it."""
CARRIED = 0.8
"""Share of the previous token's score that is added to a token's own: text after a repetition depends on it."""


def most_contaminated(
    tokens: Sequence[int], span: Span, window: int, overlap: int, inserted: Sequence[int] = ()
) -> list[int]:
    """Slots after the span to recompute: the first `window`, and the `overlap` others with the highest scores.

    A token that also occurs in the span scores the squared log of its inverse frequency in the context, plus a share of
    the score of the token before it. Needs no forward pass and no question.

    Args:
        tokens: the token id in every slot, negative where there is none.
        inserted: ids of the tokens that take the span's place, whose repetitions count too.

    Returns:
        At most `window + overlap` slots, increasing.
    """
    erased = tokens[span.start : span.end]
    counts, pairs = Counter([*tokens, *inserted]), {*pairwise(erased), *pairwise(inserted)}
    total = len(tokens) + len(inserted)
    rarity = {token: log(total / counts[token]) ** 2 for token in (*erased, *inserted) if token >= 0}
    scores: dict[int, float] = {}
    carried = 0.0
    for slot in range(span.end, len(tokens)):
        token = tokens[slot]
        own = rarity.get(token, 0.0)
        if slot > span.end and (tokens[slot - 1], token) in pairs:
            own *= REPEATED_PAIR
        carried = own + CARRIED * carried
        if token >= 0:
            scores[slot] = carried
    live = list(scores)
    # The sort is stable: of equal scores the earlier slot is taken.
    best = sorted(live[window:], key=lambda slot: -scores[slot])[:overlap]
    return sorted([*live[:window], *best])
