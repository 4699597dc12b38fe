"""The documents' figures come from the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evaluation.tables import (
    DOCUMENTS,
    MARKED,
    NOT_MEASURED,
    TABLES,
    fill,
    first_token_table,
    latency_growth_table,
    latency_table,
)
from kveraser.errors import InputError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"


def test_the_tables_are_what_the_result_files_say() -> None:
    documents = [(ROOT / name).read_text("utf-8") for name in DOCUMENTS]
    assert {match.group("name") for document in documents for match in MARKED.finditer(document)} == set(TABLES)
    for document in documents:
        assert fill(document, ROOT / "docs" / "results") == document


def test_result_files_name_no_place_of_the_machine_they_were_made_on() -> None:
    found = {path.name: re.findall(r'"(/\w[^"]*)"', path.read_text("utf-8")) for path in RESULTS.glob("*.json")}
    assert found and {name: places for name, places in found.items() if places} == {}


def test_a_changed_result_changes_its_table(tmp_path: Path) -> None:
    result = json.loads((ROOT / "docs" / "results" / "demo.json").read_text("utf-8"))
    result["rows"][0]["recomputed"] = 987_654
    (tmp_path / "demo.json").write_text(json.dumps(result), "utf-8")
    filled = fill("a\n<!-- table: demo -->\nstale\n<!-- end -->\nb", tmp_path)
    assert "987654" in filled and "stale" not in filled and filled.startswith("a\n") and filled.endswith("\nb")


def test_an_unknown_table_is_an_error_and_one_without_a_result_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing"):
        fill("<!-- table: nothing -->\n<!-- end -->", tmp_path)
    filled = fill("<!-- table: demo -->\n| stale |\n<!-- end -->", tmp_path)
    assert "stale" not in filled and NOT_MEASURED in filled and fill(filled, tmp_path) == filled


def test_the_latency_tables_mark_extended_lengths_and_show_growth_and_ratios() -> None:
    rows = [
        {"method": method, "context": context, "seconds": seconds, "floor_seconds": 0.2, "floor_ratio": ratio,
         "extended": context > 8192, "first_token_seconds": 1.0}
        for method, context, seconds, ratio in (
            ("recompute", 1024, 2.0, 10.0), ("recompute", 32768, 40.0, 200.0),
            ("kveraser(layout='keep')", 1024, 0.21, 1.05), ("kveraser(layout='keep')", 32768, 0.25, 1.07),
        )
    ]  # fmt: skip
    growth = [
        {"method": "recompute", "shortest": 1024, "longest": 32768, "growth": 20.0, "floor_growth": 1.5, "paper": 17.6},
        {"method": "mask", "shortest": 1024, "longest": 32768, "growth": 3.0, "floor_growth": 1.5, "paper": None},
    ]
    result = {"rows": rows, "growth": growth, "peers": []}
    table = latency_table(result).splitlines()
    assert table[0] == "| milliseconds | 1024 tokens | 32768 tokens (extended) |"
    assert table[-1] == "| `kveraser(layout='keep')` / bare forward pass | 1.05 | 1.07 |"
    assert "32768 tokens (extended)" in first_token_table(result)
    assert latency_growth_table(result).splitlines()[2:] == [
        "| `recompute` | 20.00 | 17.60 |", "| `mask` | 3.00 |  |", "| bare forward pass of the span | 1.50 | |",
    ]  # fmt: skip
