"""The eraser adapter: a plain PEFT LoRA, checked against the backbone before a single module is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kveraser.errors import EraserError

Layout = Literal["keep", "closed"]
LAYOUTS: tuple[Layout, ...] = ("keep", "closed")

ADAPTER_NAME = "eraser"
SETTINGS_FILE = "kveraser.json"
NOT_PLAIN = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication")
PAPER_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class EraserSettings:
    """What an eraser was trained for. Read from `kveraser.json` beside the adapter; the paper's values if absent."""

    layout: Layout = "keep"
    repair: int = 0


class Eraser:
    """A LoRA injected into a backbone and switched off; `active()` switches it on for one pass.

    The backbone's modules are changed in place (its linear layers are wrapped), so a model has one owner.

    Attributes:
        name: folder or hub id it came from.
        settings: the layout and repair window it was trained for.
    """

    def __init__(self, model: Any, name: str, settings: EraserSettings) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = model
        self.name = name
        self.settings = settings
        # PEFT's switch walks every module of the model; the list is made once so that a pass doesn't.
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._switch(False)

    def _switch(self, on: bool) -> None:
        for layer in self._layers:
            # Not enable_adapters(): it also flips requires_grad, which drops the gradients of a later backward().
            layer._disable_adapters = not on

    @contextmanager
    def active(self) -> Iterator[None]:
        """The adapter is on inside. The caller holds the backbone's lock."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The adapter's matrices by name: `lora_A` is `[rank, in_features]`, `lora_B` `[out_features, rank]`."""
        return {name: parameter for name, parameter in self.model.named_parameters() if f".{ADAPTER_NAME}." in name}

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Any) -> Eraser:
        """Load a PEFT LoRA folder or hub id into `model`, which must not be in use by others.

        Raises:
            EraserError: missing or corrupt files, not a LoRA, NaN or infinite weights, or made for another backbone
                (the message says what differs). The model is untouched then.
        """
        folder = _folder_of(source)
        config, tensors, settings = _read(folder, str(source))
        _check_fits(config, tensors, model, str(source))
        _inject(model, config, tensors)
        return cls(model, str(source), settings)

    @classmethod
    def untrained(
        cls, model: Any, rank: int = 16, alpha: int = 32, settings: EraserSettings | None = None, seed: int = 0
    ) -> Eraser:
        """A LoRA with the paper's shape and B = 0: erasing with it re-encodes the span as the backbone would.

        The starting point of training, and enough to measure what an erase costs.
        """
        from peft import LoraConfig

        linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)}
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            # Models that fuse projections (Phi-3, GPT-NeoX) carry other names for the same seven.
            target_modules=list(PAPER_MODULES) if set(PAPER_MODULES) <= linear else "all-linear",
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(model, config, None)
        return cls(model, f"untrained(rank={rank})", settings or EraserSettings())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does (`adapter_config.json`, `adapter_model.safetensors`), plus `kveraser.json`."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER_NAME)
        tensors = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        temporary = target / "adapter_model.safetensors.part"
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(target / "adapter_model.safetensors")
        self.model.peft_config[ADAPTER_NAME].save_pretrained(str(target))
        settings = target / f"{SETTINGS_FILE}.part"
        settings.write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")
        settings.replace(target / SETTINGS_FILE)


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    # A hub id is owner/name; anything else can only have been meant as a folder.
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise EraserError(f"no eraser at {source}: give a folder written by PEFT or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["adapter_*", SETTINGS_FILE]))
    except Exception as error:
        raise EraserError(
            f"no folder {source}, and the hub does not give it either ({type(error).__name__}): "
            "check the name, or the connection, or download the adapter and give its folder"
        ) from error


def _read(folder: Path, source: str) -> tuple[Any, dict[str, torch.Tensor], EraserSettings]:
    from peft import PeftConfig, PeftType
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise EraserError(f"{source} has no {name}: an eraser is a folder as PEFT's save_pretrained writes it")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        settings_file = folder / SETTINGS_FILE
        settings = EraserSettings(**json.loads(settings_file.read_text("utf-8"))) if settings_file.is_file() else None
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise EraserError(f"{source}: its configuration can't be read ({error}): copy the folder again") from error
    settings = settings or EraserSettings()
    if settings.layout not in LAYOUTS or type(settings.repair) is not int or settings.repair < 0:
        raise EraserError(f"{source}: {SETTINGS_FILE} holds {settings}: layout is keep or closed, repair a count >= 0")
    if config.peft_type != PeftType.LORA:
        raise EraserError(f"{source} is a {config.peft_type} adapter: an eraser is a LoRA")
    extras = [name for name in NOT_PLAIN if getattr(config, name, None)]
    if extras:
        raise EraserError(f"{source} is a LoRA with {extras[0]}: an eraser is a plain LoRA")
    if type(config.lora_alpha) not in (int, float):
        raise EraserError(f"{source}: its configuration can't be read (lora_alpha is {config.lora_alpha!r})")
    try:
        tensors = load_file(str(folder / "adapter_model.safetensors"))
    except (SafetensorError, OSError, ValueError) as error:
        raise EraserError(f"{source}: adapter_model.safetensors is corrupt ({error}): copy it again") from error
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise EraserError(
            f"{source}: {len(broken)} matrices hold NaN or infinity, the first is {broken[0]}: "
            "take an earlier checkpoint of its training"
        )
    return config, tensors, settings


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _features(module: Any) -> tuple[int, int]:
    if type(module).__name__ == "Conv1D":
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def _check_fits(config: Any, tensors: dict[str, torch.Tensor], model: Any, source: str) -> None:
    """Compare every matrix with the module it is for, before anything is injected."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    # Under an earlier eraser the linear layers are wrapped, and keep their names.
    modules = {
        name.removesuffix(".base_layer"): module for name, module in model.named_modules() if ".lora_" not in name
    }
    targets = [name for name in modules if check_target_module_exists(config, name)]
    differences: list[str] = []
    matrices: dict[tuple[str, str], torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight", key)
        name, side = match.groups() if match else ("", "")
        if match is None or tensor.dim() != 2:
            differences.append(f"{key} is not a LoRA matrix")
        elif name not in modules:
            differences.append(f"the backbone has no {name}")
        elif name not in targets:
            differences.append(f"the adapter's configuration does not target {name}")
        matrices[name, side] = tensor
    for name in targets:
        if not _is_linear(modules[name]):
            differences.append(f"the backbone's {name} is not a linear layer")
            continue
        in_features, out_features = _features(modules[name])
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
        for side, wanted in (("A", (rank, in_features)), ("B", (out_features, rank))):
            matrix = matrices.get((name, side))
            if matrix is None:
                differences.append(f"the adapter has no lora_{side} for {name}")
            elif tuple(matrix.shape) != wanted:
                differences.append(f"lora_{side} of {name} is {list(matrix.shape)}, and should be {list(wanted)}")
    if not tensors:
        differences.append("the adapter is empty")
    if differences:
        made_for = getattr(config, "base_model_name_or_path", None) or "an unnamed model"
        more = f" (and {len(differences) - 3} more differences)" if len(differences) > 3 else ""
        raise EraserError(
            f"{source} (made for {made_for}) does not fit the backbone {model.config.name_or_path or 'in use'}: "
            + "; ".join(differences[:3])
            + more
            + ". Load the backbone it was trained for, or train one for this."
        )


def _inject(model: Any, config: Any, tensors: dict[str, torch.Tensor] | None) -> None:
    from peft import inject_adapter_in_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    if getattr(model, "peft_config", None):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(ADAPTER_NAME)
        # PEFT warns of a second adapter where it finds the attribute.
        del model.peft_config
    config.inference_mode = False
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    if tensors is not None:
        plain = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        loaded: Any = set_peft_model_state_dict(model, plain, adapter_name=ADAPTER_NAME)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    model.eval()
