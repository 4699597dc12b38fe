"""The ledger: acknowledged records are read back, and damage removes records or restores none that differ."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from kveraser.serve.errors import OutOfSpace, ServeError
from kveraser.serve.ledger import CHECKPOINT_PAGES, Acknowledged, Ledger

Records = dict[str, Acknowledged]

PAGE = 4096
LOG_HEADER, FRAME_HEADER = 32, 24
"""Bytes of SQLite's write-ahead log: its own header, and the header of each page in it."""


def record(id: str, revision: int, state: Any = "held") -> Acknowledged:
    return Acknowledged(id, "owner", state, revision, f"digest{revision}", 1.0, 9.0, 8.0, False, 40, 30, True)


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def written(path: Path) -> tuple[bytes, bytes, list[tuple[int, Records]]]:
    """The files of a ledger of several sessions as a crash leaves them, and its records at each length of its log."""
    ledger = Ledger(path)
    states = [(0, dict(ledger.records))]
    for id, revision in [("a", 1), ("b", 1), ("a", 2), ("c", 1), ("b", 2), ("a", 3)]:
        ledger.append(record(id, revision))
        states.append((log_of(path).stat().st_size, dict(ledger.records)))
    ledger.append(record("b", 2, "deleted"))
    states.append((log_of(path).stat().st_size, dict(ledger.records)))
    crashed = path.read_bytes(), log_of(path).read_bytes()
    ledger.close()
    return *crashed, states


def reopened(path: Path, database: bytes, log: bytes = b"") -> Ledger:
    path.write_bytes(database)
    log_of(path).write_bytes(log)
    return Ledger(path)


def test_records_are_read_back_after_closing_and_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    database, log, states = written(path)
    assert set(states[-1][1]) == {"a", "c"} and not log_of(path).exists()
    assert path.stat().st_mode & 0o777 == 0o600
    for _ in range(2):
        ledger = Ledger(path)
        assert ledger.records == states[-1][1] and list(ledger.records) == ["c", "a"]
        ledger.close()
    ledger = reopened(path, database, log)
    assert ledger.records == states[-1][1]
    ledger.close()


def test_a_log_cut_at_any_byte_gives_the_records_of_that_moment(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    database, log, states = written(path)
    frames = range(LOG_HEADER, len(log) + 1, FRAME_HEADER + PAGE)
    lengths = {*range(0, len(log), 509), *frames, *(end - 1 for end in frames), *(end + 1 for end in frames)}
    for length in sorted(lengths):
        ledger = reopened(path, database, log[:length])
        assert ledger.records == [said for size, said in states if size <= length][-1]
        if length % 13 == 0:
            # A torn transaction does not damage the next one.
            ledger.append(record("d", 7))
            ledger.close()
            ledger = Ledger(path)
            assert ledger.records["d"] == record("d", 7)
        ledger.close()


def test_a_damaged_log_gives_the_records_before_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    database, log, states = written(path)
    # Bytes 24 to 31 of the header and of each frame are checksums; a change anywhere must end the log there.
    for place in range(0, len(log), 499):
        damaged = bytearray(log)
        damaged[place] ^= 4
        ledger = reopened(path, database, bytes(damaged))
        assert ledger.records == [said for size, said in states if size <= place][-1]
        ledger.close()


def test_a_missing_page_of_the_log_gives_the_records_before_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    database, log, states = written(path)
    for start in range(LOG_HEADER, len(log), FRAME_HEADER + PAGE):
        ledger = reopened(path, database, log[:start] + log[start + FRAME_HEADER + PAGE :])
        assert ledger.records == [said for size, said in states if size <= start][-1]
        ledger.close()


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_database_has_fewer_records_but_no_other_ones(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger"
    _, _, states = written(path)
    content = path.read_bytes()
    # SQLite keeps its structure at the ends of a page, and records before its end.
    places = [
        *range(0, len(content), 61),
        *(
            place
            for page in range(0, len(content), PAGE)
            for place in (*range(page, page + 128, 3), *range(page + PAGE - 700, page + PAGE, 7))
        ),
    ]
    read = 0
    for place in places:
        damaged = content[:place] + (bytes([content[place] ^ 4]) + content[place + 1 :]) * (damage == "flipped")
        try:
            ledger = reopened(path, damaged)
        except ServeError:
            continue
        for id, found in ledger.records.items():
            assert found == states[-1][1][id], place
        read += ledger.records == states[-1][1]
        ledger.append(record("d", 7))
        assert ledger.records["d"] == record("d", 7)
        ledger.close()
    assert (read > 0) == (damage == "flipped")


def test_a_full_disk_leaves_the_ledger_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.append(record("a", 1))
    [pages] = ledger._database.execute("PRAGMA page_count").fetchone()
    ledger._database.execute(f"PRAGMA max_page_count = {pages}")
    added: Records = {}
    with pytest.raises(OutOfSpace):
        for number in range(99):
            ledger.append(record(f"b{number}", 1))
            added[f"b{number}"] = record(f"b{number}", 1)
    assert ledger.records == {"a": record("a", 1), **added}
    ledger._database.execute(f"PRAGMA max_page_count = {pages + 9}")
    ledger.append(record("c", 1))
    ledger.close()
    again = Ledger(path)
    assert again.records == {"a": record("a", 1), **added, "c": record("c", 1)}
    again.close()


def test_the_ledger_stays_small_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for revision in range(3 * CHECKPOINT_PAGES):
        ledger.append(record("a", revision))
        assert path.stat().st_size + log_of(path).stat().st_size < 1.2 * CHECKPOINT_PAGES * PAGE
    ledger.close()
    again = Ledger(path)
    assert again.records == {"a": record("a", 3 * CHECKPOINT_PAGES - 1)}
    again.close()


def test_every_record_is_synchronized_to_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    full = 2
    assert ledger._database.execute("PRAGMA synchronous").fetchone() == (full,)
    assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    ledger.close()
    with pytest.raises(sqlite3.ProgrammingError):
        ledger._database.execute("SELECT 1")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
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
