"""The README's tables, rendered from committed result files: `python -m kveraser.bench.tables` writes them in place."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kveraser.errors import InputError

MARKED = re.compile(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


def demo_table(result: Mapping[str, Any]) -> str:
    """The demo's summary, a row a method."""
    lines = ["| method | exact | seconds | tokens recomputed | KL to exact | fidelity |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row["missing"]:
            lines.append(f"| `{row['method']}` | | | | | {row['missing']} |")
            continue
        exact = "yes" if row["exact"] else "no"
        lines.append(
            f"| `{row['method']}` | {exact} | {row['seconds']:.3f} | {row['recomputed']} "
            f"| {abs(row['kl']):.4f} | {row['fidelity']:.2f} |"
        )
    unerased = next(row["kl_unerased"] for row in result["rows"] if not row["missing"])
    lines.append(f"| not erased | | 0 | 0 | {unerased:.4f} | 0.00 |")
    return "\n".join(lines)


def latency_table(result: Mapping[str, Any]) -> str:
    """Milliseconds an erase takes, a row a method and a column a context length."""
    lengths = result["settings"]["lengths"]
    rows = result["rows"]
    cells = {(row["method"], row["context"]): f"{row['seconds'] * 1000:.0f}" for row in rows}
    floors = {row["context"]: f"{row['floor_seconds'] * 1000:.0f}" for row in rows}
    lines = [
        "| milliseconds | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    lines += [
        f"| `{method}` | " + " | ".join(cells[method, length] for length in lengths) + " |"
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    lines.append("| bare forward pass of the span | " + " | ".join(floors[length] for length in lengths) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {"demo": demo_table, "latency": latency_table}


def fill(document: str, results: Path) -> str:
    """`document` with every marked table rendered from `results/<name>.json`.

    Raises:
        InputError: a table that nothing renders, or a result file that is missing.
    """

    def render(match: re.Match[str]) -> str:
        name = match.group("name")
        source = results / f"{name}.json"
        if name not in TABLES or not source.is_file():
            raise InputError(f"the table {name!r} has no renderer or no {source}: run `make results`")
        return f"<!-- table: {name} -->\n{TABLES[name](json.loads(source.read_text('utf-8')))}\n<!-- end -->"

    return MARKED.sub(render, document)


def main(root: Path = Path()) -> int:
    """Rewrite the README's tables. Run from the repository."""
    readme = root / "README.md"
    readme.write_text(fill(readme.read_text("utf-8"), root / "docs" / "results"), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
