"""Hardware and versions for result files."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kveraser.model.backbone import Backbone


def environment(backbone: Backbone) -> dict[str, Any]:
    """Backbone, eraser, hardware and versions, as plain values."""
    import transformers

    from kveraser import __version__

    eraser = backbone.eraser
    return {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "eraser": None if eraser is None else {"name": eraser.name, **asdict(eraser.settings)},
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else None,
        "commit": commit(),
        "versions": {
            "kveraser": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _processor() -> str | None:
    """The processor's model, where the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or None)


def _memory_gib() -> float | None:
    """The machine's memory, where the system reports it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is installed."""
    source = Path(__file__)
    try:
        git = partial(subprocess.run, cwd=source.parent, capture_output=True, text=True, check=True)
        # An installed package may lie inside somebody else's repository.
        git(["git", "ls-files", "--error-unmatch", source.name])
        return str(git(["git", "rev-parse", "HEAD"]).stdout).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
