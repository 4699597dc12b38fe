"""The tables of README and docs, rendered from committed result files: `python -m evaluation.tables`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from kveraser.errors import InputError
from kveraser.files import replacing
from kveraser.measure.case import ALL
from kveraser.measure.rows import AXES
from kveraser.model.families import FAMILIES

NOT_MEASURED = "Not measured."
MARKED = re.compile(r"<!-- table: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


def demo_table(result: Mapping[str, Any]) -> str:
    """The demo's summary, a row a method."""
    lines = ["| method | exact | seconds | tokens recomputed | KL to exact | fidelity |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        if row["missing"]:
            lines.append(f"| `{row['method']}` | | | | | {row['missing'].removeprefix(row['method'] + ': ')} |")
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
    """Milliseconds an erase takes, a row a method and a column a context length; below, learned erases over the bare
    forward pass of the span."""
    rows = result["rows"]
    lengths = list(dict.fromkeys(row["context"] for row in rows))
    cells = {(row["method"], row["context"]): f"{row['seconds'] * 1000:.0f}" for row in rows}
    floors = {row["context"]: f"{row['floor_seconds'] * 1000:.0f}" for row in rows}
    lines = [
        "| milliseconds | " + " | ".join(_length_headings(result)) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    lines += [
        f"| `{method}` | " + " | ".join(cells[method, length] for length in lengths) + " |"
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    lines.append("| bare forward pass of the span | " + " | ".join(floors[length] for length in lengths) + " |")
    ratios = {(row["method"], row["context"]): row["floor_ratio"] for row in rows if "floor_ratio" in row}
    for method in dict.fromkeys(method for method, _ in ratios if method.startswith("kveraser")):
        cells_of = [f"{ratios[method, length]:.2f}" for length in lengths]
        lines.append(f"| `{method}` / bare forward pass | " + " | ".join(cells_of) + " |")
    return "\n".join(lines)


def influence_table(result: Mapping[str, Any]) -> str:
    """How often the messages about a span are ranked first, and the mean influence on them and on the others."""
    rows = result["rows"]
    about, others = list[float](), list[float]()
    for row in rows:
        for message, kl in zip(row["ranked"], row["kl"], strict=True):
            (about if message in row["leaning"] else others).append(kl)
    return "\n".join(
        [
            "| conversations | both messages about the span ranked first | their KL | KL of the other messages |",
            "|---|---|---|---|",
            f"| {len(rows)} | {result['first']:.0%} | {fmean(about):.3f} | {fmean(others):.3f} |",
        ]
    )


def latency_growth_table(result: Mapping[str, Any]) -> str:
    """How much longer an erase takes at the longest context than at the shortest, a row a method."""
    growth = result["growth"]
    if not growth:
        return NOT_MEASURED
    first = growth[0]
    lines = [
        f"| seconds at {first['longest']} tokens / seconds at {first['shortest']} | measured | paper, 1K to 32K |",
        "|---|---|---|",
    ]
    for row in growth:
        paper = "" if row.get("paper") is None else f"{row['paper']:.2f}"
        lines.append(f"| `{row['method']}` | {row['growth']:.2f} | {paper} |")
    lines.append(f"| bare forward pass of the span | {first['floor_growth']:.2f} | |")
    return "\n".join(lines)


def _length_headings(result: Mapping[str, Any]) -> list[str]:
    """Context lengths of a latency result; those beyond the backbone's positions are marked."""
    extended = {row["context"]: row.get("extended") for row in result["rows"]}
    return [f"{length} tokens{' (extended)' if extended[length] else ''}" for length in extended]


def first_token_table(result: Mapping[str, Any]) -> str:
    """Milliseconds from an erase's begin to the first token of the next answer; other engines below our methods."""
    lengths = list(dict.fromkeys(row["context"] for row in result["rows"]))
    seconds = {(f"`{row['method']}`", row["context"]): row["first_token_seconds"] for row in result["rows"]}
    seconds |= {
        (f"{row['peer']}: {row['operation']}", row["context"]): row["first_token_seconds"] for row in result["peers"]
    }
    lines = [
        "| milliseconds to the first token | " + " | ".join(_length_headings(result)) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for name in dict.fromkeys(name for name, _ in seconds):
        cells = [f"{seconds[name, length] * 1000:.0f}" if (name, length) in seconds else "-" for length in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def heldout_table(result: Mapping[str, Any]) -> str:
    """The held-out suite over all tasks, lengths and spans, a row a method."""
    lines = [
        "| method | tokens run | seconds | KL to exact | fidelity | EM (exact) | leak | no-harm KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in _margin(result, "heldout"):
        matched = "" if row["em"] is None else f"{row['em']:.2f} ({row['em_exact']:.2f})"
        lines.append(
            f"| `{row['method']}` | {row['recomputed']:.0f} | {row['seconds']:.2f} | {_with_interval(row, 'kl', 4)} "
            f"| {_with_interval(row, 'fidelity', 2)} | {matched} | {row['leak']:+.3f} "
            f"| {_with_interval(row, 'no_harm', 4)} |"
        )
    return "\n".join(lines)


def heldout_spans_table(result: Mapping[str, Any]) -> str:
    """Fidelity by span length, a row a method."""
    return _fidelities(result, "span", "span of {} tokens")


def heldout_lengths_table(result: Mapping[str, Any]) -> str:
    """Fidelity by context length, a row a method."""
    return _fidelities(result, "length", "{} tokens")


def heldout_tasks_table(result: Mapping[str, Any]) -> str:
    """KL by task with its interval, a row a method."""
    tasks = list(dict.fromkeys(row["task"] for row in _margin(result, "heldout", "task")))
    rows = {(row["method"], row["task"]): row for row in _margin(result, "heldout", "task")}
    lines = ["| KL to exact | " + " | ".join(f"{task}" for task in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in rows):
        cells = [_with_interval(rows[method, task], "kl", 4) for task in tasks]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def suite_table(result: Mapping[str, Any], suite: str) -> str:
    """One suite over all of its cells, or all suites together, a row a method."""
    lines = [
        "| method | tokens run | KL to exact | fidelity | EM | leak | leak rate | no-harm KL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = _margin(result, suite)
    if not rows:
        return NOT_MEASURED
    for row in rows:
        leak = "-" if row["leak"] is None else f"{row['leak']:+.3f}"
        rate = "-" if row["leak_rate"] is None else f"{row['leak_rate']:+.2f}"
        lines.append(
            f"| `{row['method']}` | {row['recomputed']:.0f} | {_with_interval(row, 'kl', 4)} "
            f"| {_with_interval(row, 'fidelity', 2)} | {_with_interval(row, 'em', 2)} | {leak} | {rate} "
            f"| {_with_interval(row, 'no_harm', 4)} |"
        )
    first = rows[0]
    counted = f"{first['cases']} cases in {first['contexts']} contexts, {first['questions']} questions"
    if suite == ALL:
        cells = {tuple(row[axis] for axis in AXES) for row in result["rows"] if ALL not in (row[axis] for axis in AXES)}
        counted += f", {len(cells)} cells; {result['seconds'] / 60:.0f} minutes in {result['workers']} processes"
    lines += ["", f"{counted}."]
    return "\n".join(lines)


def recovered_table(result: Mapping[str, Any], suite: str) -> str:
    """What the span flipped and each method restored, over a suite, a row a method."""
    rows = _margin(result, suite)
    if not rows:
        return NOT_MEASURED
    first = rows[0]
    lines = [
        f"{first['cases']} cases; the exact reference answers {first['judged']} questions right and {first['dropped']} "
        f"wrong (exact match {first['em_exact']:.2f}); of those that it answers right, the span flipped "
        f"{first['flipped']} to wrong.",
        "",
        "| method | recovered | broken | EM | KL to exact | tokens run |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{row['method']}` | {_with_interval(row, 'recovered', 2)} | {_with_interval(row, 'broken', 2)} "
        f"| {row['em']:.2f} | {_with_interval(row, 'kl', 4)} | {row['recomputed']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def recovered_axis_table(result: Mapping[str, Any], suite: str, axis: str) -> str:
    """The same by the values of an axis: recovered, and how many the span flipped; EM of the exact reference below."""
    found = _margin(result, suite, axis)
    values = sorted({row[axis] for row in found})
    by = {(row["method"], row[axis]): row for row in found}
    lines = ["| recovered | " + " | ".join(map(str, values)) + " |", "|---" * (len(values) + 1) + "|"]
    methods = list(dict.fromkeys(row["method"] for row in found))
    for method in methods:
        cells = [_with_interval(by[method, value], "recovered", 2) for value in values]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    if methods:
        of = [by[methods[0], value] for value in values]
        flipped = " | ".join(f"{row['flipped']} of {row['judged']}" for row in of)
        exact = " | ".join(f"{row['em_exact']:.2f}" for row in of)
        lines += [f"| flipped, of those judged | {flipped} |", f"| EM of the exact reference | {exact} |"]
    return "\n".join(lines)


def axis_table(result: Mapping[str, Any], suite: str, axis: str, measure: str = "fidelity") -> str:
    """A measure of one suite along one column of its cells, a row a method.

    Args:
        axis: a field of `Cell`, such as `task` or `depth`.
        measure: a column of the rows.
    """
    rows = [row for row in _margin(result, suite, axis) if row[measure] is not None]
    if not rows:
        return NOT_MEASURED
    values = list(dict.fromkeys(row[axis] for row in rows))
    values = values if axis == "task" else sorted(values)
    found = {(row["method"], row[axis]): row for row in rows}
    digits = 2 if measure in ("fidelity", "em", "leak_rate") else 4
    lines = [f"| {measure} by {axis} | " + " | ".join(map(str, values)) + " |", "|---" * (len(values) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in found):
        cells = [
            _with_interval(found[method, value], measure, digits) if (method, value) in found else "-"
            for value in values
        ]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def frontier_table(result: Mapping[str, Any]) -> str:
    """Tokens run and KL by context length, a row a method and width."""
    lengths = list(dict.fromkeys(row["length"] for row in result["rows"]))
    found = {(row["method"], row["length"]): row for row in result["rows"]}
    heads = [f"{length}: tokens run | {length}: KL to exact" for length in lengths]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (2 * len(lengths) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in found):
        cells = []
        for length in lengths:
            row = found.get((method, length))
            cells.append("- | -" if row is None else f"{row['recomputed']:.0f} | {_with_interval(row, 'kl', 4)}")
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def models_table(_: Mapping[str, Any]) -> str:
    """The families of `kveraser models`, a row a model type."""
    lines = ["| `model_type` | models | layers | positions | works | limits |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{family.model_type}` | {family.products} | {', '.join(family.layer_types)} | {family.positions} "
        f"| {family.works} | {family.limits} |"
        for family in FAMILIES
    ]
    return "\n".join(lines)


def _margin(result: Mapping[str, Any], suite: str, axis: str | None = None) -> list[Mapping[str, Any]]:
    """The rows over all cells of a suite; with an axis, those over all cells of one value on it."""
    wanted = {"suite": suite} | {name: ALL for name in AXES if name not in ("suite", axis)}
    return [
        row
        for row in result["rows"]
        # A column that a run does not have runs over everything there is.
        if all(row.get(key, value) == value for key, value in wanted.items())
        and (axis is None or row[axis] not in (ALL, None))
    ]


def _fidelities(result: Mapping[str, Any], column: str, heading: str) -> str:
    rows = {(row["method"], row[column]): row for row in _margin(result, "heldout", column)}
    sizes = sorted({size for _, size in rows})
    lines = [
        "| fidelity | " + " | ".join(heading.format(size) for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for method in dict.fromkeys(method for method, _ in rows):
        lines.append(
            f"| `{method}` | " + " | ".join(_with_interval(rows[method, size], "fidelity", 2) for size in sizes) + " |"
        )
    return "\n".join(lines)


def serving_table(result: Mapping[str, Any]) -> str:
    """Every figure of `python -m evaluation serve` or `python -m tests.stress` that has a bar."""
    lines = ["| measure | figure | value | bar | held |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        held = "yes" if row["held"] else "no"
        lines.append(f"| {row['measure']} | {row['figure']} | {value} | {row['bar']} | {held} |")
    return "\n".join(lines)


def serving_load_table(result: Mapping[str, Any]) -> str:
    """Requests of the server's soak by kind, in seconds."""
    soak, crashes = result["soak"], result["crashes"]
    lines = ["| request | count | median seconds | 95% within seconds |", "|---|---|---|---|"]
    lines += [
        f"| {row['kind']} | {row['count']} | {row['p50_seconds']:.2f} | {row['p95_seconds']:.2f} |"
        for row in soak["rows"]
    ]
    return "\n".join(lines) + (
        f"\n\n{soak['requests_per_second']:.1f} requests and "
        f"{soak['answer_tokens_per_second']:.1f} answer tokens a second; "
        f"{soak['compared']} answers compared with the same operations alone; of {soak['foreign']} requests "
        f"with another client's key none found a session. After {len(crashes['rows'])} kills "
        f"{crashes['back']} sessions were back, {crashes['gone']} were reported gone, {crashes['wrong']} were wrong."
    )


def _with_interval(row: Mapping[str, Any], name: str, digits: int) -> str:
    """A figure with its 95% interval where it has one."""
    if row[name] is None:
        return "-"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None or high - low < 10**-digits:
        return _rounded(row[name], digits)
    return f"{_rounded(row[name], digits)} ({_rounded(low, digits)} to {_rounded(high, digits)})"


def _rounded(value: float, digits: int) -> str:
    # What is 0 up to rounding has no sign.
    return f"{value if abs(value) >= 10**-digits / 2 else 0.0:.{digits}f}"


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "demo": ("demo", demo_table),
    "latency": ("latency", latency_table),
    "latency_growth": ("latency", latency_growth_table),
    "first_token": ("latency", first_token_table),
    "heldout": ("heldout", heldout_table),
    "heldout_spans": ("heldout", heldout_spans_table),
    "heldout_lengths": ("heldout", heldout_lengths_table),
    "heldout_tasks": ("heldout", heldout_tasks_table),
    "profile": ("profile", partial(suite_table, suite=ALL)),
    "niah": ("profile", partial(axis_table, suite="niah", axis="depth")),
    "longqa": ("profile", partial(suite_table, suite="longqa")),
    "scenarios": ("profile", partial(axis_table, suite="scenarios", axis="task")),
    "chains": ("profile", partial(axis_table, suite="chains", axis="task")),
    "sweep_span": ("profile", partial(axis_table, suite="sweeps", axis="span")),
    "sweep_distance": ("profile", partial(axis_table, suite="sweeps", axis="distance")),
    "sweep_count": ("profile", partial(axis_table, suite="sweeps", axis="spans")),
    "leak": ("profile", partial(axis_table, suite="leak", axis="task", measure="leak")),
    "leak_rate": ("profile", partial(axis_table, suite="leak", axis="task", measure="leak_rate")),
    "ruler": ("ruler", partial(recovered_table, suite="ruler")),
    "ruler_tasks": ("ruler", partial(recovered_axis_table, suite="ruler", axis="task")),
    "ruler_lengths": ("ruler", partial(recovered_axis_table, suite="ruler", axis="length")),
    "ruler_depths": ("ruler", partial(recovered_axis_table, suite="ruler", axis="depth")),
    "documents": ("longqa", partial(recovered_table, suite="longqa")),
    "frontier": ("frontier", frontier_table),
    "edits": ("edits", partial(recovered_table, suite="edits")),
    "edits_tasks": ("edits", partial(axis_table, suite="edits", axis="task", measure="kl")),
    "influence": ("influence", influence_table),
    "serving": ("serving", serving_table),
    "stress": ("stress", serving_table),
    "serving_load": ("stress", serving_load_table),
    "serving_soak": ("serving-soak", serving_table),
    "models": ("", models_table),
}
"""By name: the result file, if it has one, and what renders it."""

DOCUMENTS = (
    "README.md",
    "docs/eraser.md",
    "docs/measures.md",
    "docs/models.md",
    "docs/results.md",
    "src/kveraser/erasers/smollm2-135m-instruct/README.md",
)
"""Where tables stand, from the repository's root."""


def fill(document: str, results: Path) -> str:
    """`document` with every marked table rendered from its result file in `results`, if that exists.

    Raises:
        InputError: a table that nothing renders.
    """

    def render(match: re.Match[str]) -> str:
        name = match.group("name")
        result, rendered = TABLES.get(name, (name, None))
        source = results / f"{result}.json"
        if rendered is None:
            raise InputError(f"the table {name!r} has no renderer: there are {', '.join(TABLES)}")
        if result:
            table = rendered(json.loads(source.read_text("utf-8"))) if source.is_file() else NOT_MEASURED
        else:
            table = rendered({})
        return f"<!-- table: {name} -->\n{table}\n<!-- end -->"

    return MARKED.sub(render, document)


def main(arguments: Sequence[str] = (), root: Path = Path()) -> int:
    """Rewrite the documents' tables; with `--check`, only say which differ. Run from the repository."""
    stale = []
    for name in DOCUMENTS:
        document = root / name
        before = document.read_text("utf-8")
        try:
            after = fill(before, root / "docs" / "results")
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        if before != after:
            stale.append(name)
            if "--check" not in arguments:
                with replacing(document) as temporary:
                    temporary.write_text(after, "utf-8")
    if "--check" not in arguments or not stale:
        return 0
    print(f"{', '.join(stale)}: tables differ from docs/results: run python -m evaluation.tables", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
