"""Asks one cache several questions in one pass. Each question attends to the context and to itself only.

A pass over several tokens costs little more than a pass over one. All questions are appended to the cache together,
each starting at the cache's next position, under a mask that separates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kveraser.cache.editable import EditableCache
from kveraser.model.backbone import Backbone
from kveraser.model.decode import end_tokens, rewound

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a question and of its forced answer; neither is empty."""
ROOT = -1
"""Parent of tokens that follow directly on the context."""


@dataclass(frozen=True)
class Packed:
    """Questions and answers packed into one sequence after a context.

    Attributes:
        tokens: of all pairs in order, each without its answer's last token. Shared beginnings occur once.
        positions: of every token, float64 `[tokens]`. All pairs start at the same position.
        visible: which slots every token attends to, bool `[tokens, context + tokens]`.
        kept: indices whose logits predict the answers, int64 `[answer tokens]`.
    """

    tokens: list[int]
    positions: torch.Tensor
    visible: torch.Tensor
    kept: torch.Tensor


def pack(pairs: Sequence[Pair], context: int, position: int, shared: bool = False) -> Packed:
    """Pack `pairs` after a context of `context` slots, each starting at `position`.

    Args:
        shared: tokens that pairs have in common at the beginning occur once, as in a trie.
    """
    tokens: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    paths: list[torch.Tensor] = []
    places: dict[tuple[int, int], int] = {}
    for pair, (prompt, answer) in enumerate(pairs):
        parent = ROOT if shared else ROOT - pair
        path: list[int] = []
        for token in [*prompt, *answer[:-1]]:
            if not shared or (parent, token) not in places:
                places[parent, token] = len(tokens)
                tokens.append(token)
                positions.append(position + len(path))
            parent = places[parent, token]
            path.append(parent)
        kept += path[len(prompt) - 1 :]
        paths.append(torch.tensor(path))
    own = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for seen in paths:
        own[seen[:, None], seen] = torch.ones(len(seen), len(seen), dtype=torch.bool).tril()
    visible = torch.cat([torch.ones(len(tokens), context, dtype=torch.bool), own], dim=1)
    return Packed(tokens, torch.tensor(positions, dtype=torch.float64), visible, torch.tensor(kept))


def score_together(backbone: Backbone, cache: EditableCache, pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """Teacher-forced log-probabilities of every pair, float32 `[answer, vocabulary]`: as `score`, but in one pass.

    The cache is left as it was.

    Raises:
        ContextLengthError: not enough positions; nothing is computed then.
    """
    if not pairs:
        return []
    packed = pack(pairs, cache.length, cache.next_position, shared=True)
    backbone.check_room(0, int(packed.positions.max()) + 1)
    with rewound(cache):
        mask = backbone.attention_mask(packed.visible)
        logits = backbone.logits(cache, packed.tokens, packed.kept, packed.positions, mask)
    backbone.let_others_in()
    return list(logits.log_softmax(dim=-1).split([len(answer) for _, answer in pairs]))


def greedy_together(
    backbone: Backbone,
    cache: EditableCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    begun: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """The greedy answers' tokens, without end tokens: as `greedy`, but one pass for a step of all questions.

    The cache is left as it was. An answer ends at the backbone's last position.

    Args:
        max_new_tokens: one limit for all questions, or one each.
        begun: of every question, the first tokens of its greedy answer where they are known, its end token included.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    lanes, ends = _Lanes(backbone, cache), end_tokens(backbone)
    answers = [list(answer) for answer in begun] or [list[int]() for _ in prompts]

    def incomplete(place: int) -> bool:
        answer, most = answers[place], backbone.max_positions
        if not answer:
            return limits[place] > 0
        fits = most is None or lanes.start + len(prompts[place]) + len(answer) <= most
        return fits and answer[-1] not in ends and len(answer) < limits[place]

    feed = {place: [*prompt, *answers[place]] for place, prompt in enumerate(prompts) if incomplete(place)}
    with rewound(cache):
        while feed:
            lasts = [length - 1 for length in accumulate(map(len, feed.values()))]
            chosen = lanes.append([feed.get(place, ()) for place in range(len(prompts))], lasts).argmax(dim=-1)
            for place, token in zip(feed, chosen.tolist(), strict=True):
                answers[place].append(token)
            feed = {place: answers[place][-1:] for place in feed if incomplete(place)}
            if feed:
                backbone.let_others_in()
    return [[token for token in answer if token not in ends] for answer in answers]


def greedy_start(draft: Sequence[int], scores: torch.Tensor) -> list[int]:
    """The first tokens of a greedy answer: the part of a draft that it agrees with, and the token after that.

    Args:
        scores: after every part of the draft, the empty and the whole one included, float `[draft + 1, vocabulary]`.
    """
    likeliest = scores.argmax(dim=-1).tolist()
    agreed = next((number for number, token in enumerate(draft) if likeliest[number] != token), len(draft))
    return likeliest[: agreed + 1]


class _Lanes:
    """Tracks which question every appended slot belongs to."""

    def __init__(self, backbone: Backbone, cache: EditableCache) -> None:
        self.backbone, self.cache = backbone, cache
        self.context, self.start = cache.length, cache.next_position
        self.owners: list[int] = []

    def position_of(self, lane: int) -> int:
        """The next position of a question."""
        return self.start + self.owners.count(lane)

    def append(self, lanes: Sequence[Sequence[int]], kept: Sequence[int]) -> torch.Tensor:
        """Append tokens to every lane (none to some) and return float32 logits `[kept, vocabulary]`.

        Args:
            kept: indices among the tokens of all lanes whose logits are returned.
        """
        tokens: list[int] = []
        positions: list[int] = []
        before = len(self.owners)
        for lane, added in enumerate(lanes):
            positions += range(self.position_of(lane), self.position_of(lane) + len(added))
            tokens += added
            self.owners += [lane] * len(added)
        self.backbone.check_room(0, max(positions) + 1)
        owners = torch.tensor(self.owners)
        new = torch.arange(before, len(owners))
        own = (owners[new][:, None] == owners[None, :]) & (torch.arange(len(owners))[None, :] <= new[:, None])
        visible = torch.cat([torch.ones(len(new), self.context, dtype=torch.bool), own], dim=1)
        return self.backbone.logits(
            self.cache,
            tokens,
            torch.tensor(kept),
            positions=torch.tensor(positions, dtype=torch.float64),
            attention_mask=self.backbone.attention_mask(visible),
        )
