"""Copies of edited caches side by side, a row each: all are asked the same questions in one pass.

A pass over twelve rows costs a fraction of twelve passes, and the answers are decoded a step of all rows at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache, KeyValue
from kveraser.decode import end_tokens
from kveraser.packed import Pair, pack

NOBODY = -1
"""In place of a lane: padding, which no token sees."""


class Rows:
    """Caches of one backbone, copied; the originals can be edited further."""

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.states: list[list[KeyValue]] = []
        self.positions: list[int] = []

    def add(self, cache: EditableCache) -> None:
        """Copy a cache into a row of its own."""
        self.states.append([(keys.clone(), values.clone()) for keys, values in cache.read(0, cache.length)])
        self.positions.append(cache.next_position)

    def only(self, rows: Sequence[int]) -> Rows:
        """Some of the rows, in the order that is asked for."""
        chosen = Rows(self.backbone)
        chosen.states = [self.states[row] for row in rows]
        chosen.positions = [self.positions[row] for row in rows]
        return chosen

    @property
    def slots(self) -> list[int]:
        """How many slots every row has in use."""
        return [states[0][0].shape[2] for states in self.states]

    def score(self, pairs: Sequence[Pair]) -> list[list[torch.Tensor]]:
        """Of every row, what `score_together` gives: log-probabilities, float32 `[answer, vocabulary]` a pair."""
        widest = max(self.slots)
        packed = pack(pairs, widest, 0, shared=True)
        positions = torch.stack([packed.positions + start for start in self.positions])
        self.backbone.check_room(0, int(positions.max()) + 1)
        visible = torch.stack([packed.visible & self._held(slots, packed.visible.shape[1]) for slots in self.slots])
        logits = self._pass(self._stacked(), [packed.tokens] * len(self.states), positions, visible, packed.kept)
        return [list(row.log_softmax(dim=-1).split([len(answer) for _, answer in pairs])) for row in logits]

    def greedy(self, prompts: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> list[list[list[int]]]:
        """Of every row, what `greedy_together` gives for its own prompts: answers without end tokens."""
        answers: list[list[list[int]]] = [[[] for _ in lanes] for lanes in prompts]
        ends, cache, widest = end_tokens(self.backbone), self._stacked(), max(self.slots)
        owners = torch.empty(len(prompts), 0, dtype=torch.long)
        lengths = [[0] * len(lanes) for lanes in prompts]
        feed: list[dict[int, Sequence[int]]] = [dict(enumerate(lanes)) for lanes in prompts]
        for _ in range(max_new_tokens):
            if not any(feed):
                break
            width = max(sum(map(len, lanes.values())) for lanes in feed)
            tokens = [[0] * width for _ in feed]
            new = torch.full((len(feed), width), NOBODY)
            positions = torch.tensor(self.positions, dtype=torch.float64)[:, None].repeat(1, width)
            lasts: list[dict[int, int]] = [{} for _ in feed]
            for row, lanes in enumerate(feed):
                place = 0
                for lane, added in lanes.items():
                    tokens[row][place : place + len(added)] = added
                    new[row, place : place + len(added)] = lane
                    positions[row, place : place + len(added)] += torch.arange(len(added)) + lengths[row][lane]
                    lengths[row][lane] += len(added)
                    place += len(added)
                    lasts[row][lane] = place - 1
            owners = torch.cat([owners, new], dim=1)
            visible = self._lanes(owners, new, widest)
            kept = sorted({place for places in lasts for place in places.values()})
            chosen = self._pass(cache, tokens, positions, visible, torch.tensor(kept)).argmax(dim=-1).tolist()
            feed = [{} for _ in feed]
            for row, places in enumerate(lasts):
                for lane, place in places.items():
                    token = chosen[row][kept.index(place)]
                    if token in ends:
                        continue
                    answers[row][lane].append(token)
                    limit = self.backbone.max_positions
                    if limit is None or self.positions[row] + lengths[row][lane] < limit:
                        feed[row][lane] = [token]
        return answers

    def _lanes(self, owners: torch.Tensor, new: torch.Tensor, widest: int) -> torch.Tensor:
        """What the `new` tokens see, bool `[rows, new, slots]`: the context, and their own lane so far."""
        width, all_slots = new.shape[1], widest + owners.shape[1]
        places = torch.arange(owners.shape[1])
        ordered = places[None, :] <= places[-width:, None]
        own = (owners[:, None, :] == new[:, :, None]) & ordered[None]
        context = torch.stack([self._held(slots, all_slots)[:widest] for slots in self.slots])
        return torch.cat([context[:, None, :].expand(-1, width, -1), own], dim=2)

    def _held(self, slots: int, width: int) -> torch.Tensor:
        """All slots but those that pad a shorter row, bool `[width]`."""
        places, widest = torch.arange(width), max(self.slots)
        return (places < slots) | (places >= widest)

    def _stacked(self) -> EditableCache:
        """The rows in one cache; shorter ones end in zeros, since what is hidden is multiplied by 0 all the same."""
        widest, layers = max(self.slots), len(self.states[0])

        def joined(layer: int, part: int) -> torch.Tensor:
            rows = [states[layer][part] for states in self.states]
            return torch.cat([torch.nn.functional.pad(row, (0, 0, 0, widest - row.shape[2])) for row in rows])

        stacked = ((joined(layer, 0), joined(layer, 1)) for layer in range(layers))
        positions = torch.arange(widest, dtype=torch.float64)
        return EditableCache.from_states(list(stacked), layers, positions, widest, widest)

    def _pass(
        self,
        cache: EditableCache,
        tokens: Sequence[Sequence[int]],
        positions: torch.Tensor,
        visible: torch.Tensor,
        kept: torch.Tensor,
    ) -> torch.Tensor:
        """Float32 logits `[rows, kept, vocabulary]` of the tokens at places `kept`; the cache grows by the tokens."""
        backbone = self.backbone
        places = kept.to(backbone.device)
        with backbone.lock, torch.no_grad():
            output = backbone.model(
                input_ids=torch.tensor([list(row) for row in tokens], device=backbone.device),
                position_ids=backbone.position_ids(positions),
                attention_mask=torch.cat([backbone.attention_mask(row) for row in visible]),
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": places} if backbone.keeps_logits else {}),
            )
        logits: torch.Tensor = output.logits if backbone.keeps_logits else output.logits[:, places]
        return logits.float()
