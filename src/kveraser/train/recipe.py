"""A training recipe: one YAML file says everything that a run needs, and nothing else does."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kveraser.backbone import DEFAULT_BACKBONE
from kveraser.eraser import Layout
from kveraser.errors import InputError


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AdapterSettings(_Strict):
    """The LoRA: the paper's shape by default."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)


class OptimizerSettings(_Strict):
    """AdamW with a warm-up and a decay to `final_fraction` of the learning rate."""

    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    schedule: Literal["cosine", "linear"] = "cosine"
    final_fraction: float = Field(default=0.05, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0)
    cases_per_step: int = Field(default=4, ge=1, description="Cases whose gradients are added up before a step.")


class EvaluationSettings(_Strict):
    """Held-out evaluation during training; the checkpoint with the lowest KL is kept as the best."""

    cases: int = Field(default=24, ge=1, description="Cases taken from the end of the case file, never trained on.")
    every_steps: int = Field(default=50, ge=1)


class Recipe(_Strict):
    """One training run.

    Attributes:
        backbone: bundled name, folder or hub id.
        data: case file that `kveraser data build` wrote.
        output: folder of the run: checkpoints, the best eraser, the log.
        layout, repair: what the eraser is trained for.
        objective: `kl` distils the exact reference, `ce` is the paper's, `both` their sum.
        no_harm_weight: weight of answer tokens of queries the span never touched.
        epochs: passes over the training cases.
        initial: eraser to start from (stage 2 starts from stage 1); None: B = 0.
        checkpoint_minutes: how often to write a checkpoint.
        seed: of the initial adapter and the order of cases.
    """

    backbone: str = DEFAULT_BACKBONE
    data: str
    output: str
    layout: Layout = "keep"
    repair: int = Field(default=0, ge=0)
    objective: Literal["kl", "ce", "both"] = "kl"
    no_harm_weight: float = Field(default=1.0, ge=0)
    epochs: int = Field(default=1, ge=1)
    initial: str | None = None
    checkpoint_minutes: float = Field(default=3.0, gt=0)
    seed: int = 42
    adapter: AdapterSettings = AdapterSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that shapes the run's numbers, hex: a checkpoint resumes only under the same."""
        fields = self.model_dump_json(exclude={"output", "checkpoint_minutes"})
        return hashlib.sha256(fields.encode()).hexdigest()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; relative paths in it are relative to its folder.

    Raises:
        InputError: missing, not YAML, an unknown key (with the nearest valid one) or a wrong type.
    """
    source = Path(path)
    try:
        content: Any = yaml.safe_load(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"can't read the recipe {source} ({error.strerror}): check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is not YAML ({' '.join(str(error).split())}): fix that line") from error
    if not isinstance(content, dict):
        raise InputError(f"{source} holds {type(content).__name__}, not a mapping: write one `key: value` a line")
    try:
        recipe = Recipe(**content)
    except (ValidationError, TypeError) as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    places = {name: _relative(source, getattr(recipe, name)) for name in ("data", "output")}
    return recipe.model_copy(update=places)


def _relative(source: Path, place: str) -> str:
    return str(source.parent / place) if not Path(place).is_absolute() else place


def _explain(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"{error}: keys are texts"
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
