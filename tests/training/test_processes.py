"""Two processes train as one does, with whole and with sharded backbones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kveraser.training.log import LOG
from kveraser.training.loop import BEST, CHECKPOINT, train
from kveraser.training.processes import Processes
from kveraser.training.recipe import load_recipe
from tests.training.test_loop import write_short_cases


def write_recipe(folder: Path, model: str, output: str) -> Path:
    write_short_cases(folder / "cases.jsonl")
    # Three cases a step and five held out: no number of processes deals them evenly.
    fields: dict[str, Any] = {
        "backbone": model, "data": "cases.jsonl", "output": output, "layout": "closed", "repair": 3,
        "adapter": {"rank": 2, "alpha": 4}, "evaluation": {"cases": 5, "every_steps": 2},
        "optimizer": {
            "cases_per_step": 3, "cases_per_batch": 2, "learning_rate": 0.02, "warmup_steps": 1
        },
        "epochs": 2,
    }  # fmt: skip
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def launch(*recipes: Path) -> str:
    """Train by recipes in two processes; returns what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.launched", *map(str, recipes)],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def curves(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / LOG).read_text("utf-8").splitlines()]


def test_two_processes_have_the_curves_of_one(model: str, tmp_path: Path) -> None:
    train(load_recipe(write_recipe(tmp_path, model, "one")))
    resumed = write_recipe(tmp_path, model, "resumed")
    train(load_recipe(resumed), stop=1)
    said = launch(write_recipe(tmp_path, model, "whole"), write_recipe(tmp_path, model, "sharded"), resumed)
    # Nine weights and norms in each of three layers, of which the last stays whole; in two processes.
    assert sorted(re.findall(r"sharded weights: (\d+)\n", said)) == ["0", "0", "0", "0", "18", "18"]
    expected = curves(tmp_path / "one")
    losses = [line["loss"] for line in expected]
    assert min(losses) > 0.05 and max(losses) - min(losses) > 0.01
    for name in ("whole", "sharded", "resumed"):
        seen = curves(tmp_path / name)
        for key in ("step", "loss", "learning_rate", "kl", "fidelity"):
            values = [[line[key] for line in lines if line[key] is not None] for lines in (seen, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
        adapters = [torch.load(tmp_path / run / CHECKPOINT)["adapter"] for run in (name, "one")]
        assert max(float((adapters[0][key] - adapters[1][key]).abs().max()) for key in adapters[1]) < 1e-3
        assert (tmp_path / name / BEST / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_cover_all_places_once_and_evenly(count: int) -> None:
    processes = Processes()
    processes.count = count
    for places in (0, 1, 5, 16):
        shares = [processes.share(places, index) for index in range(count)]
        assert [place for share in shares for place in share] == list(range(places))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
