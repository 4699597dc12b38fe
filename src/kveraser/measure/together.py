"""Copies of edited caches side by side, a row each: questions are put to many in one pass.

A pass over sixty rows costs a fraction of sixty passes. The tokens of a question stay in its row, so the greedy answer
goes on from there, a step of all rows and all their questions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from kveraser.cache.editable import EditableCache, KeyValue
from kveraser.measure.packing import Pair, pack
from kveraser.model.backbone import Backbone
from kveraser.model.decode import end_tokens


@dataclass
class _Lane:
    """One greedy answer: which of its row's appended slots it sees, where its next token stands, and what it said."""

    seen: torch.Tensor
    position: int
    limit: int
    answer: list[int]
    going: bool


def _agreed(likeliest: torch.Tensor, places: torch.Tensor, draft: Sequence[int]) -> tuple[int, list[int]]:
    """How far a greedy answer goes along a draft: the last place whose token it says, and its tokens so far.

    Args:
        likeliest: the likeliest next token at every place, int64 `[places]`.
        places: where the question ends and every token of the draft but the last stands.
    """
    said = [int(likeliest[place]) for place in places]
    agreed = next((number for number, token in enumerate(draft[:-1]) if said[number] != token), len(draft) - 1)
    return int(places[agreed]), said[: agreed + 1]


class Memory:
    """Where rows are kept, one after another: memory that has been used before is ten times as fast as new."""

    def __init__(self) -> None:
        self._stores: list[tuple[torch.Tensor, torch.Tensor]] = []

    def buffers(self, like: Sequence[KeyValue], rows: int, slots: int) -> list[KeyValue]:
        """A pair of `[rows, kv_heads, slots, head_dim]` a layer; what rows left before is in it.

        Args:
            like: keys and values of every layer, for the other sizes, type and device.
        """
        if not self._stores:
            self._stores = [(keys.new_zeros(0), values.new_zeros(0)) for keys, values in like]
        taken = []
        for place, pair in enumerate(like):
            stores, parts = list(self._stores[place]), []
            for number, part in enumerate(pair):
                shape = rows, part.shape[1], slots, part.shape[3]
                if stores[number].numel() < prod(shape):
                    # What is hidden is multiplied by 0 all the same, so it must be no NaN.
                    stores[number] = part.new_zeros(prod(shape))
                parts.append(stores[number][: prod(shape)].view(shape))
            self._stores[place] = stores[0], stores[1]
            taken.append((parts[0], parts[1]))
        return taken


