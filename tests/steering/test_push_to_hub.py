"""Uploading an eraser: what goes to the hub loads again, and a hub that refuses is one typed error."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import huggingface_hub
import pytest
import torch

from kveraser.errors import EraserError
from kveraser.steering.eraser import Eraser, EraserSettings
from tests.tiny import attach_random_eraser, tiny_backbone


class Hub:
    """Stands where `HfApi` does, and keeps what is uploaded."""

    def __init__(self, kept: Path) -> None:
        self.kept, self.created, self.token = kept, {}, None  # type: ignore[var-annotated]

    def __call__(self, token: str | None = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options: Any) -> str:
        if "/" not in repo_id:
            raise ValueError("no owner")
        self.created = {repo_id: options}
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, **_: Any) -> None:
        copytree(folder_path, self.kept / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def test_what_is_uploaded_loads_again(hub: Hub) -> None:
    eraser = attach_random_eraser(tiny_backbone(), settings=EraserSettings("closed", 6))
    assert eraser.push_to_hub("owner/name", private=True, token="t") == "https://hub/owner/name"
    assert hub.created == {"owner/name": {"private": True, "exist_ok": True}} and hub.token == "t"
    again = Eraser.from_pretrained(hub.kept / "owner" / "name", tiny_backbone().model)
    assert again.settings == eraser.settings
    mine, theirs = eraser.parameters(), again.parameters()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(bool(value.any()) for value in mine.values())


def test_the_card_of_its_folder_goes_along(hub: Hub, tmp_path: Path) -> None:
    attach_random_eraser(tiny_backbone()).save_pretrained(tmp_path / "carded")
    (tmp_path / "carded" / "README.md").write_text("What it is, and what it can't do.\n")
    tiny_backbone().load_eraser(tmp_path / "carded").push_to_hub("owner/carded")
    attach_random_eraser(tiny_backbone()).push_to_hub("owner/bare")
    uploaded = {place.name: {file.name for file in place.iterdir()} for place in (hub.kept / "owner").iterdir()}
    assert uploaded["carded"] == uploaded["bare"] | {"README.md"}
    written = (hub.kept / "owner" / "carded" / "README.md").read_text()
    assert written == "What it is, and what it can't do.\n"


def test_a_hub_that_refuses_is_one_error(hub: Hub) -> None:
    with pytest.raises(EraserError, match=r"nameless \(ValueError: no owner\): check the name"):
        attach_random_eraser(tiny_backbone()).push_to_hub("nameless")
