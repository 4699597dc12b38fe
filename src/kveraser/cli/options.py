"""Options shared by several commands, and loading of the backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kveraser.cli.console import bar

if TYPE_CHECKING:
    from kveraser.model.backbone import Backbone

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
Model = Annotated[str, typer.Option(help="Hub id, folder, or the bundled smollm2-135m-instruct.")]
EraserOption = Annotated[
    str, typer.Option(help="PEFT LoRA folder or hub id, shipped (the bundled model's own), or none.")
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if available, else cpu.")]
Dtype = Annotated[str | None, typer.Option(help="Default: bfloat16 on cuda, float32 on cpu.")]

DEFAULT_MODEL = "smollm2-135m-instruct"
SHIPPED, NO_ERASER = "shipped", "none"


def load_backbone(model: str, eraser: str = SHIPPED, device: str | None = None, dtype: str | None = None) -> Backbone:
    """Load a backbone; shows a progress bar if the bundled one must be converted first."""
    quiet()
    from kveraser.model.backbone import Backbone

    if model == DEFAULT_MODEL:
        from kveraser.model.bundled import bundled_backbone_folder

        with bar(total=1.0) as advance:
            bundled_backbone_folder(lambda step, fraction: advance(step, fraction))
    return Backbone.load(model, device=device, dtype=dtype, eraser=eraser_named(eraser))


def eraser_named(option: str) -> str | None:
    """Convert the value of `--eraser` to the argument of `Backbone.load`: `none` becomes None."""
    return None if option == NO_ERASER else option


def quiet() -> None:
    """Disable progress bars and warnings of transformers and huggingface_hub."""
    import logging

    from transformers.utils import logging as transformers

    transformers.disable_progress_bar()
    transformers.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
