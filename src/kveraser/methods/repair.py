"""`repair`: shift, then prefill the first suffix tokens again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache
from kveraser.errors import MethodError
from kveraser.methods.base import Erased, Method, recompute_window, result
from kveraser.methods.shift import Shift
from kveraser.spans import Span


@dataclass(frozen=True)
class Repair(Method):
    """The tokens next to the seam took most from the span: the first `window` of them are computed afresh."""

    window: int = 32

    name = "repair"
    summary = "shift, then recompute the first suffix tokens"
    cost = "window tokens; suffix keys are moved"
    source = "arXiv:2609.17983"
    moves_keys = True

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise MethodError(f"repair: window is {self.window!r}, but it is a count of tokens from 1 on; or use shift")

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> Erased:
        shifted = Shift()(backbone, cache, tokens, span)
        remaining = [tokens[slot] for slot in shifted.slots]
        recomputed = recompute_window(backbone, cache, remaining, span.start, self.window)
        return result(cache, shifted.slots, recomputed)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(self.window, suffix)
