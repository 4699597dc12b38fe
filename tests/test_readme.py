"""The documents' figures come from the committed result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kveraser.bench.tables import DOCUMENTS, MARKED, TABLES, fill
from kveraser.errors import InputError

ROOT = Path(__file__).parent.parent


def test_the_tables_are_what_the_result_files_say() -> None:
    documents = [(ROOT / name).read_text("utf-8") for name in DOCUMENTS]
    assert {match.group("name") for document in documents for match in MARKED.finditer(document)} == set(TABLES)
    for document in documents:
        assert fill(document, ROOT / "docs" / "results") == document


def test_a_changed_result_changes_its_table(tmp_path: Path) -> None:
    result = json.loads((ROOT / "docs" / "results" / "demo.json").read_text("utf-8"))
    result["rows"][0]["recomputed"] = 987_654
    (tmp_path / "demo.json").write_text(json.dumps(result), "utf-8")
    filled = fill("a\n<!-- table: demo -->\nstale\n<!-- end -->\nb", tmp_path)
    assert "987654" in filled and "stale" not in filled and filled.startswith("a\n") and filled.endswith("\nb")


def test_a_missing_result_or_an_unknown_table_is_an_error(tmp_path: Path) -> None:
    for name in ("demo", "nothing"):
        with pytest.raises(InputError, match=name):
            fill(f"<!-- table: {name} -->\n<!-- end -->", tmp_path)
