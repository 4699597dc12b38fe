"""A method that another package registers works everywhere that takes a method's name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.methods import METHODS, Method
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Span
from tests.bench_cases import CONTEXT, SPAN
from tests.cli.test_cli import Run, read, run  # noqa: F401 (a fixture)

CASE = {"context": CONTEXT, "erase": SPAN, "question": "When?", "answers": ["nine"]}


@dataclass(frozen=True)
class KeepStart(Method):
    """Keep the keys of the span's first tokens with values of zero, and drop its other slots."""

    slots: int = 4

    name = "keep_start"
    summary = "keep some keys of the span, drop the rest"
    cost = "0 tokens"
    source = "this test"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        kept = span.start + min(self.slots, len(span) - 1)
        cache.zero_values(span.start, kept)
        cache.set_tokens(span.start, [NO_TOKEN] * (kept - span.start))
        cache.drop(kept, span.end)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, KeepStart.name, KeepStart)


def test_a_session_erases_audits_and_undoes_with_it(backbone: Backbone) -> None:
    session = Session(backbone, text=CONTEXT)
    answer = session.ask("When?", max_new_tokens=8).text
    receipt = session.erase(SPAN, method="keep_start(2)")
    assert (receipt.method, receipt.parameters, receipt.exact) == ("keep_start", {"slots": 2}, False)
    audit = session.audit(["When?"])
    assert audit.kl is not None and audit.kl > 0 and SPAN not in session.text
    session.undo()
    assert session.ask("When?", max_new_tokens=8).text == answer


def test_both_evaluations_measure_it(run: Run, model: str, tmp_path: Path) -> None:  # noqa: F811
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps(CASE) + "\n", "utf-8")
    options = "--model", model, "--methods", "mask; keep_start(2); keep_start(0)", "--json"
    own = read(run("evaluate", str(cases), *options))
    suite = read(run("evaluation", "quality", "--cases", str(cases), *options))
    for result in (own, suite):
        kl = {row["method"]: row["kl"] for row in result["rows"] if row["suite"] == "cases" and row["task"] == "cases"}
        assert list(kl) == ["none", "recompute", "mask", "keep_start(slots=2)", "keep_start(slots=0)"]
        assert kl["keep_start(slots=0)"] == pytest.approx(kl["mask"], rel=1e-3)
        assert abs(kl["keep_start(slots=2)"] - kl["mask"]) > 1e-4
