"""What a result says of where it was measured: above all the commit of the code that measured it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kveraser.measure import environment as module
from kveraser.measure.environment import commit, environment
from kveraser.model.backbone import Backbone
from tests.tiny import attach_random_eraser, tiny_backbone


def git(folder: Path, *arguments: str) -> str:
    named = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *named, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the page that asks, in a folder of its own; the page believes to be that one."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    copy = tmp_path / "checkout" / "src" / "environment.py"
    copy.parent.mkdir(parents=True)
    shutil.copy(module.__file__, copy)
    monkeypatch.setattr(module, "__file__", str(copy))
    return copy


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_the_head_of_the_checkout(page: Path) -> None:
    assert commit() is None
    checkout = page.parents[1]
    git(checkout, "init")
    (checkout / "other.txt").write_text("other")
    git(checkout, "add", "other.txt")
    git(checkout, "commit", "-m", "somebody else's repository")
    # As a package that is installed inside of another project is.
    assert commit() is None
    git(checkout, "add", "src")
    git(checkout, "commit", "-m", "a checkout")
    head = git(checkout, "rev-parse", "HEAD")
    assert commit() == head and len(head) == 40
    git(checkout, "commit", "--allow-empty", "-m", "the next")
    assert commit() == git(checkout, "rev-parse", "HEAD") != head


def test_without_git_there_is_no_commit(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(page.parent))
    assert commit() is None


def test_it_says_what_was_measured_and_by_what(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "commit", lambda: "c0ffee")
    plain, erasing = environment(backbone), tiny_backbone()
    attach_random_eraser(erasing)
    said = environment(erasing)
    assert (plain["backbone"], plain["eraser"], plain["dtype"]) == ("tiny-llama", None, "float32")
    assert plain["backbone_fingerprint"] == backbone.fingerprint
    assert (plain["device"], plain["threads"], plain["commit"]) == ("cpu", torch.get_num_threads(), "c0ffee")
    assert plain["versions"]["torch"] == torch.__version__
    assert erasing.eraser is not None and said["eraser"]["name"] == erasing.eraser.name
    assert said["eraser"]["layout"] == erasing.eraser.settings.layout
    assert json.loads(json.dumps(said)) == said
