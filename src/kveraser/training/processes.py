"""Training in one process or several: each takes a share of the cases, and gradients are summed.

Every process holds the whole adapter and its optimizer, because they are small. Gradients are summed once per step, so
a process may run any number of batches of any shapes, or none. Under FSDP (`accelerate launch --use_fsdp`) the layers
of the frozen backbone are sharded as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, reduce

from kveraser.errors import BackboneError
from kveraser.model.backbone import Backbone


class Processes:
    """This process among those that were launched together (`accelerate launch`, `torchrun`), or alone.

    Attributes:
        device: device of this process.
        main: whether this process logs and saves.
        lockstep: whether all processes must run the same number of passes.
    """

    def __init__(self) -> None:
        state = PartialState(cpu=not torch.cuda.is_available())
        # accelerate numbers the CPU ("cpu:0") under torchrun, a device that `torch.load` can't map to.
        self.device = torch.device("cpu") if state.device.type == "cpu" else state.device
        self.count: int = state.num_processes
        self.index: int = state.process_index
        self.main: bool = state.is_main_process
        # Read from the environment, because accelerate's state does not report FSDP on a CPU.
        self.lockstep: bool = self.count > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")

    def share(self, count: int, index: int | None = None) -> range:
        """Return the indices below `count` of a process (default: this one), split as evenly as possible."""
        index = self.index if index is None else index
        return range(count * index // self.count, count * (index + 1) // self.count)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values over all processes, with the same bits in each."""
        if self.count == 1:
            return values
        total: torch.Tensor = reduce(values, reduction="sum")
        return total

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum gradients over all processes; a parameter without a gradient in any process keeps none."""
        if self.count == 1:
            return
        parts = [parameter.new_zeros(parameter.numel() + 1) for parameter in parameters]
        for part, parameter in zip(parts, parameters, strict=True):
            if parameter.grad is not None:
                part[:-1], part[-1] = parameter.grad.flatten(), 1
        sums = self.sum(torch.cat(parts)).split([part.numel() for part in parts])
        for part, parameter in zip(sums, parameters, strict=True):
            parameter.grad = part[:-1].view_as(parameter) if part[-1] else None

    def shard(self, backbone: Backbone) -> None:
        """Under FSDP, shard the frozen weights of the decoder layers over the processes; the adapter stays whole.

        The last layer stays whole too: in the steering pass only its keys and values are used, so its output gets no
        gradient, and FSDP would wait for one before gathering the weights again.

        Raises:
            BackboneError: the model's list of decoder layers is not found.
        """
        if not self.lockstep:
            return
        from torch.distributed.fsdp import fully_shard

        layers = next(
            (
                module
                for module in backbone.model.base_model.children()
                if isinstance(module, torch.nn.ModuleList) and len(module) == backbone.layers
            ),
            None,
        )
        if layers is None:
            raise BackboneError(f"{backbone.name} has no list of decoder layers to shard: train it without FSDP")
        adapter = set(backbone.require_eraser().parameters().values())
        for layer in layers[:-1]:
            fully_shard(layer, ignored_params=adapter & set(layer.parameters()), reshard_after_forward=True)
