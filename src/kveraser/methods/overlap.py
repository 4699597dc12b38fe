"""Which suffix tokens took most from an erased span: those next to the seam, and those that repeat its words.

Contamination falls fast with the distance from the span, and rises again where later text comes back to what the span
said: a name, a value, a restatement. Both can be read off the token ids, without a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from math import log

from kveraser.text.spans import Span

REPEATED_PAIR = 1.5
"""A token that repeats the span together with the token before it counts as more of an echo."""
CARRIED = 0.8
"""The share of its predecessor's score that a token has as well: what follows an echo was said because of it."""


def most_contaminated(tokens: Sequence[int], span: Span, window: int, echoes: int) -> list[int]:
    """Slots behind the span that an erase should compute afresh: the first `window`, then the `echoes` best others.

    A token's score is the squared log of its rarity in the context if the span has it as well, and a share of the
    score of the token before it. The context is all that is asked: no states, no question.

    Args:
        tokens: the token id in every slot, negative where there is none.

    Returns:
        At most `window + echoes` slots, increasing.
    """
    erased = tokens[span.start : span.end]
    counts, pairs = Counter(tokens), set(pairwise(erased))
    rarity = {token: log(len(tokens) / counts[token]) ** 2 for token in erased if token >= 0}
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
    # Between equal scores the earlier slot: a suffix without echoes is computed from the seam on.
    best = sorted(live[window:], key=lambda slot: -scores[slot])[:echoes]
    return sorted([*live[:window], *best])
