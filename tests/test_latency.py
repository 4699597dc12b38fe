"""The latency benchmark: it leaves nothing behind, measures what it says, and refuses what can't be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.backbone import Backbone
from kveraser.bench import latency
from kveraser.decode import greedy
from kveraser.errors import ContextLengthError, InputError
from kveraser.methods import METHODS, make_method
from tests.tiny import POSITIONS, attach_random_eraser, tiny_backbone


@pytest.fixture(scope="module")
def rows() -> list[latency.LatencyRow]:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    return latency.run(backbone, [make_method(name) for name in METHODS], [80, 160], 16, 0.1, 2).rows


def row_of(rows: list[latency.LatencyRow], method: str, context: int) -> latency.LatencyRow:
    return next(row for row in rows if row.method.partition("(")[0] == method and row.context == context)


def test_every_method_is_timed_at_every_length(rows: list[latency.LatencyRow]) -> None:
    assert len(rows) == 2 * len(METHODS)
    assert all(row.seconds > 0 and row.floor_seconds > 0 and row.decode_seconds_before > 0 for row in rows)


def test_the_first_token_comes_after_the_erase(rows: list[latency.LatencyRow]) -> None:
    # Every round's figure is the erase's own time and more, and so is the median.
    assert all(row.first_token_seconds > row.seconds for row in rows)
    assert all(row.prefill_first_token_seconds > 0 for row in rows)
    assert len({row.prefill_first_token_seconds for row in rows}) == 2, "one reference a context length"


def test_answers_are_those_of_the_erased_cache(rows: list[latency.LatencyRow]) -> None:
    backbone = tiny_backbone()
    filler, question = (
        backbone.tokenizer.encode(text, add_special_tokens=False) for text in (latency.FILLER, latency.QUESTION)
    )

    def answered(tokens: list[int]) -> str:
        answer = greedy(backbone, backbone.prefill(tokens), question, latency.ANSWER_TOKENS)
        return str(backbone.tokenizer.decode(answer, skip_special_tokens=True))

    tokens = (filler * 2)[:160]
    exact = answered(tokens[:16] + tokens[32:])
    assert row_of(rows, "recompute", 160).answer == exact != answered(tokens)
    assert len({row.answer for row in rows if row.context == 160}) > 2


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


def test_growth_compares_the_longest_context_with_the_shortest(rows: list[latency.LatencyRow]) -> None:
    listed = latency.growth(rows)
    assert [one["method"].partition("(")[0] for one in listed] == list(METHODS)
    short, long = row_of(rows, "recompute", 80), row_of(rows, "recompute", 160)
    assert listed[list(METHODS).index("recompute")] == {
        "method": "recompute",
        "shortest": 80,
        "longest": 160,
        "growth": long.seconds / short.seconds,
        "floor_growth": long.floor_seconds / short.floor_seconds,
    }
    assert latency.growth([row for row in rows if row.context == 80]) == []


def test_memory_that_came_and_went_is_seen(backbone: Backbone) -> None:
    risen = latency._watch_memory(backbone)
    if risen() is None:
        pytest.skip("this system does not tell a process's peak of memory")
    torch.ones(16 * 2**20).sum()
    # The kernel counts pages in batches.
    assert 60 * 2**20 < (risen() or 0) < 128 * 2**20
    later = latency._watch_memory(backbone)
    torch.ones(2**18).sum()
    assert (later() or 0) < 32 * 2**20, "each watch begins anew"


def test_without_a_peak_to_read_there_is_none(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    rows = latency.run(backbone, [make_method("mask")], [64], 8, 0.1, 1).rows
    assert [row.peak_bytes for row in rows] == [None]


def test_a_length_that_does_not_fit_is_left_out_beside_one_that_does(backbone: Backbone) -> None:
    measured = latency.run(backbone, [make_method("mask")], [64, POSITIONS], 8, 0.1, 1)
    assert [row.context for row in measured.rows] == [64]
    [(length, reason)] = measured.left_out
    assert length == POSITIONS and f"beyond the {POSITIONS} positions" in reason
    result = latency.to_json(measured, backbone, {})
    assert result["left_out"] == [{"length": POSITIONS, "reason": reason}]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError("no room"),
    ],
)
def test_a_length_without_memory_is_left_out_and_alone_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    backbone = tiny_backbone()
    original = Backbone.prefill

    def prefill(self: Backbone, tokens: Any, *arguments: Any) -> Any:
        if len(tokens) == 128:
            raise error
        return original(self, tokens, *arguments)

    monkeypatch.setattr(Backbone, "prefill", prefill)
    measured = latency.run(backbone, [make_method("mask")], [128, 64], 8, 0.1, 1)
    assert [row.context for row in measured.rows] == [64]
    assert measured.left_out == [(128, f"no memory: {error}")]
    with pytest.raises(type(error)):
        latency.run(backbone, [make_method("mask")], [128], 8, 0.1, 1)


def test_other_errors_are_not_taken_for_missing_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def prefill(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Backbone, "prefill", prefill)
    with pytest.raises(RuntimeError, match="shapes differ"):
        latency.run(tiny_backbone(), [make_method("mask")], [128, 64], 8, 0.1, 1)


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
