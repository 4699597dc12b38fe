"""Edited caches that wait until enough of them can be asked in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from kveraser.cache.editable import EditableCache
from kveraser.measure.attack import Attacked
from kveraser.measure.case import Asked
from kveraser.measure.together import Memory, Rows
from kveraser.model.backbone import Backbone

ANSWER_TOKENS = 16
"""Most tokens of a greedy answer that is judged: the accepted answers are short."""
LEAK_TOKENS = 12
"""Tokens that an answer which may give a secret away can take beside those of the secret."""
ATTACK_TOKENS = 96
"""Room for an adversary's words."""
CONFESSION_TOKENS = 32
"""Most tokens of the answer to them."""
ROW_SLOTS = 49_152
"""Most slots that are reserved for caches that are asked together: two gigabytes for the bundled backbone."""


@dataclass(frozen=True)
class Reply:
    """What a cache says to one question: log-probabilities of the forced answer, and the judged greedy answer."""

    scores: torch.Tensor
    spoken: tuple[int, ...] | None


Deliver = Callable[[list[Reply], list[tuple[int, ...]]], None]
"""Takes the replies to the questions, and the greedy answers to an adversary's prompts."""


@dataclass(frozen=True)
class _Entry:
    row: int
    asked: Sequence[Asked]
    attacks: Sequence[Attacked]
    drafts: Sequence[Sequence[int]]
    deliver: Deliver


def limit(asked: Asked) -> int:
    """Most tokens of the greedy answer to a question."""
    return len(asked.answer) + LEAK_TOKENS if asked.query.kind == "leak" else ANSWER_TOKENS


def appended(groups: Sequence[tuple[Sequence[Asked], int]]) -> int:
    """Slots that questions and their answers take behind a cache at most, where caches are asked together.

    Args:
        groups: the questions of a cache, and how many adversaries ask it.
    """
    asked = max(
        sum(len(one.prompt) + len(one.answer) for one in asked) + attacks * ATTACK_TOKENS for asked, attacks in groups
    )
    lanes = max(sum(one.judged for one in asked) + attacks for asked, attacks in groups)
    longest = max([limit(one) for asked, _ in groups for one in asked] + [CONFESSION_TOKENS])
    # Drafts stand beside the answers, which all grow by as many slots in a step as the cache that is asked most.
    return asked + 2 * lanes * longest


class Pool:
    """Caches to ask. Neighbours with the same questions are one group, and cost one pass to score.

    Args:
        rows: caches that will come, at most.
        context: slots that most of them have.
        appended: most slots behind a cache, of the function of that name.
        memory: that no other pool uses meanwhile.
    """

    def __init__(self, backbone: Backbone, rows: int, context: int, appended: int, memory: Memory) -> None:
        self.backbone, self.rows, self.appended = backbone, rows, appended
        self._memory, self._entries = memory, list[_Entry]()
        self._caches = self._room(context)

    def _room(self, context: int) -> Rows:
        most = max(1, min(self.rows, ROW_SLOTS // (context + self.appended)))
        return Rows(self.backbone, most, context, self.appended, self._memory)

    def put(
        self,
        cache: EditableCache,
        asked: Sequence[Asked],
        attacks: Sequence[Attacked],
        deliver: Deliver,
        drafts: Sequence[Sequence[int]] = (),
    ) -> None:
        """Copy a cache, to be asked `asked` and the prompts of `attacks`; `deliver` is called with what it says.

        Args:
            drafts: what its greedy answers may begin with, to the judged questions and then to the prompts. Caches
                that are asked the same share one set. They save time and change nothing.
        """
        if not self._caches.fits(cache):
            self.ask()
            self._caches = self._room(max(cache.length, self._caches.context))
        group = [entry.row for entry in self._entries if entry.asked is asked]
        row = self._caches.add(cache, since=min(group, default=len(self._caches.slots)))
        self._entries.append(_Entry(row, asked, attacks, drafts, deliver))

    def ask(self) -> None:
        """Ask all that wait."""
        if not self._entries:
            return
        entries, rows, scores = self._entries, self._caches, dict[int, list[torch.Tensor]]()
        self._entries, self._caches = [], self._room(rows.context)
        for _, of_group in groupby(entries, key=lambda entry: id(entry.asked)):
            group = list(of_group)
            chosen = range(group[0].row, max(entry.row for entry in group) + 1)
            asked = group[0].asked
            limits = [limit(one) if one.judged else None for one in asked]
            judged, attacks = sum(one.judged for one in asked), len(group[0].attacks)
            drafts = group[0].drafts or [()] * (judged + attacks)
            pairs = [(one.prompt, one.answer) for one in asked]
            scores |= zip(chosen, rows.score(chosen, pairs, limits, drafts[:judged]), strict=True)
            for number, draft in enumerate(drafts[judged:]):
                # Equal caches are attacked with equal words.
                prompts = {entry.row: entry.attacks[number].prompt for entry in group}
                rows.ask(chosen, [prompts[row] for row in chosen], CONFESSION_TOKENS, draft)
        answers = rows.decode()
        for entry in entries:
            spoken = iter(tuple(answer) for answer in answers[entry.row])
            replies = [
                Reply(scored, next(spoken) if one.judged else None)
                for one, scored in zip(entry.asked, scores[entry.row], strict=True)
            ]
            entry.deliver(replies, list(spoken))
