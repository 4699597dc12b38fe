"""The backbone: a frozen language model and its tokenizer, an optional eraser, and the forward passes over a cache."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.cache.rotation import Rotation, detect, fixed_frequencies_end
from kveraser.errors import (
    BackboneError,
    ContextLengthError,
    EraserError,
    InputError,
    KVEraserError,
    UnsupportedModelError,
)
from kveraser.model.attention import SHARED_HEADS, share_heads
from kveraser.model.support import check_config, check_model, check_tokenizer, load_error
from kveraser.steering.eraser import Eraser
from kveraser.text.tokenized import encode

DEFAULT_BACKBONE = "smollm2-135m-instruct"
SHIPPED_ERASER = "shipped"
PREFILL_CHUNK = 512

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""


class Backbone:
    """A frozen full-attention decoder with its tokenizer.

    One model in memory serves both roles: it answers as it is, and with its eraser switched on inside `erasing()` it
    writes steering states. All passes hold one lock, since the switch is state on the modules.

    Args:
        model: a causal language model of transformers, in eval mode from here on.
        tokenizer: its fast tokenizer.
        name: how to call it in messages and files.

    Raises:
        UnsupportedModelError: a layer type whose cache can't be edited exactly.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        self.name = name or model.config.name_or_path or type(model).__name__
        check_model(model, self.name)
        check_tokenizer(tokenizer, self.name)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.eraser: Eraser | None = None
        self.lock = threading.RLock()
        self.fingerprint = _fingerprint(model)
        config = model.config.get_text_config(decoder=True)
        self.layers: int = config.num_hidden_layers
        check_cached_equals_uncached(self.model, self.layers, self.name)
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._fixed_end = fixed_frequencies_end(config)
        if self._fixed_end is not None:
            self.max_positions = min(self.max_positions or self._fixed_end, self._fixed_end)
        self._chunk: int | None = None
        self._between: Callable[[], None] | None = None
        self._vocabulary: int = model.get_input_embeddings().num_embeddings
        self.keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        name: str | Path = DEFAULT_BACKBONE,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        eraser: str | Path | None = SHIPPED_ERASER,
    ) -> Backbone:
        """Load a backbone by hub id, folder, or the bundled name `smollm2-135m-instruct`.

        Args:
            device: default `cuda` where there is one, else `cpu`.
            dtype: default bfloat16 on CUDA, float32 on CPU.
            eraser: PEFT LoRA folder or hub id to load with it; `shipped`: the one that comes with kveraser for this
                backbone, if there is one; None: none.

        Raises:
            BackboneError: not found, or not readable as a causal language model.
            UnsupportedModelError: its layers can't be edited exactly.
            EraserError: the eraser can't be loaded or is for another backbone.
        """
        from transformers import AutoConfig, AutoTokenizer

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        chosen = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
        if isinstance(chosen, str):
            resolved = getattr(torch, chosen, None)
            if not isinstance(resolved, torch.dtype):
                raise BackboneError(f"no dtype {chosen!r}: use float32, bfloat16 or float16")
            chosen = resolved
        source = str(name)
        if source == DEFAULT_BACKBONE:
            from kveraser.model.bundled import bundled_backbone_folder

            source = str(bundled_backbone_folder())
        try:
            # Refusals come before weights are fetched.
            auto_class = check_config(AutoConfig.from_pretrained(source), str(name))
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = auto_class.from_pretrained(source, dtype=chosen)
            model = model.to(device)
            share_heads(model)
        except KVEraserError:
            raise
        except Exception as error:
            raise load_error(name, error) from error
        backbone = cls(model, tokenizer, str(name))
        if eraser == SHIPPED_ERASER:
            from kveraser.model.bundled import shipped_eraser_folder

            folder = shipped_eraser_folder(str(name))
            if folder is not None:
                # Results name it, not the place where a machine keeps it.
                backbone.load_eraser(folder).name = SHIPPED_ERASER
        elif eraser is not None:
            backbone.load_eraser(eraser)
        return backbone

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @cached_property
    def rotation(self) -> Rotation:
        """How this backbone rotates its keys, measured once.

        Raises:
            RotationError: it has no rotary positions, or ones that can't be moved.
        """
        with self.lock:
            return detect(self.model, self.layers)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that a token takes, over all layers."""
        return self.prefill([0]).nbytes

    # The eraser

    def load_eraser(self, source: str | Path) -> Eraser:
        """Load an eraser, in place of an earlier one.

        Raises:
            EraserError: see `Eraser.from_pretrained`; an eraser loaded before stays as it was.
        """
        with self.lock:
            self.eraser = Eraser.from_pretrained(source, self.model)
            if _fingerprint(self.model) != self.fingerprint:
                raise EraserError(
                    f"{source} changed the base model's own weights, and nothing computed from here on is exact: load "
                    "the backbone again, without this eraser"
                )
        return self.eraser

    @contextmanager
    def erasing(self) -> Iterator[None]:
        """Inside, this thread's forward passes run with the eraser's adapter on; other threads wait.

        Raises:
            EraserError: no eraser is loaded.
        """
        eraser = self.require_eraser()
        with self.lock, eraser.active():
            yield

    def require_eraser(self) -> Eraser:
        """The loaded eraser.

        Raises:
            EraserError: none is loaded.
        """
        if self.eraser is None:
            raise EraserError(
                f"no eraser is loaded for {self.name}: pass eraser=FOLDER (a PEFT LoRA), "
                "or choose a method that needs none, such as repair(32)"
            )
        return self.eraser

    def tokenize(
        self, text: str, special: bool = False, follows: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of `text` and the `(start, end)` of each in it: see `encode`."""
        return encode(self.tokenizer, text, special, follows)

    # Forward passes

    def new_cache(self, capacity: int = 256) -> EditableCache:
        """An empty editable cache for this backbone with room for `capacity` slots."""
        return EditableCache(self.layers, capacity)

    def check_room(self, position: int, tokens: int) -> None:
        """Raise ContextLengthError when `tokens` from `position` on would leave the backbone's positions."""
        if self.max_positions is not None and position + tokens > self.max_positions:
            why = (
                " (beyond, its rotary frequencies change with the length of the text, and no cached state stays exact)"
                if self.max_positions == self._fixed_end
                else ""
            )
            raise ContextLengthError(
                f"{tokens} tokens from position {position} end at {position + tokens}, beyond the {self.max_positions} "
                f"positions of {self.name}{why}: shorten the context or use a backbone with more positions"
            )

    def extend(self, cache: EditableCache, tokens: Sequence[int], progress: Progress | None = None) -> None:
        """Append `tokens` to the cache at its next positions, in chunks, without computing logits.

        An exception or Ctrl-C leaves the cache as it was.

        Raises:
            ContextLengthError: not enough positions; nothing is computed then.
        """
        self.check_room(cache.next_position, len(tokens))
        start = cache.length
        try:
            size = self._chunk or PREFILL_CHUNK
            for offset in range(0, len(tokens), size):
                if offset:
                    self.let_others_in()
                chunk = tokens[offset : offset + size]
                positions = torch.arange(len(chunk), dtype=torch.float64) + cache.next_position
                with cache.appending(positions):
                    self.forward(chunk, cache, positions)
                if progress is not None:
                    progress(offset + len(chunk), len(tokens))
        except BaseException:
            if cache.length > start:
                cache.truncate(start)
            raise

    @contextmanager
    def sharing(self, between: Callable[[], None], chunk: int) -> Iterator[None]:
        """Inside, `between` is called between the passes of prefills, scoring and greedy answers.

        It may use the backbone on other caches than theirs. It is never called while the eraser is on.

        Args:
            chunk: most tokens of a pass in which a prefill runs.
        """
        before = self._between, self._chunk
        self._between, self._chunk = between, chunk
        try:
            yield
        finally:
            self._between, self._chunk = before

    def let_others_in(self) -> None:
        """Between two passes: call what `sharing` was given, if anything."""
        if self._between is not None:
            self._between()

    def prefill(self, tokens: Sequence[int], progress: Progress | None = None) -> EditableCache:
        """A new cache of `tokens` at positions 0, 1, ...: the exact reference that everything is measured against."""
        cache = self.new_cache(max(len(tokens), 1))
        self.extend(cache, tokens, progress)
        return cache

    def forward(
        self,
        tokens: Sequence[int],
        cache: Any,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Run `tokens` at `positions` (`[tokens]`, may be fractional) through the decoder, which fills the cache."""
        with self.lock, torch.no_grad():
            self.model.base_model(
                input_ids=self._input_ids(tokens),
                position_ids=self.position_ids(positions),
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
            )

    def _input_ids(self, tokens: Sequence[int]) -> torch.Tensor:
        """Token ids as the model takes them.

        Raises:
            InputError: ids that the model has no embedding for.
        """
        foreign = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if foreign is not None:
            raise InputError(
                f"token {foreign} is none of the {self._vocabulary} that {self.name} has embeddings for: give ids "
                "below that, and a tokenizer that belongs to the model"
            )
        return torch.tensor([list(tokens)], device=self.device)

    def logits(
        self,
        cache: EditableCache,
        tokens: Sequence[int],
        keep: int | torch.Tensor = 1,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append `tokens` to the cache and return the logits of the last `keep` of them, or of those at places `keep`.

        Args:
            positions: float64 `[tokens]`; default: the cache's next ones.
            attention_mask: of `attention_mask`; default: causal.

        Returns:
            float32 `[keep, vocabulary]`.

        Raises:
            ContextLengthError: not enough positions; nothing is computed then.
        """
        if positions is None:
            self.check_room(cache.next_position, len(tokens))
            positions = torch.arange(len(tokens), dtype=torch.float64) + cache.next_position
        places = slice(-keep, None) if isinstance(keep, int) else keep.to(self.device)
        with self.lock, torch.no_grad(), cache.appending(positions):
            output = self.model(
                input_ids=self._input_ids(tokens),
                position_ids=self.position_ids(positions),
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **({"logits_to_keep": keep if isinstance(keep, int) else places} if self.keeps_logits else {}),
            )
        logits: torch.Tensor = output.logits[0] if self.keeps_logits else output.logits[0, places]
        return logits.float()

    def position_ids(self, positions: torch.Tensor) -> torch.Tensor:
        """`positions` (`[tokens]` or `[batch, tokens]`) as the model takes them, batched: int64 or float32."""
        whole = bool((positions == positions.round()).all())
        rows = positions if positions.dim() == 2 else positions.unsqueeze(0)
        return rows.to(device=self.device, dtype=torch.long if whole else torch.float32)

    def attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        """Which slots every token sees (bool `[tokens, slots]` or `[batch, tokens, slots]`) as the model takes it.

        Returns:
            `[batch, 1, tokens, slots]`, on the model's device.

        Raises:
            BackboneError: the model's attention takes no such mask.
        """
        implementation = self.model.config._attn_implementation
        if implementation == "eager":
            lowest = torch.finfo(self.model.dtype).min
            visible = torch.zeros(visible.shape, dtype=self.model.dtype).masked_fill(~visible, lowest)
        elif implementation not in ("sdpa", SHARED_HEADS):
            raise BackboneError(
                f"{self.name} runs with attention '{implementation}', which takes no mask of its own: "
                "load it with attn_implementation='sdpa'"
            )
        return visible.reshape(-1, 1, *visible.shape[-2:]).to(self.device)


def check_cached_equals_uncached(model: Any, layers: int, name: str) -> None:
    """Run three tokens with and without an editable cache: a model that attends both ways, say, gives other logits.

    Raises:
        UnsupportedModelError: the last token's logits differ.
    """
    tokens = torch.tensor([[1, 2, 3]], device=model.device) % model.config.get_text_config(decoder=True).vocab_size
    cache = EditableCache(layers)
    with torch.no_grad():
        whole = model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        model(input_ids=tokens[:, :2], past_key_values=cache, use_cache=True)
        last = torch.tensor([[2]], device=model.device)
        stepped = model(input_ids=tokens[:, 2:], position_ids=last, past_key_values=cache, use_cache=True)
    error = float((stepped.logits[0, -1].float() - whole).norm() / whole.norm())
    if not error < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise UnsupportedModelError(
            name, "unknown_attention", f"with a cache its logits are others than without (relative error {error:.2g})"
        )


def _fingerprint(model: Any) -> str:
    """SHA-256 over the architecture, the dtype and a sample of every parameter, hex; adapters are left out."""
    volatile = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    config = {key: value for key, value in model.config.to_dict().items() if key not in volatile}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(str(model.dtype).encode())
    for wrapped, parameter in model.named_parameters():
        if ".lora_" in wrapped:
            continue
        # The layers under an adapter keep their names.
        name = wrapped.replace(".base_layer.", ".")
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        sample = torch.cat([flat[:16], flat[flat.numel() // 2 :][:16], flat[-16:]]).float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
