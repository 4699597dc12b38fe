"""The ledger: what was acknowledged is read back, and whatever is lost of it makes sessions gone, never older."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kveraser.serve import ledger as module
from kveraser.serve.errors import OutOfSpace, ServeError
from kveraser.serve.ledger import Acknowledged, Ledger


def record(id: str, revision: int, state: Any = "held") -> Acknowledged:
    return Acknowledged(id, "owner", state, revision, f"digest{revision}", 1.0, 9.0, 8.0, False, 40, 30, True)


def written(folder: Path) -> tuple[Path, list[tuple[int, dict[str, Acknowledged]]]]:
    """A ledger of several sessions, and what it said at each length that it had."""
    path = folder / "ledger.jsonl"
    ledger = Ledger(path)
    states = [(0, dict(ledger.records))]
    for id, revision in [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("b", 2), ("a", 3)]:
        ledger.append(record(id, revision))
        states.append((path.stat().st_size, dict(ledger.records)))
    ledger.append(record("b", 2, "deleted"))
    states.append((path.stat().st_size, dict(ledger.records)))
    ledger.close()
    return path, states


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that open many ledgers: nothing waits for the disk, and files stay as they are written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(Ledger, "_compact", lambda ledger: None)


def test_it_is_read_back_and_compacted(tmp_path: Path) -> None:
    path, states = written(tmp_path)
    size = path.stat().st_size
    assert set(states[-1][1]) == {"a", "c"}
    for _ in range(2):
        ledger = Ledger(path)
        assert ledger.records == states[-1][1]
        ledger.close()
    assert path.stat().st_size < size


def test_cut_at_any_byte_it_says_what_it_said_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, states = written(tmp_path)
    quickly(monkeypatch)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        ledger = Ledger(path)
        assert ledger.records == [said for size, said in states if size <= length][-1]
        if length % 13 == 0:
            # What comes next is whole, whatever was left of the torn line.
            ledger.append(record("d", 7))
            ledger.close()
            ledger = Ledger(path)
            assert ledger.records["d"] == record("d", 7)
        ledger.close()


def test_damage_makes_what_lies_before_it_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, states = written(tmp_path)
    content = path.read_bytes()
    ends = [size for size, _ in states]
    # The lines in which each session is recorded last; "b" is deleted in the last one, which is cut off here.
    last = {"c": 4, "b": 5, "a": 6}
    quickly(monkeypatch)
    for place in range(ends[6] - 1):
        damaged = bytearray(content[: ends[6]])
        damaged[place] ^= 4
        path.write_bytes(bytes(damaged))
        # Without its end a line takes the next one with it.
        line = next(number for number, end in enumerate(ends) if place < end) + (content[place : place + 1] == b"\n")
        ledger = Ledger(path)
        for id, where in last.items():
            if where > line:
                assert ledger.records[id] == states[6][1][id], place
            else:
                assert id not in ledger.records or ledger.records[id].state == "gone", (place, id)
        ledger.close()


def test_a_missing_line_makes_what_lies_before_it_gone(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:5]))
    ledger = Ledger(path)
    assert {id: (found.state, found.revision) for id, found in ledger.records.items()} == {
        "a": ("gone", 1), "c": ("held", 1), "b": ("held", 2),
    }  # fmt: skip
    ledger.close()


def test_a_full_disk_leaves_it_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.append(record("a", 1))

    def torn(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OutOfSpace):
        ledger.append(record("a", 2))
    monkeypatch.undo()
    assert ledger.records == {"a": record("a", 1)}
    ledger.append(record("b", 1))
    ledger.close()
    again = Ledger(path)
    assert again.records == {"a": record("a", 1), "b": record("b", 1)}
    again.close()


def test_it_stays_small_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMPACT_BYTES", 2000)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    sizes = []
    for revision in range(60):
        ledger.append(record("a", revision))
        sizes.append(path.stat().st_size)
    assert max(sizes) < 4000 and sizes != sorted(sizes)
    ledger.close()
    again = Ledger(path)
    assert again.records == {"a": record("a", 59)}
    again.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    with pytest.raises(ServeError, match="other server"):
        Ledger(path)
    ledger.append(record("a", 1))
    ledger.close()
    again = Ledger(path)
    assert again.records == {"a": record("a", 1)}
    again.close()
    with pytest.raises(ServeError, match="can't be opened"):
        Ledger(tmp_path)
