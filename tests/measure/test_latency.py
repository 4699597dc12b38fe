"""The latency benchmark: it leaves nothing behind, measures what it says, and refuses what can't be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kveraser.errors import ContextLengthError, InputError, MeasurementError
from kveraser.measure import latency
from kveraser.methods import METHODS, Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Span
from tests.tiny import POSITIONS, attach_random_eraser, same_bits, snapshot, tiny_backbone


@pytest.fixture(scope="module")
def rows() -> list[latency.LatencyRow]:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    methods = [make_method(name).resolve(backbone) for name in METHODS]
    return latency.run(backbone, methods, [80, 160], 16, 0.1, 2).rows


def attached(backbone: Backbone) -> Method:
    """The learned erase of a random eraser."""
    attach_random_eraser(backbone)
    return make_method("kveraser").resolve(backbone)


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
        "paper": 17.6,
    }
    papers = {one["method"].partition("(")[0]: one["paper"] for one in listed}
    assert papers["kveraser"] == 1.24 and papers["mask"] is None
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


def test_beyond_the_positions_random_states_are_timed_and_marked() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    longer = 2 * POSITIONS
    measured = latency.run(backbone, [make_method(name) for name in METHODS], [64, longer], 8, 0.25, 1)
    assert not measured.left_out and backbone.max_positions == POSITIONS
    for row in measured.rows:
        assert row.extended == (row.context == longer)
        # Answers from random states would say nothing, and a fresh prefill has other states than the cache.
        assert (row.answer is None) == (row.prefill_first_token_seconds is None) == row.extended
    counts = {row.method.partition("(")[0]: row.recomputed for row in measured.rows if row.extended}
    assert counts["recompute"] == longer - longer // 4 - 8 and counts["kveraser"] == counts["blank"] == 8
    assert row_of(measured.rows, "kveraser", longer).extra_bytes == row_of(measured.rows, "kveraser", 64).extra_bytes


def test_a_slow_method_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    recompute, mask = make_method("recompute"), make_method("mask")
    for method in (recompute, mask):
        original = type(method).__call__

        def called(self: Any, *arguments: Any, original: Any = original) -> Any:
            ran.append(self.name)
            return original(self, *arguments)

        monkeypatch.setattr(type(method), "__call__", called)
    # Whatever takes any time at all is slow.
    monkeypatch.setattr(latency, "SLOW_SECONDS", -1.0)
    rows = latency.run(tiny_backbone(), [recompute, mask], [64], 8, 0.1, 3).rows
    assert ran == ["recompute", "mask"] and [row.rounds for row in rows] == [1, 1]
    assert all(row.floor_seconds > 0 and row.floor_ratio > 0 for row in rows)
    monkeypatch.undo()
    assert [row.rounds for row in latency.run(tiny_backbone(), [recompute, mask], [64], 8, 0.1, 3).rows] == [3, 3]


def test_the_ratio_is_the_median_over_pairs_of_erase_and_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []

    def clocked(_: Backbone, work: Any) -> tuple[float, Any]:
        ticks.append(0.0)
        # Every other measurement takes four times as long.
        return (1.0, 4.0)[len(ticks) % 2], work()

    backbone = tiny_backbone()
    method = attached(backbone)
    cache = backbone.prefill(list(range(5, 45)))
    before = snapshot(cache)
    monkeypatch.setattr(latency, "_timed", clocked)
    ratios = latency._paired_ratios(backbone, cache, list(range(5, 45)), Span(8, 16), method)
    # The one that comes first is the slow one, and each is first in turn.
    assert ratios == [0.25, 4.0] * (latency.PAIRS // 2) + [0.25]
    assert same_bits(snapshot(cache), before)


def test_states_outside_the_span_are_compared_and_a_changed_one_is_refused(rows: list[latency.LatencyRow]) -> None:
    compared = {row.method.partition("(")[0] for row in rows if row.rest_unchanged}
    assert compared == {"kveraser", "blank", "zero_value"}
    assert all(row.rest_unchanged is not False for row in rows)
    backbone, tokens = tiny_backbone(), list(range(5, 45))
    cache = backbone.prefill(tokens)
    before = snapshot(cache)
    latency._check_rest(backbone, cache, tokens, Span(8, 16), make_method("zero_value"))
    with pytest.raises(MeasurementError, match="shift changed states outside the span"):
        latency._check_rest(backbone, cache, tokens, Span(8, 16), make_method("shift"))
    assert same_bits(snapshot(cache), before)


def test_an_eraser_of_a_layout_that_moves_keys_does_not_promise_to_leave_them() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings("closed"))
    method = make_method("kveraser").resolve(backbone)
    [row] = latency.run(backbone, [method], [64], 8, 0.1, 1).rows
    assert row.rest_unchanged is None


def test_a_length_that_does_not_fit_is_left_out_beside_one_that_does() -> None:
    # Learned positions end where their table ends.
    backbone = tiny_backbone("gpt2")
    measured = latency.run(backbone, [make_method("mask")], [64, POSITIONS], 8, 0.1, 1)
    assert [row.context for row in measured.rows] == [64]
    [(length, reason)] = measured.left_out
    assert length == POSITIONS and f"beyond the {POSITIONS} positions" in reason
    result = latency.to_json(measured, backbone, {}, [], "kveraser bench latency")
    assert result["left_out"] == [{"length": POSITIONS, "reason": reason}]
    assert result["rows"][0]["extended"] is False


def test_a_length_that_memory_does_not_hold_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    monkeypatch.setattr(latency, "_free_bytes", lambda _: 2 * 500 * backbone.bytes_per_token)
    measured = latency.run(backbone, [make_method("mask")], [64, 800], 8, 0.1, 1)
    assert [row.context for row in measured.rows] == [64] and measured.left_out[0][0] == 800
    assert "GiB of memory are free" in measured.left_out[0][1]
    with pytest.raises(InputError, match="give shorter lengths"):
        latency.run(backbone, [make_method("mask")], [800], 8, 0.1, 1)
    monkeypatch.setattr(latency, "_free_bytes", lambda _: None)
    assert latency.run(backbone, [make_method("mask")], [800], 8, 0.1, 1).rows


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
    with pytest.raises(InputError, match="128 tokens: no memory"):
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
        ([64, 80, 64], 8, 0.1, 1, "give each once"),
    ],
)
def test_what_can_not_be_measured_is_refused(
    backbone: Backbone, lengths: list[int], span: int, depth: float, repeats: int, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        latency.run(backbone, [make_method("mask")], lengths, span, depth, repeats)


def test_a_context_longer_than_the_backbone_is_refused_before_anything_runs() -> None:
    with pytest.raises(ContextLengthError, match=str(POSITIONS)):
        latency.run(tiny_backbone("gpt2"), [make_method("mask")], [POSITIONS], 8, 0.1, 1)
