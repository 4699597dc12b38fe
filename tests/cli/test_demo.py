"""The demo's runner and picture, on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kveraser.demo.documents import Document, Question
from kveraser.demo.picture import COLOURS, draw
from kveraser.demo.run import ANSWER_TOKENS, DocumentResult, run_document, summarize
from kveraser.errors import InputError
from kveraser.methods import METHODS
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from tests.tiny import attach_random_eraser, tiny_backbone

CONTEXT = "The ship left at noon. The captain is Ada. She keeps the log in the cabin. The crew trusts her a lot."
SPAN = "The captain is Ada."


def document(name: str = "ship") -> Document:
    asked = [Question("Who is the captain?", ["Bo"], ["Ada"])]
    unrelated = [Question("When did the ship leave?", ["noon"], [])]
    return Document(name, "A ship", "It sailed.", CONTEXT, None, None, SPAN, asked, unrelated)


@pytest.fixture(scope="module")
def result() -> DocumentResult:
    return run_document(tiny_backbone(), document(), list(METHODS))


def test_every_method_has_a_row_and_those_without_an_eraser_say_so(result: DocumentResult) -> None:
    assert [one.method for one in result.results] == list(METHODS)
    missing = [one.method for one in result.results if one.receipt is None]
    assert missing == ["kveraser", "kveraser+repair"]
    rows = result.to_json()["rows"]
    assert all("trained eraser" in row["missing"] for row in rows if row["method"] in missing)
    assert all(row["missing"] is None and row["seconds"] > 0 for row in rows if row["method"] not in missing)


@pytest.mark.filterwarnings("error::UserWarning")
def test_tools_that_the_template_can_not_write_are_left_out_without_a_warning() -> None:
    tools = [{"type": "function", "function": {"name": "find"}}]
    told = replace(document(), context=None, messages=[{"role": "user", "content": CONTEXT}], tools=tools)
    found = run_document(tiny_backbone(), told, ["recompute"])
    assert found.results[0].receipt is not None and found.results[0].receipt.exact


def test_with_an_eraser_every_method_is_run() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    names = ["recompute", "kveraser", "kveraser+repair"]
    assert [one.missing for one in run_document(backbone, document(), names).results] == [None] * 3


def test_what_the_loaded_eraser_cannot_serve_says_so() -> None:
    missing = {one.method: one.missing for one in run_document(tiny_backbone(), document(), list(METHODS)).results}
    assert all("needs a trained eraser" in str(missing.pop(name)) for name in ("kveraser", "kveraser+repair"))
    assert not any(missing.values())


def test_the_answers_are_those_of_a_session(result: DocumentResult) -> None:
    session = Session(tiny_backbone(), text=CONTEXT)
    questions = [asked.question for asked in [*document().questions, *document().unrelated]]
    assert list(result.before) == [session.ask(one, max_new_tokens=ANSWER_TOKENS).text for one in questions]
    session.erase(SPAN, "mask")
    masked = next(row for row in result.to_json()["rows"] if row["method"] == "mask")
    assert masked["answers"] == [session.ask(one, max_new_tokens=ANSWER_TOKENS).text for one in questions]
    session.undo()
    session.erase(SPAN, "recompute")
    assert list(result.exact) == [session.ask(one, max_new_tokens=ANSWER_TOKENS).text for one in questions]
    assert result.before != result.exact
    assert (result.tokens, result.erased) == (len(session.transcript.tokens), session.receipts[0].erased)


def test_only_what_ran_the_whole_suffix_is_exact_and_it_alone_has_no_distance(result: DocumentResult) -> None:
    for row in result.to_json()["rows"]:
        if row["missing"] is None:
            # Here the tokens of `follow` are the whole suffix.
            assert row["exact"] == (row["method"] in ("recompute", "follow"))
            assert (row["kl"] < 1e-5) == row["exact"], row
            assert row["kl_unerased"] > 0.01


def test_the_summary_adds_up_the_documents(result: DocumentResult) -> None:
    once, twice = summarize([result]), summarize([result, result])
    for one, two in zip(once, twice, strict=True):
        if one["missing"] is None:
            assert two["recomputed"] == 2 * one["recomputed"] and two["seconds"] == pytest.approx(2 * one["seconds"])
            assert two["kl"] == pytest.approx(one["kl"]) and two["fidelity"] == pytest.approx(one["fidelity"])
    assert once[0]["fidelity"] == pytest.approx(1, abs=1e-3)


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(METHODS) and len(set(COLOURS.values())) == len(METHODS)


def test_the_picture_is_a_png_that_changes_with_the_rows(result: DocumentResult, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = summarize([result])
    first = draw(rows, tmp_path / "a.png", "Title").read_bytes()
    assert first.startswith(b"\x89PNG") and draw(rows, tmp_path / "b.png", "Title").read_bytes() == first
    rows[1] = rows[1] | {"kl": rows[1]["kl"] * 50}
    assert draw(rows, tmp_path / "c.png", "Title").read_bytes() != first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_picture_that_can_not_be_written_is_an_error(result: DocumentResult, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--picture"):
        draw(summarize([result]), tmp_path / "no" / "such" / "folder.png", "Title")


def test_the_command_prints_every_document_and_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import json
    import sys

    from kveraser.cli import main as cli
    from kveraser.demo import documents

    def load(*arguments: object) -> Backbone:
        return tiny_backbone()

    monkeypatch.setattr(cli, "load_backbone", load)
    monkeypatch.setattr(documents, "load_documents", lambda: [document("one"), document("two")])
    picture = tmp_path / "demo.png"
    for extra in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["kveraser", "demo", "--picture", str(picture), *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0 and picture.read_bytes().startswith(b"\x89PNG")
        out = capsys.readouterr().out
        if extra:
            printed = json.loads(out)
            assert [row["method"] for row in printed["rows"]] == list(METHODS)
            assert [one["document"] for one in printed["documents"]] == ["one", "two"]
        else:
            assert "A ship" in out and "Who is the captain?" in out and "trained eraser" in out
