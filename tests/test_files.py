"""A file is replaced whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from kveraser.files import replacing


def test_what_was_written_takes_the_place_of_the_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old" and temporary.parent == tmp_path
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("written", [True, False])
def test_after_an_error_the_earlier_file_is_there_alone(tmp_path: Path, written: bool) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="half way"), replacing(target) as temporary:
        if written:
            temporary.write_text("ne")
        raise ValueError("half way")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
