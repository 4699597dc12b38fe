"""What a result file says of where it was measured."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from kveraser.backbone import Backbone


def environment(backbone: Backbone) -> dict[str, Any]:
    """Backbone, eraser, hardware and versions, as plain values."""
    import transformers

    from kveraser import __version__

    eraser = backbone.eraser
    return {
        "backbone": backbone.name,
        "eraser": None if eraser is None else {"name": eraser.name, **asdict(eraser.settings)},
        "dtype": str(backbone.model.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {
            "kveraser": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
