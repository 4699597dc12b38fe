"""Choose the cases of each step and group them into batches.

Both depend on recipe and step only, so resumed runs and parallel processes see the same cases without communication.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from kveraser.model.backbone import Backbone
from kveraser.text import chat
from kveraser.training.cases import Case, TokenizedCase, tokenize
from kveraser.training.distill import Shape, context, shape


def tokenized(backbone: Backbone, cases: Iterable[Case], shape_multiple: int = 1) -> Iterator[TokenizedCase]:
    """Tokenize cases, and cut them to common shapes if `shape_multiple` is above 1 (see `trimmed`).

    Raises:
        InputError, SpanError: as `tokenize`.
        ContextLengthError: a case is longer than the backbone allows.
    """
    # The opening of the chat template is not cut.
    templated = chat.has_template(backbone.tokenizer)
    frame = chat.first_turn_frame(backbone.tokenizer).opening if templated else ""
    opening = len(backbone.tokenize(frame, special=not templated)[0]) if shape_multiple > 1 else 0
    # One int object per distinct token: one per token of a large case file would take gigabytes.
    numbers: dict[int, int] = {}

    def shared(tokens: Iterable[int]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(token, token) for token in tokens)

    for text in cases:
        case = trimmed(tokenize(backbone.tokenizer, text), shape_multiple, opening)
        backbone.check_room(0, case.tokens + max(len(prompt) + len(answer) for prompt, answer in case.queries))
        yield replace(case, prefix=shared(case.prefix), span=shared(case.span), suffix=shared(case.suffix))


def trimmed(case: TokenizedCase, multiple: int, opening: int) -> TokenizedCase:
    """Cut a case so that more cases have the same shape, because only these run in one batch.

    The length of each part becomes a multiple of `multiple`, or of the largest power of two that is at most half the
    length, so that no part loses more than a third. The prefix is cut after its first `opening` tokens, span and suffix
    at their ends. Exact reference and edited cache read the same tokens, so the objective is the same.
    """

    def kept(length: int) -> int:
        unit = min(multiple, 1 << max(0, (length // 2).bit_length() - 1))
        return length - length % unit

    head, body = case.prefix[:opening], case.prefix[opening:]
    return replace(
        case,
        prefix=(*head, *body[len(body) - kept(len(body)) :]),
        span=case.span[: kept(len(case.span))],
        suffix=case.suffix[: kept(len(case.suffix))],
    )


class Order:
    """The cases of every step. An epoch is a shuffle that keeps cases with a common context or shape together."""

    def __init__(self, cases: Sequence[TokenizedCase], seed: int, cases_per_step: int, cases_per_batch: int) -> None:
        self.cases, self.seed = cases, seed
        self.cases_per_step, self.cases_per_batch = cases_per_step, cases_per_batch
        self.steps_per_epoch = len(cases) // cases_per_step
        by_context: dict[int, list[int]] = defaultdict(list)
        for index, case in enumerate(cases):
            by_context[hash(context(case))].append(index)
        self._same_context = [group for group in by_context.values() if len(group) > 1]
        by_shape: dict[Shape, list[int]] = defaultdict(list)
        for group in by_context.values():
            if len(group) == 1:
                by_shape[shape(cases[group[0]])].append(group[0])
        self._same_shape = list(by_shape.values())
        self._epoch: tuple[int, list[int]] = (-1, [])

    def cases_of(self, step: int) -> list[TokenizedCase]:
        """Return the cases of a step; steps count from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(random.Random(f"{self.seed}/{epoch}"))
        chosen = self._epoch[1][place * self.cases_per_step : (place + 1) * self.cases_per_step]
        return [self.cases[index] for index in chosen]

    def _shuffled(self, rng: random.Random) -> list[int]:
        pieces: list[list[int]] = []
        loose: list[int] = []
        for group in self._same_shape:
            *whole, rest = _cut(rng.sample(group, len(group)), self.cases_per_batch)
            # Remainders are joined to pieces of batch size, so that a full batch never crosses a step.
            pieces += [*whole, rest] if len(rest) == self.cases_per_batch else whole
            loose += [] if len(rest) == self.cases_per_batch else rest
        rng.shuffle(loose)
        pieces += _cut(loose, self.cases_per_batch)
        for group in self._same_context:
            pieces += _cut(rng.sample(group, len(group)), self.cases_per_step)
        rng.shuffle(pieces)
        return [index for piece in pieces for index in piece]


def batches(cases: Sequence[TokenizedCase], size: int) -> list[list[int]]:
    """Group the indices of `cases` into batches of one shape and at most `size` cases, in order of the first case."""
    groups: dict[Shape, list[int]] = defaultdict(list)
    for place, case in enumerate(cases):
        groups[shape(case)].append(place)
    return [batch for group in groups.values() for batch in _cut(group, size)]


def _cut(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
