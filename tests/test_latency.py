"""The latency benchmark: it leaves nothing behind, measures what it says, and refuses what can't be measured."""

from __future__ import annotations

from typing import Any

import pytest

from kveraser.backbone import Backbone
from kveraser.bench import latency
from kveraser.errors import ContextLengthError, InputError
from kveraser.methods import METHODS, make_method
from tests.tiny import POSITIONS, attach_random_eraser, tiny_backbone


@pytest.fixture(scope="module")
def rows() -> list[latency.LatencyRow]:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    return latency.run(backbone, [make_method(name) for name in METHODS], [80, 160], 16, 0.1, 2)


def row_of(rows: list[latency.LatencyRow], method: str, context: int) -> latency.LatencyRow:
    return next(row for row in rows if row.method.partition("(")[0] == method and row.context == context)


def test_every_method_is_timed_at_every_length(rows: list[latency.LatencyRow]) -> None:
    assert len(rows) == 2 * len(METHODS)
    assert all(row.seconds > 0 and row.floor_seconds > 0 and row.decode_seconds_before > 0 for row in rows)


def test_extra_memory_of_the_learned_erase_is_the_span_whatever_the_context(rows: list[latency.LatencyRow]) -> None:
    for context in (80, 160):
        row = row_of(rows, "kveraser", context)
        assert row.extra_bytes == row.span_bytes
    # The same figure grows with the context where the suffix has to be kept for undo.
    assert row_of(rows, "recompute", 160).extra_bytes > row_of(rows, "recompute", 80).extra_bytes > row.span_bytes


def test_recomputed_tokens_are_what_the_method_ran(rows: list[latency.LatencyRow]) -> None:
    assert row_of(rows, "recompute", 160).recomputed == 160 - 16 - 16
    assert row_of(rows, "kveraser", 160).recomputed == 16
    assert row_of(rows, "mask", 160).recomputed == 0


def test_the_cache_is_reverted_between_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    seen: list[tuple[int, int]] = []
    original = Backbone.prefill

    def prefill(self: Backbone, *arguments: Any) -> Any:
        cache = original(self, *arguments)
        before = [keys.clone() for keys, _ in cache.read(0, cache.length)]
        revert = cache.revert

        def checked(journal: Any) -> None:
            revert(journal)
            now = [keys for keys, _ in cache.read(0, cache.length)]
            seen.append((cache.length, sum(int((one != two).sum()) for one, two in zip(before, now, strict=True))))

        monkeypatch.setattr(cache, "revert", checked)
        return cache

    monkeypatch.setattr(Backbone, "prefill", prefill)
    latency.run(backbone, [make_method("mask"), make_method("shift")], [64], 8, 0.1, 1)
    assert seen and set(seen) == {(64, 0)}


@pytest.mark.parametrize(
    ("lengths", "span", "depth", "repeats", "said"),
    [
        ([64], 8, 1.0, 1, "depth"),
        ([64], 8, -0.1, 1, "depth"),
        ([64], 0, 0.1, 1, "does not fit"),
        ([64], 60, 0.1, 1, "does not fit"),
        ([64], 8, 0.1, 0, "repeats"),
    ],
)
def test_what_can_not_be_measured_is_refused(
    backbone: Backbone, lengths: list[int], span: int, depth: float, repeats: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        latency.run(backbone, [make_method("mask")], lengths, span, depth, repeats)


def test_a_context_longer_than_the_backbone_is_refused_before_anything_runs(backbone: Backbone) -> None:
    with pytest.raises(ContextLengthError, match=str(POSITIONS)):
        latency.run(backbone, [make_method("mask")], [POSITIONS], 8, 0.1, 1)
