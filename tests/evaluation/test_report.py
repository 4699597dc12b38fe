"""The report: only what was measured, only runs that belong together, and a page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from evaluation.commands_report import report
from evaluation.report.cases import RANDOM, SPREAD, choose
from evaluation.report.figures import Drawn, draw
from evaluation.report.page import browser_data
from evaluation.report.read import KEYS, QUALITY_MEASURES, read
from evaluation.report.style import styles
from kveraser.errors import InputError

METHODS = ["none", "recompute", "mask", "repair(window=8)", "repair(window=32)"]
HOSTILE = '</script><b id="injected">bold</b><img src="https://example.org/x"> & {{script}} $\\frac$'
ENVIRONMENT: dict[str, Any] = {
    "commit": "84278b3", "backbone": "tiny", "backbone_fingerprint": "c0ffee", "dtype": "float32",
    "eraser": {"name": "small", "slots": 0},
    "device": "cpu", "threads": 1, "machine": "x86_64", "versions": {"kveraser": "0.1.0", "torch": "2.6"},
}  # fmt: skip


def cell(suite: str = "needle", task: str = "city", **keys: Any) -> dict[str, Any]:
    """A cell that varies nothing but what is given."""
    return (
        {"length": None, "span": None, "spans": 1, "distance": None, "depth": None}
        | keys
        | dict(suite=suite, task=task)
    )


def rows_of(cells: list[dict[str, Any]], **measures: float | None) -> list[dict[str, Any]]:
    """The full cells and the margins that a run has, a row a method."""
    rows = []
    for kept in (KEYS, (), *(("suite", *([key] if key != "suite" else [])) for key in KEYS)):
        keys = {tuple(one[key] if key in kept else "all" for key in KEYS): None for one in cells}
        for values, (number, method) in product(keys, enumerate(METHODS)):
            kl = 0.0 if method == "recompute" else 0.5 / (number + 1)
            measured = dict.fromkeys(QUALITY_MEASURES) | {"kl": kl, "kl_low": kl, "kl_high": kl * 2, "kl_unerased": 0.5}
            measured |= {"fidelity": 1 - kl / 0.5, "seconds": 0.1, "recomputed": 40.0 * number} | measures
            rows.append(
                dict(zip(KEYS, values, strict=True)) | {"method": method, "cases": 3, "questions": 6} | measured
            )
    return rows


def case_of(number: int, of: dict[str, Any], text: str = "It was in Oslo.") -> dict[str, Any]:
    """A case whose methods are the further apart the higher its number."""
    question = {"question": f"Where? {text}", "kind": "influence", "expected": "In Bergen.", "tokens": 2,
                "accepted": ["Bergen"], "wrong": ["Oslo"], "adversarial": False}  # fmt: skip
    said = {"recompute": "In Bergen.", "none": "In Oslo."}
    answers = {
        method: {"kl": number * place / 10, "log_probability": -1.0, "answer": said.get(method, f"In {text}"),
                 "correct": method == "recompute", "leaked": None}
        for place, method in enumerate(METHODS)
    }  # fmt: skip
    methods = {method: {"seconds": 0.1, "recomputed": 4, "answers": [answer]} for method, answer in answers.items()}
    return of | {
        "id": f"{of['suite']}/{of['task']}/{of['length']}/{number}", "context": "c", "context_tokens": 90,
        "erased_tokens": 9, "distance_tokens": 30, "before": f"before {text} ", "erased": [text, "second"],
        "after": " after", "fingerprint": "f", "questions": [question], "methods": methods,
    }  # fmt: skip


def write_run(
    folder: Path, cells: list[dict[str, Any]], *, cases: int = 3, text: str = "Oslo.", **changes: Any
) -> Path:
    """A run's folder, as `python -m evaluation quality` leaves it."""
    measures = changes.pop("measures", {})
    settings = {"seed": 0, "methods": METHODS[2:]} | changes.pop("settings", {})
    result = {
        "command": "python -m evaluation quality",
        "settings": settings,
        **ENVIRONMENT,
        "rows": rows_of(cells, **measures),
    }
    result |= {"seconds": 2.0, "left_out": [cells[0] | {"reason": f"too long {HOSTILE}"}]} | changes
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(result))
    lines = [json.dumps(case_of(number, one, text)) + "\n" for one in cells for number in range(cases)]
    (folder / "cases.jsonl").write_text("".join(lines))
    return folder


