"""The eraser that ships with the bundled backbone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kveraser import Session
from kveraser.measure.case import ALL
from kveraser.measure.probes import Probe
from kveraser.measure.rows import AXES
from kveraser.model.backbone import SHIPPED_ERASER, Backbone
from kveraser.model.bundled import MODEL_NAME, shipped_eraser_folder
from kveraser.steering.eraser import EraserSettings

MOST_BYTES = 12_000_000

BEFORE = "The harbour office opens at eight. The ferry to the island leaves from the second pier. "
SPAN = "The captain of the ferry is Odile Marchetti, and she lives in Trieste with her two brothers. "
AFTER = (
    "Her crew says that the winters in that city are windy. The brothers of the captain repair nets. Tickets are sold "
    "on board, and children travel free. The last ferry comes back at nine in the evening, when the lamps are lit. "
)


@pytest.fixture(scope="module")
def backbone() -> Iterator[Backbone]:
    yield Backbone.load(MODEL_NAME)


def test_it_is_small_and_in_bfloat16() -> None:
    folder = shipped_eraser_folder(MODEL_NAME)
    assert folder is not None
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_other_backbones_have_none() -> None:
    assert shipped_eraser_folder("owner/model") is None
    assert shipped_eraser_folder("../smollm2-135m-instruct") is None


@pytest.mark.backbone
def test_it_is_loaded_unless_told_otherwise_and_touches_the_span_alone(backbone: Backbone) -> None:
    assert backbone.eraser is not None and backbone.eraser.name == SHIPPED_ERASER
    assert backbone.eraser.settings == EraserSettings("keep")
    session = Session(backbone, text=BEFORE + SPAN + AFTER)
    before = [state.clone() for pair in session.cache.read(0, session.cache.length) for state in pair]
    receipt = session.erase(SPAN, "kveraser")
    ((start, end),) = receipt.spans
    after = [state for pair in session.cache.read(0, session.cache.length) for state in pair]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, :start], new[:, :, :start]) and torch.equal(old[:, :, end:], new[:, :, end:])
        assert not torch.equal(old[:, :, start:end], new[:, :, start:end])
    assert Backbone.load(MODEL_NAME, eraser=None).eraser is None


@pytest.mark.backbone
def test_it_was_trained_not_only_made(backbone: Backbone) -> None:
    matrices = backbone.require_eraser().parameters()
    assert any(bool(matrix.any()) for name, matrix in matrices.items() if "lora_B" in name)


@pytest.mark.backbone
def test_it_undoes_most_of_what_the_span_did(backbone: Backbone) -> None:
    probes = [
        Probe("Where does the captain's family live?", answer="They live in a windy city."),
        Probe("What do the brothers of the captain do?", answer="The brothers repair nets."),
        Probe("When does the last ferry come back?", answer="It comes back at nine in the evening."),
    ]
    session = Session(backbone, text=BEFORE + SPAN + AFTER)
    session.erase(SPAN, method="kveraser")
    audit = session.audit(probes)
    assert audit.kl is not None and audit.kl_unerased is not None
    assert 0 < audit.kl < audit.kl_unerased / 2


def test_it_is_the_best_of_those_that_leave_the_rest_of_the_cache_untouched() -> None:
    result = json.loads((Path(__file__).parent.parent.parent / "docs/results/heldout.json").read_text("utf-8"))
    everywhere = [row for row in result["rows"] if all(row[axis] == ALL for axis in AXES if axis != "suite")]
    kl = {row["method"].partition("(")[0]: row["kl"] for row in everywhere if row["suite"] == "heldout"}
    assert kl["recompute"] < 1e-6 < kl["kveraser"] < min(kl["mask"], kl["zero_value"], kl["blank"]) < kl["none"]


def test_its_card_says_how_it_was_made() -> None:
    folder = shipped_eraser_folder(MODEL_NAME)
    assert folder is not None
    card = (Path(folder) / "README.md").read_text("utf-8")
    assert card.startswith("---\n") and "base_model:" in card and "library_name: peft" in card
    for heading in ("## Data", "## Training", "## Results", "## Limits"):
        assert heading in card
