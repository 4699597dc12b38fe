"""llama.cpp on the GGUF file that the bundled backbone comes from: recompute the suffix, or shift it.

Contexts are filled, cut and shifted by llama.cpp's own calls. Between rounds the unedited context comes back from a
saved copy of its states, bit for bit, so that no round pays for another prefill.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kveraser.errors import BackboneError
from kveraser.measure.peer import Peer, PeerRow, PeerTask
from kveraser.model.backbone import Backbone
from kveraser.model.bundled import DISTRIBUTION, GGUF_FILE, MODEL_NAME
from kveraser.model.decode import end_tokens

INSTALL = "pip install 'kveraser[peers]'"
RECOMPUTE = "suffix recompute"
SHIFT = "seq_rm + seq_add"
SEQUENCE = 0


class LlamaCpp(Peer):
    """llama.cpp, by the Python package `llama_cpp`, with as many threads as torch has.

    - `suffix recompute`: everything from the span's begin on is removed, and the suffix decoded again. Exact.
    - `seq_rm + seq_add`: the span alone is removed, and the suffix moved up. What it has read stays in it. The keys are
      rotated when the next token is decoded, so this cost is in the first token's time.

    Attributes:
        version: of the Python package.
    """

    name = "llama.cpp"
    note = (
        "llama.cpp runs the bundled GGUF (Q4_1 weights, its own quantised kernels, float16 cache); kveraser runs the "
        "same weights unpacked: each as a user would run it"
    )

    @classmethod
    def available(cls, backbone: Backbone) -> str | None:
        try:
            import llama_cpp
        except Exception as error:
            # A build that does not fit the machine fails as it likes when its library is loaded.
            return f"llama-cpp-python can't be imported ({type(error).__name__}: {error}): {INSTALL}"
        if not hasattr(llama_cpp, "llama_memory_seq_add"):
            return f"llama-cpp-python {llama_cpp.__version__} has no llama_memory_seq_add: {INSTALL} --upgrade"
        if backbone.name != MODEL_NAME:
            return f"it runs the GGUF of {MODEL_NAME}, and the backbone is {backbone.name}"
        return None

    def __init__(self, backbone: Backbone, longest: int) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        self.version: str = llama_cpp.__version__
        self._ends, self._tokenizer = end_tokens(backbone), backbone.tokenizer
        # Kept here, since llama.cpp goes on calling it; its messages would stand between the lines of a result.
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        if backbone.device.type == "cpu":
            model_settings.n_gpu_layers = 0
        source = Path(str(metadata.distribution(DISTRIBUTION).locate_file(GGUF_FILE)))
        self._model = llama_cpp.llama_model_load_from_file(str(source).encode(), model_settings)
        if not self._model:
            raise BackboneError(f"llama.cpp {self.version} can't load {source}: reinstall {DISTRIBUTION}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = longest
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise BackboneError(f"llama.cpp {self.version} has no memory for a context of {longest} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch: int = llama_cpp.llama_n_batch(self._context)
        self._vocabulary: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._operations: dict[str, Callable[[PeerTask], None]] = {
            RECOMPUTE: self.recompute_suffix,
            SHIFT: self.remove_and_shift,
        }

    def prepare(self, task: PeerTask) -> None:
        self._task = task
        self.fill(task.tokens)
        size = self._library.llama_state_seq_get_size(self._context, SEQUENCE)
        self._saved = (ctypes.c_uint8 * size)()
        written = self._library.llama_state_seq_get_data(self._context, self._saved, size, SEQUENCE)
        if written != size:
            raise BackboneError(f"llama.cpp {self.version} saved {written} of {size} bytes of its states")
        self._answers = {}
        for operation, edit in self._operations.items():
            self._restore()
            edit(task)
            self._answers[operation] = self.answer(task.question, task.answer_tokens)

    def measure(self) -> list[PeerRow]:
        task, rows = self._task, []
        for operation, edit in self._operations.items():
            self._restore()
            started = time.perf_counter()
            edit(task)
            self._library.llama_synchronize(self._context)
            edited = time.perf_counter()
            self.next_token(task.question)
            ended = time.perf_counter()
            rows.append(
                PeerRow(
                    peer=self.name,
                    operation=operation,
                    context=len(task.tokens),
                    span=len(task.span),
                    seconds=edited - started,
                    first_token_seconds=ended - started,
                    answer=self._answers[operation],
                    version=self.version,
                )
            )
        return rows

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)

    # One context

    @property
    def next_position(self) -> int:
        """Where the next token goes."""
        return int(self._library.llama_memory_seq_pos_max(self._memory, SEQUENCE)) + 1

    def fill(self, tokens: Sequence[int]) -> None:
        """Forget everything and read `tokens` at positions 0, 1, ..."""
        self._library.llama_memory_clear(self._memory, False)
        self._decode(tokens)

    def recompute_suffix(self, task: PeerTask) -> None:
        """Remove everything from the span's begin on, and decode the suffix again."""
        self._remove(task.span.start, self.next_position)
        self._decode(task.tokens[task.span.end :])

    def remove_and_shift(self, task: PeerTask) -> None:
        """Remove the span, and move what follows up to its begin."""
        self._remove(task.span.start, task.span.end)
        end = self.next_position
        self._library.llama_memory_seq_add(self._memory, SEQUENCE, task.span.end, end, -len(task.span))

    def answer(self, question: Sequence[int], most: int) -> str:
        """The greedy answer's text, of at most `most` tokens; the question and the answer stay in the context."""
        answer, feed = list[int](), question
        while len(answer) < most:
            token = self.next_token(feed)
            if token in self._ends:
                break
            answer.append(token)
            feed = [token]
        return str(self._tokenizer.decode(answer, skip_special_tokens=True))

    def next_token(self, tokens: Sequence[int]) -> int:
        """Append `tokens`, not none, and return the likeliest token after them."""
        self._decode(tokens)
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def _decode(self, tokens: Sequence[int]) -> None:
        for start in range(0, len(tokens), self._batch):
            chunk = tokens[start : start + self._batch]
            ids = (self._library.llama_token * len(chunk))(*chunk)
            code = self._library.llama_decode(self._context, self._library.llama_batch_get_one(ids, len(chunk)))
            if code != 0:
                raise BackboneError(f"llama.cpp {self.version} can't decode {len(chunk)} tokens (code {code})")

    def _remove(self, start: int, end: int) -> None:
        if not self._library.llama_memory_seq_rm(self._memory, SEQUENCE, start, end):
            raise BackboneError(f"llama.cpp {self.version} can't remove positions [{start}, {end})")

    def _restore(self) -> None:
        self._library.llama_memory_clear(self._memory, False)
        size = len(self._saved)
        if self._library.llama_state_seq_set_data(self._context, self._saved, size, SEQUENCE) != size:
            raise BackboneError(f"llama.cpp {self.version} can't read back its own states")
