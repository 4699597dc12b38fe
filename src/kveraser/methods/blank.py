"""`blank`: overwrite the span with the states of text that says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from kveraser.cache.editable import EditableCache
from kveraser.errors import MethodError
from kveraser.methods.base import Method, clear_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.spans import Span


@dataclass(frozen=True)
class Blank(Method):
    """Overwrite the span's slots with the states of `filler`, repeated to the span's length, on the same prefix."""

    filler: str = "\n"

    name = "blank"
    summary = "overwrite the span with the backbone's states of neutral filler"
    cost = "span tokens"
    source = "the paper's ablation, arXiv:2606.17034"

    def __post_init__(self) -> None:
        if not isinstance(self.filler, str) or not self.filler:
            raise MethodError(f"blank: filler is {self.filler!r}, but it must be neutral text, such as a line break")

    @property
    def changes_only_span(self) -> bool:
        return True

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        filler, _ = backbone.tokenize(self.filler, follows=True)
        if not filler:
            raise MethodError(f"the filler {self.filler!r} has no tokens: give some neutral text, such as a line break")
        positions = cache.positions[span.start : span.end]
        with cache.overwriting(span.start, positions):
            backbone.forward(list(islice(cycle(filler), len(span))), cache, positions)
        clear_tokens(cache, span)
        return len(span)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return span
