"""The frontier: a row a method, width and length, its position gap, its contexts and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.frontier import METHODS, SUITE, PositionGap, make_cases, methods_of, passages_of, tasks_of
from evaluation.plan import plan_suite
from evaluation.report.figures import draw_frontier
from evaluation.report.style import widths
from evaluation.tables import frontier_table
from kveraser.cache.editable import EditableCache
from kveraser.cli import main as cli
from kveraser.errors import InputError, MethodError
from kveraser.measure.case import tokenize_context
from kveraser.measure.run import CASES, RESULT
from kveraser.methods import make_method
from kveraser.text.spans import Span
from tests.cli.test_cli import Run, one_line, read, run  # noqa: F401 (a fixture)
from tests.tiny import distance, random_tokens, same_bits, snapshot, tiny_backbone, tiny_tokenizer

ASKED = "mask;repair(8);repair(16);position_gap"


def states(cache: EditableCache) -> list[torch.Tensor]:
    return [state for pair in cache.read(0, cache.length) for state in pair]


def test_the_position_gap_is_the_exact_suffix_at_its_old_positions() -> None:
    # The suffix takes more than one pass.
    backbone, tokens, span = tiny_backbone(), random_tokens(700), Span(40, 56)
    cache = backbone.prefill(tokens)
    before = snapshot(cache)
    with cache.edit() as journal:
        recomputed = PositionGap()(backbone, cache, tokens, span)
    assert recomputed == 700 - 56 and not cache.exact and cache.next_position == 700
    positions = torch.arange(56, 700, dtype=torch.float64)
    wanted = backbone.prefill(tokens[:40])
    with wanted.appending(positions):
        backbone.forward(tokens[56:], wanted, positions)
    assert distance(states(cache), states(wanted)) < 1e-4
    assert torch.equal(cache.positions, wanted.positions)
    cache.revert(journal)
    with cache.edit() as journal:
        make_method("mask")(backbone, cache, tokens, span)
    assert distance(states(cache), states(wanted)) > 1e-2, "the suffix had read the span"
    cache.revert(journal)
    assert same_bits(snapshot(cache), before)


def test_the_default_methods_can_be_made_and_differ() -> None:
    methods = methods_of(METHODS)
    assert len(set(map(str, methods))) == len(methods) == len(METHODS.split(";"))
    with pytest.raises(MethodError, match="repare"):
        methods_of("mask; repare(8)")


def test_contexts_are_about_as_long_as_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    plan = plan_suite(SUITE, ("needle", "observation"), (2400, 4000), (300,), 3)
    cases = make_cases(tokenizer, plan, passages_of(0), 0)
    assert len({case.id for case in cases}) == len(cases) == 12
    for case in cases:
        tokens = len(tokenize_context(tokenizer, case.context).tokens)
        assert case.cell.length is not None and abs(tokens - case.cell.length) < 0.12 * case.cell.length
    assert "facts" not in tasks_of(None) and "facts" in tasks_of("corpus.txt")
    with pytest.raises(InputError, match="over 60% of a context of 2400"):
        make_cases(tokenizer, plan_suite(SUITE, ("needle",), (2400,), (2000,), 1), passages_of(0), 0)


def test_the_command_gives_a_row_a_method_width_and_length(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    output = tmp_path / "run"
    asked = (
        "evaluation", "frontier", "--model", model, "--tasks", "span_neighbor", "--lengths", "260,400", "--spans", "40",
        "--cases", "2", "--output", str(output),
    )  # fmt: skip
    result = read(run(*asked, "--methods", ASKED, "--json"))
    assert result["command"] == "python -m evaluation frontier"
    names = ["none", "recompute", "mask", *(f"repair(window={width}, per_span=0.0)" for width in (8, 16))]
    assert [(row["length"], row["method"]) for row in result["rows"]] == [
        (length, name) for length in (260, 400) for name in [*names, "position_gap"]
    ]
    rows = {(row["length"], row["method"]): row for row in result["rows"]}
    for length in (260, 400):
        ran = [rows[length, name]["recomputed"] for name in names]
        assert ran[0] == ran[2] == 0 and ran[3:] == [8, 16]
        assert rows[length, "position_gap"]["recomputed"] == ran[1] > 16
        assert rows[length, "recompute"]["kl"] < 1e-4 < rows[length, "position_gap"]["kl"] < rows[length, "mask"]["kl"]
        assert rows[length, "mask"]["kl_low"] <= rows[length, "mask"]["kl"] <= rows[length, "mask"]["kl_high"]
        assert rows[length, "mask"]["cases"] == 2
    assert json.loads((output / RESULT).read_text("utf-8")) == result
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")
    kept = (output / CASES).read_bytes()
    again = read(run(*asked, "--methods", ASKED, "--picture", str(tmp_path / "deep" / "one.png"), "--json"))
    assert again["rows"] == result["rows"] and again["resumed_cases"] == 4 and (output / CASES).read_bytes() == kept
    assert (tmp_path / "deep" / "one.png").is_file()
    assert "holds another run" in one_line(run(*asked, "--methods", "mask"), cli.FAILURE)
    assert "no method 'masc'" in one_line(run(*asked, "--methods", "masc"), cli.USAGE)
    assert "over 60%" in one_line(run(*asked, "--methods", ASKED, "--spans", "300"), cli.FAILURE)


def test_without_an_eraser_its_methods_are_left_out_and_named(run: Run, model: str) -> None:  # noqa: F811
    asked = "evaluation", "frontier", "--model", model, "--tasks", "span_neighbor", "--lengths", "260", "--spans", "40"
    result = read(run(*asked, "--cases", "1", "--json"))
    assert {name.partition("(")[0] for name in result["unserved"]} == {"kveraser", "kveraser+repair"}
    assert len(result["unserved"]) == 4 and len(result["rows"]) == 2 + len(METHODS.split(";")) - 4


def rows_of(lengths: tuple[int, ...], kl: float = 0.01) -> list[dict[str, Any]]:
    found = []
    for length in lengths:
        for method, tokens, nats in (
            ("none", 0, 0.1), ("recompute", 300, 0.0), ("mask", 0, 0.04),
            ("repair(window=8, per_span=0.0)", 8, 2 * kl), ("repair(window=32, per_span=1.0)", 96, kl),
        ):  # fmt: skip
            row = {"length": length, "method": method, "recomputed": tokens, "kl": nats}
            found.append(row | {"kl_low": nats * 0.8, "kl_high": nats * 1.2})
    return found


def test_the_figure_has_a_panel_a_length() -> None:
    one, two = draw_frontier(rows_of((512,))), draw_frontier(rows_of((512, 2048)))
    assert one.name == "frontier"
    # Height stands in the header: a second panel makes the picture nearly twice as high.
    heights = [int.from_bytes(drawn.png[20:24]) for drawn in (one, two)]
    assert heights[1] > 1.7 * heights[0]
    assert draw_frontier(rows_of((512,), kl=0.02)).png != one.png


def test_widths_are_the_parameters_that_differ() -> None:
    assert widths(["repair(window=8, per_span=0.0)", "repair(window=32, per_span=1.0)"]) == ["8", "32/1.0"]
    assert widths(["selective(ratio=0.05)", "selective(ratio=0.5)"]) == ["0.05", "0.5"]
    assert widths(["mask"]) == [""]


def test_the_table_has_tokens_and_kl_by_length() -> None:
    lines = frontier_table({"rows": rows_of((512, 2048))[:-1]}).splitlines()
    assert lines[0] == ("| method | 512: tokens run | 512: KL to exact | 2048: tokens run | 2048: KL to exact |")
    assert lines[-1] == "| `repair(window=32, per_span=1.0)` | 96 | 0.0100 (0.0080 to 0.0120) | - | - |"
