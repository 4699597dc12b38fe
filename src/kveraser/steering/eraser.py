"""The eraser adapter: a plain PEFT LoRA, checked against the backbone before a single module is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kveraser.errors import EraserError
from kveraser.files import replacing
from kveraser.steering.layouts import LAYOUTS, unknown_layout

ADAPTER_NAME = "eraser"
SETTINGS_FILE = "kveraser.json"
EXTRAS_FILE = "kveraser.safetensors"
CARD_FILE = "README.md"
NOT_PLAIN = (
    "use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora",
    "velora_config", "kasa_config", "arrow_config", "alora_invocation_tokens",
)  # fmt: skip
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""PEFT initializations that leave the base model's weights unchanged. The others (pissa, olora, corda, loftq, ...) move
part of the weights into the adapter."""
ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
PAPER_MODULES = (*ATTENTION_MODULES, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class EraserSettings:
    """The layout and repair window of an eraser: `kveraser.json` beside the adapter, else the paper's.

    Attributes:
        layout: where the steering states sit, a name in `kveraser.steering.layouts.LAYOUTS`.
        repair: suffix tokens that are recomputed after the steering states.
        repair_per_span: further ones for every token of the span.
        slots: steering slots of `compact`.
    """

    layout: str = "keep"
    repair: int = 0
    repair_per_span: float = 0.0
    slots: int = 0

    def window(self, span: int) -> int:
        """Suffix tokens that are recomputed after a span of `span` tokens."""
        return self.repair + round(self.repair_per_span * span)

    def check(self, source: str) -> None:
        """Check the settings.

        Raises:
            EraserError: naming `source` and the setting.
        """
        problem = None
        if self.layout not in LAYOUTS:
            problem = unknown_layout(self.layout)
        elif type(self.repair) is not int or self.repair < 0:
            problem = f"repair is {self.repair!r}, but it must be a whole number of at least 0"
        elif type(self.repair_per_span) not in (int, float) or not 0 <= self.repair_per_span < inf:
            problem = f"repair_per_span is {self.repair_per_span!r}, but it must be at least 0"
        elif self.repair_per_span and not self.repair:
            problem = f"repair_per_span is {self.repair_per_span} with a repair of 0: give repair at least 1"
        elif type(self.slots) is not int or self.slots < 0 or (self.slots > 0) != LAYOUTS[self.layout].takes_slots:
            wanted = "1 or more" if LAYOUTS[self.layout].takes_slots else "none"
            problem = f"slots is {self.slots!r}: layout {self.layout} takes {wanted}"
        if problem is not None:
            raise EraserError(f"{source}: {problem}")


class Eraser:
    """A LoRA injected into a backbone and switched off; `active()` switches it on for one pass.

    The backbone's modules are changed in place (its linear layers are wrapped), so a model has one owner.

    Attributes:
        name: folder or hub id it came from.
        settings: the layout and repair window it was trained for.
        extras: parameters that its layout trains beside the LoRA: `slot_embeddings` `[slots, hidden]` (`compact`).
    """

    def __init__(
        self, model: Any, name: str, settings: EraserSettings, extras: dict[str, torch.Tensor] | None = None
    ) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model = model
        self.name = name
        self.settings = settings
        self.extras = {
            key: torch.nn.Parameter(tensor.to(model.device), requires_grad=False)
            for key, tensor in (extras or {}).items()
        }
        # PEFT's own switch walks every module of the model on each pass.
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self._layers:
            layer.forward = partial(_adapted, layer)
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
        """By name, the matrices (`lora_A` `[rank, in_features]`, `lora_B` `[out_features, rank]`) and `extras`."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if f".{ADAPTER_NAME}." in name} | self.extras

    @classmethod
    def from_pretrained(cls, source: str | Path, model: Any) -> Eraser:
        """Load a PEFT LoRA folder or hub id into `model`, which must not be in use by others.

        Raises:
            EraserError: missing or corrupt files, not a LoRA, NaN or infinite weights, or made for another backbone
                (the message says what differs). The model is untouched then.
        """
        folder = _folder_of(source)
        config, tensors, settings = _read(folder, str(source))
        extras = _read_extras(folder, str(source), settings, model)
        _check_fits(config, tensors, model, str(source))
        _inject(model, config, tensors)
        return cls(model, str(source), settings, extras)

    @classmethod
    def untrained(
        cls, model: Any, rank: int = 16, alpha: int = 32, settings: EraserSettings | None = None, seed: int = 0
    ) -> Eraser:
        """A LoRA of the paper's shape with B = 0: an erase with it writes the backbone's own states of the span.

        Training starts from it, and it costs what a trained one costs.

        Raises:
            EraserError: invalid settings.
        """
        from peft import LoraConfig

        settings = settings or EraserSettings()
        settings.check("untrained eraser")

        linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if _is_linear(module)}
        # Experts share one tensor a layer, which no plain LoRA fits.
        experts = any(parameter.dim() == 3 for parameter in model.parameters())
        wanted = ATTENTION_MODULES if experts else PAPER_MODULES
        decoder = set((model.get_decoder() or model).modules())
        # Vision towers never run.
        outside = [
            name
            for name, module in model.named_modules()
            if _is_linear(module) and module not in decoder and module is not model.get_output_embeddings()
        ]
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            # Models with fused projections (Phi-3, GPT-NeoX) name the same seven otherwise.
            target_modules=list(wanted) if set(wanted) <= linear else "all-linear",
            exclude_modules=outside or None,
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(model, config, None)
            embed = model.get_input_embeddings()
            shapes = LAYOUTS[settings.layout].extras(settings.slots, embed.weight.shape[1])
            # Random tokens of the model: the extras start as embeddings that it can read.
            extras = {
                key: embed(torch.randint(len(embed.weight), (count,)).to(model.device)).detach().float()
                for key, (count, _) in shapes.items()
            }
        return cls(model, f"untrained(rank={rank})", settings, extras)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the adapter as PEFT does (`adapter_config.json`, `adapter_model.safetensors`), plus `kveraser.json`.

        Args:
            dtype: of the written matrices; default: as they are. bfloat16 halves the file.
        """
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        # No embedding is adapted; without this PEFT asks the hub for the model's vocabulary.
        state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
        tensors = {f"base_model.model.{name}": value for name, value in state.items()}
        for name, content in (("adapter_model.safetensors", tensors), (EXTRAS_FILE, self.extras)):
            if content:
                ready = {key: value.detach().to("cpu", dtype).contiguous() for key, value in content.items()}
                with replacing(target / name) as temporary:
                    save_file(ready, temporary, metadata={"format": "pt"})
            else:
                # From an earlier eraser of another layout in this folder.
                (target / name).unlink(missing_ok=True)
        self.model.peft_config[ADAPTER_NAME].save_pretrained(str(target))
        with replacing(target / SETTINGS_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self.settings), indent=2) + "\n", encoding="utf-8")

    def push_to_hub(self, repo_id: str, private: bool = False, token: str | None = None) -> str:
        """Upload the adapter as plain PEFT files, with `kveraser.json` and the card of the folder it came from, if any.

        Args:
            repo_id: `owner/name`; the repository is made where there is none.
            private: of a new repository; an existing one stays as it is.
            token: a hub access token; None: the one `hf auth login` stored.

        Returns:
            The address of the repository.

        Raises:
            EraserError: the hub does not take it, or the files can't be written.
        """
        from huggingface_hub import HfApi

        card = Path(self.name) / CARD_FILE
        try:
            with TemporaryDirectory() as folder:
                self.save_pretrained(folder)
                if card.is_file():
                    copyfile(card, Path(folder) / CARD_FILE)
                hub = HfApi(token=token)
                address = hub.create_repo(repo_id, private=private, exist_ok=True)
                hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload eraser")
        except Exception as error:
            raise EraserError(
                f"can't upload the eraser to {repo_id} ({type(error).__name__}: {error}): check the name (owner/name), "
                "the token and the connection"
            ) from error
        return str(address)


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    # A hub id is owner/name; anything else is a folder.
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise EraserError(f"no eraser at {source}: give a folder written by PEFT or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["adapter_*", SETTINGS_FILE, EXTRAS_FILE]))
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
        # Checked before PEFT, whose message does not say why.
        start = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("init_lora_weights", True)
        if start not in KEEPS_BASE:
            raise EraserError(
                f"{source} is a LoRA with init_lora_weights={start!r}, which changes the base model's own weights, so "
                "that nothing would be exact with the eraser off: save it converted to a plain LoRA (PEFT's "
                "path_initial_model_for_weight_conversion)"
            )
        config = PeftConfig.from_pretrained(str(folder))
        settings_file = folder / SETTINGS_FILE
        fields = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
        if fields.get("layout", "keep") not in LAYOUTS:
            # Settings of a removed layout have unknown fields.
            raise EraserError(f"{source}, {SETTINGS_FILE}: {unknown_layout(fields['layout'])}")
        if fields.get("echoes") == 0:
            # Earlier versions wrote this setting of the removed layout for every layout.
            del fields["echoes"]
        settings = EraserSettings(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, ImportError) as error:
        raise EraserError(f"{source}: its configuration can't be read ({error}): copy the folder again") from error
    settings.check(f"{source}, {SETTINGS_FILE}")
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


def _read_extras(folder: Path, source: str, settings: EraserSettings, model: Any) -> dict[str, torch.Tensor]:
    """Parameters of the layout beside the LoRA, float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    hidden = model.get_input_embeddings().weight.shape[1]
    wanted = LAYOUTS[settings.layout].extras(settings.slots, hidden)
    if not wanted:
        return {}
    try:
        found = load_file(str(folder / EXTRAS_FILE))
    except (SafetensorError, OSError, ValueError) as error:
        raise EraserError(f"{source}: {EXTRAS_FILE} can't be read ({error}): copy the folder again") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted or not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise EraserError(f"{source}: {EXTRAS_FILE} holds {shapes}, layout {settings.layout} needs finite {wanted}")
    return {name: tensor.float() for name, tensor in found.items()}


def _adapted(layer: Any, states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """A LoRA layer's forward pass. Without gradients the update is added in place, in one product instead of PEFT's
    product, scaling and sum: `output += scaling * (states @ A^T) @ B^T`."""
    # Layers that only an earlier eraser adapted.
    adapted = ADAPTER_NAME in layer.lora_A and not layer.disable_adapters and not layer.merged
    plain = not torch.is_grad_enabled() and not layer.training and not arguments and not options
    if adapted and plain:
        down, up = layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME]
        plain = up.bias is None and states.dtype == down.weight.dtype == up.weight.dtype
    if not adapted or not plain:
        output: torch.Tensor = type(layer).forward(layer, states, *arguments, **options)
        return output
    output = layer.base_layer(states)
    rows = output.view(-1, output.shape[-1])
    rows.addmm_(down(states).view(-1, up.in_features), up.weight.t(), alpha=layer.scaling[ADAPTER_NAME])
    return output


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

    # An earlier eraser wraps the linear layers, which keep their names.
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
                differences.append(f"lora_{side} of {name} is {list(matrix.shape)} instead of {list(wanted)}")
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
    if tensors is not None:
        # Weights that are loaded need no initialization, and some change the base model.
        config.init_lora_weights = True
    inject_adapter_in_model(config, model, adapter_name=ADAPTER_NAME)
    if tensors is not None:
        plain = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
        loaded: Any = set_peft_model_state_dict(model, plain, adapter_name=ADAPTER_NAME)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
    model.eval()