class Rows:
    """Caches of one backbone, copied; the originals can be edited further.

    Args:
        rows: most caches.
        context: most slots of one.
        appended: most slots that questions and answers take behind them.
        memory: that no other rows use meanwhile.
    """

    def __init__(self, backbone: Backbone, rows: int, context: int, appended: int, memory: Memory) -> None:
        self.backbone, self._memory = backbone, memory
        self.most, self.context, self.capacity = rows, context, context + appended
        self.slots: list[int] = []
        """How many slots every row's cache has."""
        self._positions: list[int] = []
        self._used: list[int] = []
        self._lanes: list[list[_Lane]] = []
        self._buffers: list[KeyValue] = []
        self._ends = end_tokens(backbone)

    def fits(self, cache: EditableCache) -> bool:
        """Whether there is room for another cache, and for this one."""
        return len(self.slots) < self.most and cache.length <= self.context

    def add(self, cache: EditableCache, since: int = 0) -> int:
        """Copy a cache into a row; its number. All rows are added before the first is asked.

        Args:
            since: a cache that equals a row from this one on, to the bit, shares it: it would say the same.
        """
        states = cache.read(0, cache.length)
        for row in range(since, len(self.slots)):
            if self._equals(row, cache, states):
                return row
        if not self._buffers:
            self._buffers = self._memory.buffers(states, self.most, self.capacity)
        row = len(self.slots)
        for buffers, pair in zip(self._buffers, states, strict=True):
            for buffer, part in zip(buffers, pair, strict=True):
                buffer[row, :, : cache.length] = part[0]
        self.slots.append(cache.length)
        self._positions.append(cache.next_position)
        self._used.append(0)
        self._lanes.append([])
        return row

    def _equals(self, row: int, cache: EditableCache, states: Sequence[KeyValue]) -> bool:
        if (self.slots[row], self._positions[row]) != (cache.length, cache.next_position):
            return False
        # Edits show most in the last layer.
        return all(
            torch.equal(buffer[row, :, : cache.length], part[0])
            for buffers, pair in zip(reversed(self._buffers), reversed(states), strict=True)
            for buffer, part in zip(buffers, pair, strict=True)
        )

    def score(
        self,
        rows: range,
        pairs: Sequence[Pair],
        limits: Sequence[int | None] = (),
        drafts: Sequence[Sequence[int]] = (),
    ) -> list[list[torch.Tensor]]:
        """Of each of `rows`, what `score_together` gives: log-probabilities, float32 `[answer, vocabulary]` a pair.

        Args:
            limits: of every pair, most tokens of the greedy answer that `decode` shall give to its question, or None.
            drafts: of every pair that has a limit, in order, what the greedy answer may begin with. As far as it does,
                it costs no step of its own; the answers are the same with any draft.

        Raises:
            ContextLengthError: not enough positions; nothing is computed then.
        """
        behind = self._behind(rows)
        asked = [(pair, limit) for pair, limit in enumerate(limits) if limit is not None]
        # What follows a draft is not run: any token stands for it.
        branches = [
            (pairs[pair][0], [*self._fitting(rows, len(pairs[pair][0]), draft)[: limit - 1], 0])
            for (pair, limit), draft in zip(asked, drafts or [()] * len(asked), strict=True)
        ]
        packed = pack([*pairs, *branches], behind, 0, shared=True)
        positions = torch.stack([packed.positions + self._positions[row] for row in rows])
        self.backbone.check_room(0, int(positions.max()) + 1)
        visible = torch.stack([packed.visible & self._held(row, behind, packed.visible.shape[1]) for row in rows])
        # Branches of one question begin at one place.
        kept, places = packed.kept.unique(return_inverse=True)
        logits = self._pass(rows, [packed.tokens] * len(rows), positions, visible, kept)
        *scored, offered = places.split([*(len(answer) for _, answer in pairs), sum(len(one) for _, one in branches)])
        scores = [[row[of_pair].log_softmax(dim=-1) for of_pair in scored] for row in logits]
        offers = offered.split([len(draft) for _, draft in branches])
        likeliest = logits.argmax(dim=-1)
        for place, row in enumerate(rows):
            for (pair, limit), (prompt, draft), offer in zip(asked, branches, offers, strict=True):
                ways = [(scored[pair], pairs[pair][1]), (offer, draft)]
                path, said = max((_agreed(likeliest[place], *way) for way in ways), key=lambda one: len(one[1]))
                seen = packed.visible[kept[path], self._widest :].clone()
                # The questions before are none of its own.
                seen[: behind - self._widest] = False
                self._open(row, seen, len(prompt), limit, said)
        return scores

    def ask(self, rows: range, prompts: Sequence[Sequence[int]], limit: int, draft: Sequence[int] = ()) -> None:
        """Put to each of `rows` a question of its own, which `decode` answers with at most `limit` tokens.

        Args:
            draft: what the answers may begin with; see `score`.
        """
        behind, longest = self._behind(rows), max(map(len, prompts))
        draft = self._fitting(rows, longest, draft)[: limit - 1]
        width = longest + len(draft)
        own = torch.ones(width, width, dtype=torch.bool).tril()
        visible = torch.stack(
            [torch.cat([self._held(row, behind, behind).expand(width, -1), own], dim=1) for row in rows]
        )
        steps = torch.arange(width, dtype=torch.float64)
        positions = torch.stack([steps + self._positions[row] for row in rows])
        first = min(map(len, prompts)) - 1
        tokens = [[*prompt, *draft, *[0] * (longest - len(prompt))] for prompt in prompts]
        logits = self._pass(rows, tokens, positions, visible, torch.arange(first, width))
        for row, prompt, likeliest in zip(rows, prompts, logits.argmax(dim=-1), strict=True):
            start = len(prompt) - 1 - first
            path, said = _agreed(likeliest, torch.arange(start, start + len(draft) + 1), [*draft, 0])
            seen = torch.zeros(behind - self._widest + width, dtype=torch.bool)
            seen[behind - self._widest :][: first + path + 1] = True
            self._open(row, seen, len(prompt), limit, said)

    def decode(self) -> list[list[list[int]]]:
        """Of every row, the greedy answers to its questions in order, without end tokens. The rows are used up."""
        rows = [row for row, lanes in enumerate(self._lanes) if any(lane.going for lane in lanes)]
        behind = self._widest + max(self._used, default=0)
        buffers = self._moved(self._buffers, rows, behind)
        while rows:
            lanes = [[lane for lane in self._lanes[row] if lane.going] for row in rows]
            width = max(map(len, lanes))
            tokens = [[*(lane.answer[-1] for lane in own), *[0] * (width - len(own))] for own in lanes]
            positions = torch.tensor(
                [[*(lane.position for lane in own), *[self._positions[row]] * (width - len(own))]
                 for row, own in zip(rows, lanes, strict=True)], dtype=torch.float64,
            )  # fmt: skip
            visible = torch.zeros(len(rows), width, behind + width, dtype=torch.bool)
            for place, (row, own) in enumerate(zip(rows, lanes, strict=True)):
                visible[place, :, : self.slots[row]] = True
                for number, lane in enumerate(own):
                    seen = torch.zeros(behind - self._widest + width, dtype=torch.bool)
                    seen[: len(lane.seen)] = lane.seen
                    seen[behind - self._widest + number] = True
                    lane.seen = visible[place, number, self._widest :] = seen
            chosen = self._forward(buffers, behind, tokens, positions, visible, torch.arange(width)).argmax(dim=-1)
            behind += width
            for own, said in zip(lanes, chosen.tolist(), strict=True):
                for lane, token in zip(own, said, strict=False):
                    lane.position += 1
                    self._say(lane, token)
            going = [place for place, own in enumerate(lanes) if any(lane.going for lane in own)]
            if len(going) <= len(rows) * 3 // 4:
                # What has ended is carried along until it is a quarter of all: to move the others costs two steps.
                rows, buffers = [rows[place] for place in going], self._moved(buffers, going, behind)
        answers = [[lane.answer for lane in lanes] for lanes in self._lanes]
        self._lanes = [[] for _ in self.slots]
        return answers

    def _fitting(self, rows: range, prompt: int, draft: Sequence[int]) -> Sequence[int]:
        """As much of a draft as there are positions for behind a question."""
        most, furthest = self.backbone.max_positions, max(self._positions[row] for row in rows)
        return draft if most is None else draft[: max(0, most - furthest - prompt)]

    def _open(self, row: int, seen: torch.Tensor, prompt: int, limit: int, said: Sequence[int]) -> None:
        """Begin an answer with the tokens `said`, of which all but the last have been run."""
        lane = _Lane(seen, self._positions[row] + prompt, limit, [], True)
        for place, token in enumerate(said):
            lane.position = self._positions[row] + prompt + place
            self._say(lane, token)
            if not lane.going:
                break
        self._lanes[row].append(lane)

    def _say(self, lane: _Lane, token: int) -> None:
        if token in self._ends:
            lane.going = False
            return
        lane.answer.append(token)
        most = self.backbone.max_positions
        lane.going = len(lane.answer) < lane.limit and (most is None or lane.position < most)

    @property
    def _widest(self) -> int:
        """Where what is appended begins, in all rows."""
        return max(self.slots)

    def _behind(self, rows: range) -> int:
        """The first slot that none of `rows` has used."""
        return self._widest + max(self._used[row] for row in rows)

    def _held(self, row: int, behind: int, width: int) -> torch.Tensor:
        """A row's own cache and all that follows slot `behind`, bool `[width]`."""
        places = torch.arange(width)
        return (places < self.slots[row]) | (places >= behind)

    def _pass(
        self,
        rows: range,
        tokens: Sequence[Sequence[int]],
        positions: torch.Tensor,
        visible: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """A pass of some rows that appends to each of them, and float32 logits `[rows, kept, vocabulary]`."""
        behind = self._behind(rows)
        buffers = [(keys[rows.start : rows.stop], values[rows.start : rows.stop]) for keys, values in self._buffers]
        logits = self._forward(buffers, behind, tokens, positions, visible, kept)
        for row in rows:
            self._used[row] = behind - self._widest + len(tokens[0])
        return logits

    def _moved(self, buffers: Sequence[KeyValue], rows: Sequence[int], behind: int) -> list[KeyValue]:
        """Some rows, in order, moved to the front of the buffers with what they hold before slot `behind`."""
        for place, row in enumerate(rows):
            if place != row:
                for buffer in (buffer for pair in buffers for buffer in pair):
                    buffer[place, :, :behind] = buffer[row, :, :behind]
        return [(keys[: len(rows)], values[: len(rows)]) for keys, values in buffers]

    def _forward(
        self,
        buffers: Sequence[KeyValue],
        behind: int,
        tokens: Sequence[Sequence[int]],
        positions: torch.Tensor,
        visible: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        backbone, places = self.backbone, kept.to(self.backbone.device)
        with backbone.lock, torch.no_grad():
            output = backbone.model(
                input_ids=torch.tensor([list(row) for row in tokens], device=backbone.device),
                position_ids=backbone.position_ids(positions),
                attention_mask=torch.cat([backbone.attention_mask(row) for row in visible]),
                past_key_values=EditableCache.over(buffers, behind),
                use_cache=True,
                **({"logits_to_keep": places} if backbone.keeps_logits else {}),
            )
        logits: torch.Tensor = output.logits if backbone.keeps_logits else output.logits[:, places]
        return logits.float()