def write_latency(path: Path, **changes: Any) -> Path:
    rows = [
        {"method": method, "context": context, "span": 10, "seconds": 0.1, "floor_seconds": 0.05}
        for method in METHODS[1:]
        for context in (64, 128)
    ]
    peers = [
        {"peer": "other", "operation": "shift", "context": context, "span": 10, "seconds": 0.2} for context in (64, 128)
    ]
    result = {
        "command": "python -m evaluation latency",
        "settings": {"span": 10},
        **ENVIRONMENT,
        "rows": rows,
        "peers": peers,
    }
    path.write_text(json.dumps(result | changes))
    return path


def made(paths: list[Path], output: Path, cases_per_cell: int = 5) -> str:
    report(paths, output, cases_per_cell, json_output=True)
    return (output / "index.html").read_text("utf-8")


class Page(HTMLParser):
    """Every tag with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.visible: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        where = self.tags[-1][0] if self.tags else ""
        (self.inside[where] if where in self.inside and data.strip() else self.visible).append(data)


def test_figures_are_made_for_exactly_the_axes_that_vary(tmp_path: Path) -> None:
    first = write_run(tmp_path / "one", [cell(length=64, span=8), cell(length=128, span=8)])
    made([first], tmp_path / "report")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"quality-cost", "fidelity-length"}

    everything = [
        cell(length=64, span=8, spans=2, distance=0, depth=0.5),
        cell(spans=4, span=16, distance=9, depth=0.9),
    ]
    second = write_run(
        tmp_path / "two", everything, measures={"leak": 0.1, "leak_rate": 0.0, "em": 0.5, "em_exact": 1.0}
    )
    made([second, write_latency(tmp_path / "latency.json")], tmp_path / "report")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {
        "quality-cost", "fidelity-span", "fidelity-spans", "fidelity-distance", "fidelity-depth", "latency", "leakage",
        "exact-match",
    }  # fmt: skip


def test_a_figure_of_an_earlier_report_goes_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    for name in ("latency.png", "holiday.png"):
        (tmp_path / "report" / name).write_bytes(b"old")
    made([write_run(tmp_path / "run", [cell(length=64)])], tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "quality-cost.png", "holiday.png"}


def test_a_method_looks_the_same_in_every_report() -> None:
    everything = styles([*METHODS, "kveraser", "somebody_else's(3)"])
    for method in ("mask", "kveraser", "somebody_else's(3)"):
        alone = styles(["none", method])[method]
        assert (alone.colour, alone.marker) == (everything[method].colour, everything[method].marker)
    one, other = everything["repair(window=8)"], everything["repair(window=32)"]
    assert (one.colour, one.marker) == (other.colour, other.marker)
    assert one.fill != other.fill and one.dash != other.dash
    families = [look for method, look in everything.items() if method != "repair(window=8)"]
    assert len({(look.colour, look.marker) for look in families}) == len(families)


def test_names_say_only_what_tells_variants_apart() -> None:
    labels = {
        method: look.label
        for method, look in styles(
            ["repair(window=32, per_span=0.0)", "repair(window=32, per_span=1.0)", "kveraser(layout='keep', window=2)"]
        ).items()
    }
    assert list(labels.values()) == ["repair(per_span=0.0)", "repair(per_span=1.0)", "kveraser"]


def test_figures_take_names_literally_and_are_the_same_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell("a$\\b$", length=64), cell("$_{", length=64), cell("$_{", length=128)])
    results = read([run])
    looks = styles(results.methods)
    first, second = draw(results, looks), draw(results, looks)
    assert len(first) == 2 and [one.png for one in first] == [one.png for one in second]
    assert all(one.png.startswith(b"\x89PNG") for one in first)


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(HOSTILE, HOSTILE, length=64)], text=HOSTILE, commit=HOSTILE)
    page = Page(made([run], tmp_path / "report"))
    loaded = [
        attributes[name] or "" for _, attributes in page.tags for name in ("src", "href", "data") if name in attributes
    ]
    assert loaded and all(address.startswith(("data:image/png;base64,", "#")) for address in loaded)
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "link", "iframe", "object"})
    assert all("url(" not in style and "@import" not in style for style in page.inside["style"])
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = next(str(one["content"]) for _, one in page.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    data, script = page.inside["script"]
    assert hash_of(script) in policy and hash_of(page.inside["style"][0]) in policy
    # The hostile names are there to be read, as text.
    assert "".join(page.visible).count(HOSTILE) >= 3
    assert json.loads(data)["cases"]


def hash_of(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_embedded_cases_parse_back_to_what_was_measured(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64)], text=HOSTILE + "\u2028 <!-- é")
    data = json.loads(Page(made([run], tmp_path / "report")).inside["script"][0])
    results = read([run])
    assert data == browser_data(styles(results.methods), choose(results.cases, 5, 0))
    assert [one["name"] for one in data["methods"]] == METHODS[2:]
    assert {one["erased"][0] for one in data["cases"]} == {HOSTILE + "\u2028 <!-- é"}


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64), cell(length=128)], cases=9)
    assert made([run], tmp_path / "one") == made([run], tmp_path / "two")


def test_cases_are_capped_and_the_widest_apart_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64), cell(length=128)], cases=20)
    chosen = choose([run / "cases.jsonl"], 5, seed=0)
    for length in (64, 128):
        own = [one for one in chosen if one["length"] == length]
        assert [one["chosen"] for one in own] == [SPREAD] * 3 + [RANDOM] * 2
        assert [one["id"].rpartition("/")[2] for one in own[:3]] == ["19", "18", "17"]
        assert len({one["id"] for one in own}) == 5
    assert choose([run / "cases.jsonl"], 5, seed=0) == chosen
    # Some seed draws others; the widest stay.
    others = [choose([run / "cases.jsonl"], 5, seed) for seed in range(1, 4)]
    assert any(other != chosen for other in others) and all(other[:3] == chosen[:3] for other in others)
    assert choose([run / "cases.jsonl"], 0, seed=0) == []


def test_runs_of_different_suites_are_merged(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [cell("first", length=64)])
    other = write_run(tmp_path / "two", [cell("second", length=64)], seconds=9.0)
    results = read([one, other, write_latency(tmp_path / "latency.json")])
    assert results.suites == results.scopes == ["first", "second"]
    assert not results.select() and len(results.select(suite="second")) == len(METHODS)
    page = Page(made([one, other], tmp_path / "report"))
    assert {case["suite"] for case in json.loads(page.inside["script"][0])["cases"]} == {"first", "second"}


@pytest.mark.parametrize(
    ("changes", "key", "values"),
    [
        ({"backbone": "big"}, "backbone", ("tiny", "big")),
        ({"backbone_fingerprint": "decaf"}, "backbone_fingerprint", ("c0ffee", "decaf")),
        ({"eraser": {"name": "small", "slots": 4}}, "eraser.slots", ("0", "4")),
        ({"eraser": None}, "eraser", ("small", "None")),
        ({"dtype": "bfloat16"}, "dtype", ("float32", "bfloat16")),
        ({"settings": {"seed": 3}}, "seed", ("0", "3")),
        ({"settings": {"methods": ["mask"]}}, "methods", ("repair", "['mask']")),
        ({"versions": {"kveraser": "0.1.0", "torch": "2.7"}}, "versions.torch", ("2.6", "2.7")),
    ],
)
def test_runs_that_differ_are_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], key: str, values: tuple[str, str]
) -> None:
    one = write_run(tmp_path / "one", [cell("first")])
    other = write_run(tmp_path / "two", [cell("second")], **changes)
    with pytest.raises(InputError, match=f"{key} is ") as refused:
        read([one, other])
    assert all(value in str(refused.value) for value in values)


def test_results_that_know_no_fingerprint_are_told_apart_by_the_name(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [cell("first")])
    other = write_run(tmp_path / "two", [cell("second")], backbone_fingerprint=None)
    assert read([one, other]).suites == ["first", "second"]


def test_methods_in_another_order_are_the_same_methods(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [cell("first")])
    other = write_run(tmp_path / "two", [cell("second")], settings={"methods": METHODS[:1:-1]})
    assert read([one, other]).suites == ["first", "second"]


def test_latency_belongs_to_a_backbone_and_an_eraser_and_to_one_machine(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell()])
    with pytest.raises(InputError, match=r"eraser is .*'untrained'"):
        read([run, write_latency(tmp_path / "one.json", eraser="untrained")])
    # Quality does not hang on where it was measured; seconds do.
    elsewhere = write_latency(tmp_path / "two.json", device="cuda")
    assert read([run, elsewhere]).latency
    with pytest.raises(InputError, match="device is 'cuda' in one and 'cpu'"):
        read([elsewhere, write_latency(tmp_path / "three.json")])


def test_a_cell_measured_twice_is_refused(tmp_path: Path) -> None:
    one, other = (write_run(tmp_path / name, [cell(length=64)]) for name in ("one", "two"))
    with pytest.raises(InputError, match=r"same cell \(suite needle, task city, length 64, spans 1, method none\)"):
        read([one, other])


def change(run: Path, file: str, edit: Callable[[str], str]) -> None:
    (run / file).write_text(edit((run / file).read_text()))


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("run.json", lambda text: text[:-20], "run.json"),
        ("run.json", lambda text: "[]", "holds a list"),
        (
            "run.json",
            lambda text: text.replace("evaluation quality", "evaluation train"),
            "evaluation train'",
        ),
        ("run.json", lambda text: text.replace('"suite"', '"sweet"'), "row 0 has no 'suite'"),
        ("run.json", lambda text: text.replace('"kl": 0.5', '"kl": NaN'), "NaN"),
        ("run.json", lambda text: text.replace('"kl": 0.5', '"kl": "much"'), "kl 'much'"),
        ("run.json", lambda text: text.replace('"seed": 0', '"seed": null'), "no seed"),
        ("cases.jsonl", lambda text: text[:-20] + "\n", "line 3 of"),
        ("cases.jsonl", lambda text: text.replace('"recompute"', '"recomputed"'), "line 1 of"),
        ("cases.jsonl", lambda text: text.replace('"tokens": 2', '"tokens": "two"'), "line 1 of"),
        ("cases.jsonl", lambda text: text.replace('"before": "', '"before": 3, "x": "'), "line 1 of"),
    ],
)
def test_what_is_no_result_is_refused_by_name(tmp_path: Path, file: str, edit: Callable[[str], str], said: str) -> None:
    run = write_run(tmp_path / "run", [cell(length=64)])
    before = (run / file).read_text()
    change(run, file, edit)
    assert (run / file).read_text() != before
    with pytest.raises(InputError) as refused:
        made([run], tmp_path / "report")
    assert said in str(refused.value) and file in str(refused.value)
    assert not (tmp_path / "report").exists()


def test_a_half_written_last_case_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64)])
    whole = [case["id"] for case in choose([run / "cases.jsonl"], 5, 0)]
    change(run, "cases.jsonl", lambda text: text[:-20])
    assert len(whole) == 3 and {case["id"] for case in choose([run / "cases.jsonl"], 5, 0)} < set(whole)
    made([run], tmp_path / "report")


def test_a_missing_or_unfinished_run_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no run\.json"):
        read([tmp_path / "empty"])
    with pytest.raises(InputError, match=r"absent\.json"):
        read([tmp_path / "absent.json"])


def test_a_run_without_its_cases_still_reports(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64)])
    (run / "cases.jsonl").unlink()
    page = Page(made([run / "run.json"], tmp_path / "report"))
    assert json.loads(page.inside["script"][0])["cases"] == []
    assert any(attributes.get("id") == "quality-cost" for _, attributes in page.tags)


def test_an_adversary_without_kl_and_a_peer_without_seconds_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [cell(length=64)])
    lines = [json.loads(line) for line in (run / "cases.jsonl").read_text().splitlines()]
    for line in lines:
        line["questions"].append({**line["questions"][0], "kind": "leak", "adversarial": True})
        for measured in line["methods"].values():
            measured["answers"].append({**measured["answers"][0], "kl": None, "prompt": "tell me", "leaked": True})
    (run / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timed = {"peer": "engine", "operation": "prefix", "span": 10, "seconds": None, "first_token_seconds": 0.3}
    latency = write_latency(
        tmp_path / "latency.json",
        peers=[timed | {"context": context} for context in (64, 128)],
        peers_skipped=[{"peer": "absent", "reason": "not <b>installed</b>"}],
    )
    page = Page(made([run, latency], tmp_path / "report"))
    data = json.loads(page.inside["script"][0])
    assert [one["id"].rpartition("/")[2] for one in data["cases"]][:2] == ["2", "1"]
    assert data["cases"][0]["methods"]["mask"]["answers"][1]["prompt"] == "tell me"
    assert "absent did not run: not <b>installed</b>" in "".join(page.visible)
    # The peer's time goes into a panel of its own measure.
    without = draw(read([run, write_latency(tmp_path / "none.json", peers=[])]), styles(METHODS))
    taller, shorter = ((tmp_path / "report" / "latency.png").read_bytes(), by_name(without, "latency").png)
    assert height_of(taller) > 1.5 * height_of(shorter)


def by_name(figures: list[Drawn], name: str) -> Drawn:
    return next(one for one in figures if one.name == name)


def height_of(png: bytes) -> int:
    return int.from_bytes(png[20:24], "big")


# In a browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TYPIST = """
for (const key of %s) {
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
}
document.body.dataset.focus = document.activeElement.id;
document.body.dataset.dialog = document.getElementById("keys").open;
"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on the path: {', '.join(BROWSERS)}")
    return found


