"""`selective`: shift, then recompute the suffix tokens that the erase changes most."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import ceil

import torch

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.cache.probe import ProbingCache, StopForward
from kveraser.errors import MethodError
from kveraser.methods.base import Method
from kveraser.methods.shift import Shift
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span

PROBED_LAYER = 1
"""The first layer whose values depend on other tokens, and so can deviate."""


@dataclass(frozen=True)
class Selective(Method):
    """CacheBlend's rule: run the suffix through the first layer, compare the next layer's values with the cached ones,
    and recompute through all layers the fraction `ratio` of tokens that deviate most (sections 4.2 and 4.3)."""

    ratio: float = 0.15

    name = "selective"
    summary = "shift, then recompute the suffix tokens whose early values deviate most"
    cost = "ratio x suffix tokens, plus one layer of the suffix"
    source = "CacheBlend, arXiv:2405.16444"
    moves_keys = True

    def __post_init__(self) -> None:
        if type(self.ratio) not in (int, float) or not 0 < self.ratio <= 1:
            raise MethodError(f"selective: ratio is {self.ratio!r}, but it must be above 0 and at most 1")

    inserts = True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        return self.replace(backbone, cache, tokens, span, ())

    def replace(
        self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span, inserted: Sequence[int]
    ) -> int:
        shifted = Shift().replace(backbone, cache, tokens, span, inserted)
        ids, start = slot_tokens(cache, tokens), span.start + len(inserted)
        live = torch.tensor([slot for slot in range(start, cache.length) if ids[slot] != NO_TOKEN], dtype=torch.long)
        if live.numel() == 0:
            return shifted
        if backbone.layers <= PROBED_LAYER:
            raise MethodError(
                f"selective needs at least 2 layers, {backbone.name} has {backbone.layers}: use repair(32)"
            )
        probe = ProbingCache(backbone.layers, PROBED_LAYER, cache, start)
        with suppress(StopForward):
            backbone.forward([ids[slot] for slot in live.tolist()], probe, cache.positions[live])
        assert probe.captured is not None
        keys, values = probe.captured
        _, old = cache.read(0, cache.length)[PROBED_LAYER]
        deviation = (values - old[:, :, live.to(old.device)]).float().square().sum(dim=(0, 1, 3))
        count = ceil(self.ratio * live.numel())
        selected = live[deviation.topk(count).indices.sort().values.cpu()]
        with cache.overwriting_scattered(start, selected):
            # The pass below attends to the new states of the probed layer.
            cache.write_layer(PROBED_LAYER, live, keys, values)
            backbone.forward(
                [ids[slot] for slot in selected.tolist()],
                cache,
                cache.positions[selected],
                attention_mask=backbone.attention_mask(torch.arange(cache.length)[None, :] <= selected[:, None]),
            )
        return shifted + count + ceil(live.numel() * PROBED_LAYER / backbone.layers)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return ceil(self.ratio * suffix)
