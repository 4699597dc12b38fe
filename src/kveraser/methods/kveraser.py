"""`kveraser` and `kveraser+repair`: learned steering states in the span's slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache, KeyValue
from kveraser.eraser import LAYOUTS, Layout
from kveraser.errors import MethodError
from kveraser.methods.base import Erased, Method, close_gap, recompute_window, result, silenced
from kveraser.scratch_cache import splice
from kveraser.spans import Span

DEFAULT_WINDOW = 16
"""The repair window of an eraser that was not trained for one."""


def steering_positions(positions: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Where the steering states of a span at `positions` (`[span]`) sit, float64 `[span]`.

    `keep`: where the span was. `closed`: evenly between the last prefix token and the position of the span's first
    token, which the first suffix token will take.
    """
    if layout == "keep":
        return positions
    first = ceil(float(positions[0]))
    return first - 1 + torch.arange(1, len(positions) + 1, dtype=torch.float64) / (len(positions) + 1)


def steering_states(
    backbone: Backbone, prefix: Sequence[KeyValue], tokens: Sequence[int], positions: torch.Tensor
) -> list[KeyValue]:
    """The steering states out of place, differentiable with respect to the eraser (training).

    Args:
        prefix: the prefix's states, one `(keys, values)` a layer, `[1, kv_heads, prefix, head_dim]`.
        tokens: the span's token ids.
        positions: where the steering states sit, `[span]`.

    Returns:
        One `(keys, values)` a layer, `[1, kv_heads, span, head_dim]`.
    """
    cache = splice(prefix)
    with backbone.erasing():
        backbone.model.base_model(
            input_ids=torch.tensor([list(tokens)], device=backbone.device),
            position_ids=backbone.position_ids(positions),
            past_key_values=cache,
            use_cache=True,
        )
    span = len(tokens)
    return [(layer.keys[:, :, -span:], layer.values[:, :, -span:]) for layer in cache.layers]  # type: ignore[index, union-attr]


@dataclass(frozen=True)
class KVEraser(Method):
    """One pass of the backbone, with its eraser switched on, over the span's tokens on the prefix's states (section 3).

    It never sees the question, so one erase serves all later ones. With `layout="keep"`, the paper's, prefix and suffix
    are untouched. With `layout="closed"` the suffix keys are re-rotated against the prefix and the steering states sit
    at fractional positions in between, so that the text reads on without a hole. None: as the eraser was trained.
    """

    layout: Layout | None = None

    name = "kveraser"
    summary = "learned steering states in the span's slots"
    cost = "span tokens"
    source = "arXiv:2606.17034"
    needs_eraser = True

    def __post_init__(self) -> None:
        if self.layout is not None and self.layout not in LAYOUTS:
            raise MethodError(f"{self.name}: layout is {self.layout!r}, but it is one of {', '.join(LAYOUTS)}")

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        layout = self.layout or backbone.require_eraser().settings.layout
        if layout == "closed":
            # Refuse before the pass: only rotary models can run at fractional positions.
            _ = backbone.rotation
        with backbone.erasing():
            first = ceil(float(cache.positions[span.start]))
            positions = steering_positions(cache.positions[span.start : span.end], layout)
            with cache.overwriting(span.start, positions):
                backbone.forward(tokens[span.start : span.end], cache, positions)
        if layout == "closed":
            close_gap(backbone, cache, span.end, first)
        return result(cache, silenced(cache.length, span), recomputed=len(span))

    def settled(self, backbone: Backbone) -> KVEraser:
        return replace(self, layout=self.layout or backbone.require_eraser().settings.layout)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span


@dataclass(frozen=True)
class KVEraserRepair(Method):
    """`kveraser`, then the first `window` suffix tokens are computed afresh on prefix and steering states."""

    window: int | None = None
    layout: Layout | None = None

    name = "kveraser+repair"
    summary = "steering states, then recompute the first suffix tokens"
    cost = "span + window tokens"
    source = "this project"
    needs_eraser = True

    def __post_init__(self) -> None:
        KVEraser(self.layout)
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise MethodError(f"{self.name}: window is {self.window!r}, but it is a count of tokens from 1 on")

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        steered = KVEraser(self.layout)(backbone, cache, tokens, span)
        recomputed = recompute_window(
            backbone, cache, tokens, span.end, self.settled(backbone).window or DEFAULT_WINDOW
        )
        return result(cache, steered.slots, steered.recomputed + recomputed)

    def settled(self, backbone: Backbone) -> KVEraserRepair:
        settings = backbone.require_eraser().settings
        window = self.window or settings.repair or DEFAULT_WINDOW
        return replace(self, layout=self.layout or settings.layout, window=window)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span + min(self.window or DEFAULT_WINDOW, suffix)
