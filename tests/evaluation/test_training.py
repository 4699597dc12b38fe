"""The training benchmark: both loops arrive at the same gradients, so that their times can be compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from evaluation.training import BenchSettings, engine, naive, passages, run, to_json
from kveraser.errors import EraserError, InputError
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import EraserSettings
from kveraser.training.batches import batches, tokenized
from kveraser.training.cases import CaseSizes
from kveraser.training.span_neighbor import span_neighbor_cases
from tests.tiny import attach_random_eraser, tiny_backbone

SMALL = BenchSettings(cases=3, cases_per_batch=3, shape_multiple=64, context=(40, 50), span=(10, 12), repeats=2)


def gradients(backbone: Backbone) -> dict[str, torch.Tensor]:
    parameters = backbone.require_eraser().parameters()
    taken = {name: one.grad.clone() for name, one in parameters.items() if one.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return taken


def test_both_loops_take_the_same_gradients() -> None:
    backbone, settings = tiny_backbone(), EraserSettings("closed", 4)
    for parameter in attach_random_eraser(backbone, settings=settings).parameters().values():
        parameter.requires_grad_(True)
    made = span_neighbor_cases(passages(1), 3, 1, CaseSizes(SMALL.context, SMALL.span))
    cases = list(tokenized(backbone, made))
    # Two of one shape, with as many queries as there are, and fewer.
    cases.append(replace(cases[0], id="again", queries=cases[0].queries[1:], kinds=cases[0].kinds[1:]))
    assert len(batches(cases, 3)) < len(cases)
    engine(backbone, cases, settings, 3, 2)
    together = gradients(backbone)
    naive(backbone, cases, settings, 2)
    alone = gradients(backbone)
    assert together.keys() == alone.keys() and together
    largest = max(float(one.abs().max()) for one in alone.values())
    assert max(float((together[name] - alone[name]).abs().max()) for name in alone) < 1e-4 * largest


def test_rows_agree_with_what_was_run() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    rounds: list[str] = []
    rows, ratio = run(backbone, SMALL, rounds.append)
    assert [(row.loop, row.queries) for row in rows] == [("engine", 24), ("naive", 24)]
    assert [name.split(":")[0] for name in rounds] == ["engine", "naive"] * 3
    for row in rows:
        assert row.queries_per_second == pytest.approx(row.queries / row.seconds)
    result = to_json(rows, ratio, backbone, SMALL)
    assert result["ratio"] == ratio and result["eraser"]["layout"] == "keep"
    assert gradients(backbone) == {}


def test_the_text_is_generated_and_seeded() -> None:
    assert passages(1) == passages(1) != passages(2)
    assert len(set(passages(1))) == len(passages(1))


def test_what_can_not_be_measured_is_refused() -> None:
    backbone = tiny_backbone()
    with pytest.raises(EraserError, match="no eraser"):
        run(backbone, SMALL)
    with pytest.raises(InputError, match="at least 1"):
        run(backbone, replace(SMALL, repeats=0))
