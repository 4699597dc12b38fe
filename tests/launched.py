"""What torchrun runs for `test_processes`: it trains by every recipe named, as `python -m kveraser train` does.

A recipe whose name says `sharded` is trained under FSDP; how many weights were really sharded is printed. One whose
name says `resumed` goes on from its checkpoint.
"""

from __future__ import annotations

import os
import runpy
import sys

from torch.distributed.tensor import DTensor

from kveraser.model.backbone import Backbone
from kveraser.training.processes import Processes

shard = Processes.shard


def counted(self: Processes, backbone: Backbone) -> None:
    shard(self, backbone)
    count = sum(isinstance(weight, DTensor) for weight in backbone.model.parameters())
    # One write: what two processes print into one pipe by pieces comes out mixed.
    os.write(1, f"\nsharded weights: {count}\n".encode())


if __name__ == "__main__":
    Processes.shard = counted  # type: ignore[method-assign]
    for recipe in sys.argv[1:]:
        os.environ["ACCELERATE_USE_FSDP"] = str("sharded" in recipe)
        sys.argv = ["kveraser", "train", recipe, *(["--resume"] if "resumed" in recipe else [])]
        try:
            runpy.run_module("kveraser", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
