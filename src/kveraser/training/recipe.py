"""A training recipe: one YAML file with all settings of a run."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kveraser.errors import InputError
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.steering.eraser import EraserSettings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterSettings(_Strict):
    """Shape of the LoRA; the default is the paper's."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)


class OptimizerSettings(_Strict):
    """AdamW with warm-up, and decay to `final_fraction` of the learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    cases_per_step: int = Field(default=4, ge=1, description="Cases per step, over all processes and batches.")
    cases_per_batch: int = Field(default=1, ge=1, description="Most cases of one shape per batch.")
    shape_multiple: int = Field(
        default=1, ge=1, description="Cut cases so that more have a common shape, see `batches.trimmed`; 1: no cut."
    )


class EvaluationSettings(_Strict):
    """Held-out evaluation during training; the eraser with the lowest KL is saved as the best."""

    data: str | None = Field(default=None, description="Held-out case file; None: the end of the training file.")
    cases: int = Field(default=24, ge=1, description="The first cases of `data`, or the last of the training file.")
    every_steps: int = Field(default=50, ge=1)


class Recipe(_Strict):
    """Settings of a training run. The number of processes is set by the launcher and does not change the numbers.

    Attributes:
        backbone: bundled name, folder or hub id.
        precision: dtype of the frozen backbone: `float32`, `bfloat16`, or `auto` (bfloat16 on CUDA, float32 on a CPU).
            Adapter, optimizer and objective are always float32.
        data: case file, as written by `kveraser data build`.
        output: folder for checkpoints, the best eraser and the log.
        layout, repair, repair_per_span, slots: how the eraser is used, as in `EraserSettings`.
        objective: `kl` distills the exact reference, `ce` is the paper's cross-entropy, `both` is their sum.
        no_harm_weight: weight of answer tokens of queries that do not depend on the span.
        epochs: passes over the training cases.
        prepared_gigabytes: disk space in the output folder for prefilled states and exact references, which later
            epochs reuse; deleted at the end of the run. 0 stores nothing.
        max_minutes: time limit, after which the run is evaluated and saved. The learning rate schedule follows steps
            or time, whichever is further, so such a run depends on the machine's speed and is not reproducible bit for
            bit. None: no limit.
        initial: eraser to start from, such as the best one of stage 1; None: an untrained LoRA. A path that begins with
            a dot is relative to the recipe.
        checkpoint_minutes: time between checkpoints.
        seed: of the initial adapter and the order of cases.
    """

    backbone: str = DEFAULT_BACKBONE
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    data: str
    output: str
    layout: str = "keep"
    repair: int = Field(default=0, ge=0)
    repair_per_span: float = Field(default=0.0, ge=0)
    slots: int = Field(default=0, ge=0)
    objective: Literal["kl", "ce", "both"] = "kl"
    no_harm_weight: float = Field(default=1.0, ge=0)
    epochs: int = Field(default=1, ge=1)
    prepared_gigabytes: float = Field(default=20.0, ge=0)
    max_minutes: float | None = Field(default=None, gt=0)
    initial: str | None = None
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    seed: int = 42
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def settings(self) -> EraserSettings:
        """Settings that the eraser is trained for.

        Raises:
            EraserError: they are invalid, such as layout `compact` without slots.
        """
        settings = EraserSettings(self.layout, self.repair, self.repair_per_span, self.slots)
        settings.check("recipe")
        return settings

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all settings that change the numbers, hex; a checkpoint resumes only under an equal one."""
        fields = self.model_dump_json(exclude={"output", "checkpoint_minutes", "prepared_gigabytes"})
        return hashlib.sha256(fields.encode()).hexdigest()


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Make a recipe of its fields, or of a file (see `load_recipe`); paths in given fields are not changed.

    Raises:
        InputError: an unknown key (with the nearest valid one), a wrong type, or an unreadable file.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return load_recipe(recipe) if isinstance(recipe, str | Path) else _checked(dict(recipe), "the recipe")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; relative paths in it are relative to its folder.

    Raises:
        InputError: the file is missing or not YAML, an unknown key (with the nearest valid one), or a wrong type.
    """
    source = Path(path)
    try:
        content: Any = yaml.safe_load(source.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"can't read the recipe {source} ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is not YAML ({' '.join(str(error).split())}): fix that line") from error
    recipe = _checked(content, str(source))
    places: dict[str, Any] = {name: _relative(source, getattr(recipe, name)) for name in ("data", "output")}
    if recipe.initial is not None and recipe.initial.startswith("."):
        places["initial"] = _relative(source, recipe.initial)
    if recipe.evaluation.data is not None:
        held_out = _relative(source, recipe.evaluation.data)
        places["evaluation"] = recipe.evaluation.model_copy(update={"data": held_out})
    return recipe.model_copy(update=places)


def _checked(content: Any, source: str) -> Recipe:
    if not isinstance(content, dict):
        raise InputError(f"{source} holds {type(content).__name__}, not a mapping: write one `key: value` per line")
    try:
        return Recipe(**content)
    except (ValidationError, TypeError) as error:
        raise InputError(f"{source}: {_explain(error)}") from error


def _relative(source: Path, place: str) -> str:
    return str(source.parent / place) if not Path(place).is_absolute() else place


def _explain(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"{error}: keys must be strings"
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{where} is {first.get('input')!r}: {first['msg']}"
    model: type[BaseModel] = Recipe
    for part in first["loc"][:-1]:
        model = model.model_fields[str(part)].annotation  # type: ignore[assignment]
    near = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(model.model_fields)}"
    return f"unknown key {where!r}: {known}"
