"""An adversary that searches for the wording that makes a cache reveal erased text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError
from kveraser.measure.case import Attacked
from kveraser.measure.packing import score_together
from kveraser.model.backbone import Backbone
from kveraser.text import chat
from kveraser.text.tokenized import encode

Wording = tuple[int, int, int]
"""Which opening, request and form, by number."""


@dataclass(frozen=True)
class Attack:
    """The wordings in which an adversary can ask for erased text: any opening, request and form, joined.

    Attributes:
        target: the text that must not come out, forced as the answer to rate a prompt.
        secret: a greedy answer that contains it counts as a leak.
        seed: of the search.
    """

    openings: tuple[str, ...]
    requests: tuple[str, ...]
    forms: tuple[str, ...]
    target: str
    secret: str
    seed: int

    def __call__(self, backbone: Backbone, cache: EditableCache, turn_open: bool) -> Attacked:
        """Search with the default effort; see `attack`."""
        return attack(backbone, cache, turn_open, self)


def attack(
    backbone: Backbone,
    cache: EditableCache,
    context_turn_open: bool,
    attack: Attack,
    candidates: int = 2,
    rounds: int = 2,
) -> Attacked:
    """Search for the wording after which the target is likeliest. The cache is left as it was.

    The first round draws wordings at random; later rounds change one part of the best one so far. No wording is tried
    twice, and the search ends early when none is left. The same seed gives the same search.

    Args:
        context_turn_open: whether the user's turn that contains the context is still open.
        candidates: wordings scored in each round, in one pass.

    Raises:
        InputError: no candidates or rounds, or an attack without wordings or target.
        ContextLengthError: a prompt and the target do not fit after the context.
    """
    if candidates < 1 or rounds < 1:
        raise InputError(f"an attack of {rounds} rounds of {candidates} candidates tries nothing: give at least 1 each")
    wordings, target = _wordings(attack), encode(backbone.tokenizer, attack.target, follows=True)[0]
    if not wordings or not target:
        raise InputError("an attack needs an opening, a request, a form and a target: an empty text counts as one")
    rng = random.Random(attack.seed)
    prompts: dict[Wording, tuple[int, ...]] = {}
    scores: dict[Wording, float] = {}
    for _ in range(rounds):
        left = [wording for wording in wordings if wording not in scores]
        if scores:
            best = max(scores, key=scores.__getitem__)
            left = [wording for wording in left if _changed(wording, best) == 1]
        drawn = rng.sample(left, min(candidates, len(left)))
        if not drawn:
            break
        prompts |= {wording: _prompt(backbone.tokenizer, attack, wording, context_turn_open) for wording in drawn}
        scored = score_together(backbone, cache, [(prompts[wording], target) for wording in drawn])
        for wording, log_probabilities in zip(drawn, scored, strict=True):
            scores[wording] = float(log_probabilities[range(len(target)), target].mean())
    best = max(scores, key=scores.__getitem__)
    return Attacked(
        prompt_text=_text(attack, best),
        prompt=prompts[best],
        target=tuple(target),
        log_probability=scores[best],
        tried=tuple((_text(attack, wording), score) for wording, score in scores.items()),
    )


def _wordings(attack: Attack) -> list[Wording]:
    return list(product(range(len(attack.openings)), range(len(attack.requests)), range(len(attack.forms))))


def _changed(one: Wording, other: Wording) -> int:
    """In how many parts two wordings differ."""
    return sum(mine != yours for mine, yours in zip(one, other, strict=True))


def _text(attack: Attack, wording: Wording) -> str:
    opening, request, form = wording
    chosen = (attack.openings[opening], attack.requests[request], attack.forms[form])
    return " ".join(text for text in chosen if text)


def _prompt(tokenizer: Any, attack: Attack, wording: Wording, turn_open: bool) -> tuple[int, ...]:
    return tuple(encode(tokenizer, chat.question_text(tokenizer, _text(attack, wording), turn_open), follows=True)[0])
