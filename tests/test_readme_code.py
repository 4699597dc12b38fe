"""The code blocks of README.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import kveraser
from kveraser.session.session import Session
from tests.tiny import tiny_backbone

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
NOTES = (
    "The conference takes place in Lisbon. Registration opens in March, and 300 people have signed up. The conference "
    "takes place in Porto. Speakers get a free ticket. " + "The hall has 20 rows of chairs. " * 6
)
CALL = {"id": "call_7", "type": "function", "function": {"name": "look", "arguments": "{}"}}


@pytest.mark.backbone
def test_the_first_example_erases_and_undoes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text(NOTES, "utf-8")
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "notes.txt" in block)
    names: dict[str, Any] = {}
    exec(block, names)
    session, receipt = names["session"], names["receipt"]
    assert session.text.endswith(NOTES) and receipt.text[0].strip() == "The conference takes place in Lisbon."
    assert names["audit"].kl is not None and len(capsys.readouterr().out.splitlines()) >= 5


def conversation(texts: int) -> Session:
    """Messages in which every selector of the README finds something."""
    said = "an exact text" + " and an exact text" * (texts - 1)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"Here is {said}. My card is 1234567812345678."},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_7", "content": "Shelf 44 in the cellar of the old house."},
        {"role": "assistant", "content": "It is on shelf 44."},
        {"role": "user", "content": "And the other one?"},
        {"role": "assistant", "content": "That one is in the attic."},
    ]
    return Session(tiny_backbone(chat=True), messages=messages)


def test_every_selector_and_edit_of_the_readme_works() -> None:
    selectors, edits = (next(block for block in BLOCKS if mark in block) for mark in ("occurrence=2", ".insert("))
    imports, *lines = (line for line in (selectors + edits).splitlines() if line.strip())
    assert len(lines) >= 10
    names: dict[str, Any] = {}
    exec(imports, names)
    assert set(names) - {"__builtins__"} <= set(kveraser.__all__)
    for line in lines:
        session = conversation(2 if "occurrence" in line else 1)
        before = session.text
        exec(line, names | {"session": session})
        receipt = session.receipts[-1]
        assert receipt.erased + receipt.inserted > 0 and session.text != before, line


def test_the_influence_example_prints_later_messages(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = (block for block in BLOCKS if "influence(" in block)
    session = conversation(1)
    exec(block, {"session": session, "ToolCall": kveraser.ToolCall})
    assert len(capsys.readouterr().out.splitlines()) >= 3 and session.receipts[-1].erased > 0
