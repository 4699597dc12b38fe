"""With the base dependencies alone the library erases and audits; what needs more says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kveraser.errors import EXTRAS

ROOT = Path(__file__).parent.parent
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Blocked())
"""
USE = """
import kveraser
assert "torch" not in sys.modules
from tests.tiny import tiny_backbone
session = kveraser.Session(tiny_backbone(), text="The ship left at noon. The captain is Ada. The crew trusts her.")
session.erase("The captain is Ada.", "repair(4)", force=True)
assert session.audit(["Who is the captain?"]).kl is not None
assert session.replace("The ship left at noon.", "It sailed.", "recompute").exact
assert not {names} & set(sys.modules)
try:
    kveraser.train
except kveraser.KVEraserError as error:
    print(error)
"""


COMMAND = "import runpy; sys.argv = ['kveraser', {}]; runpy.run_module('kveraser', run_name='__main__')"


def run(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Python with `blocked` packages missing."""
    names = repr(set(blocked))
    program = BLOCKED.replace("{names}", names).replace("{{", "{").replace("}}", "}") + code.replace("{names}", names)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


BROUGHT = {"typer", "rich", "yaml", "accelerate", "regex"}
"""Installed with transformers and peft."""


def test_the_library_erases_audits_and_replaces_without_extras() -> None:
    ended = run(USE, *(set(EXTRAS) - BROUGHT))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "pydantic is not installed: pip install 'kveraser[cli]'"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_line_says_what_to_install(package: str) -> None:
    ended = run(COMMAND.format("'methods'"), package)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.strip() == f"kveraser: {package} is not installed: pip install 'kveraser[cli]'"


def test_a_command_says_what_to_install() -> None:
    ended = run(COMMAND.format("'evaluate', 'nowhere.jsonl'"), "pydantic")
    assert ended.returncode == 1 and "pydantic is not installed: pip install 'kveraser[cli]'" in ended.stderr
    assert ended.stderr.count("\n") == 1