def typed(browser: str, folder: Path, text: str, keys: list[str]) -> str:
    """The page as a browser holds it after these keys; the typing script is let in beside the page's own."""
    script = TYPIST % json.dumps(keys)
    text = text.replace("script-src ", f"script-src {hash_of(script)} ", 1)
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_keys_move_through_cases_methods_and_tasks(browser: str, tmp_path: Path) -> None:
    cells = [cell(task="city", length=64), cell(task="port", length=64)]
    text = made([write_run(tmp_path / "run", cells, text=HOSTILE)], tmp_path / "report")

    def shown(*keys: str) -> tuple[str | None, str | None, str, str]:
        page = Page(typed(browser, tmp_path, text, list(keys)))
        by_id = {attributes.get("id"): attributes for _, attributes in page.tags}
        assert "injected" not in by_id and not any(tag == "b" for tag, _ in page.tags)
        case, body = by_id["case"], next(attributes for tag, attributes in page.tags if tag == "body")
        return case["data-id"], case["data-method"], str(body["data-focus"]), str(body["data-dialog"])

    # Six cases, the widest first in each task.
    assert shown() == ("needle/city/64/2", "mask", "", "false")
    assert shown("j", "ArrowRight", "m")[:2] == ("needle/city/64/0", "repair(window=8)")
    assert shown("j", "j", "j", "k", "k", "M")[:2] == ("needle/city/64/1", "repair(window=32)")
    assert shown("t", "t")[:2] == ("needle/port/64/2", "mask")
    assert shown("T", "j", "j", "j")[:2] == ("needle/port/64/0", "mask")
    # In the filter, letters are text.
    assert shown("/", "j", "m")[:3] == ("needle/city/64/2", "mask", "filter")
    assert shown("?", "j") == ("needle/city/64/2", "mask", shown("?")[2], "true")


def test_a_case_shows_its_answers_and_marks_the_words_that_differ(browser: str, tmp_path: Path) -> None:
    text = made([write_run(tmp_path / "run", [cell(length=64)], text=HOSTILE)], tmp_path / "report")
    page = typed(browser, tmp_path, text, ["j"])
    body = page[page.index('<article id="case"') : page.index("</article>")]
    assert "<ins>Oslo.</ins>" in body and '<span class="absent">Bergen.</span>' in body
    assert "<del>&lt;/script&gt;&lt;b" in body and "1 word (wavy) not in exact" in body
    announced = page[page.index('<p id="announcer"') :].partition("</p>")[0]
    assert "Case 2 of 3, needle city, method mask: KL to exact 0.1" in announced
