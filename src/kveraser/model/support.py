"""Which models are taken: decided by the layers that a config describes, before any weights are read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from kveraser.errors import BackboneError, UnsupportedModelError

FULL = ("full_attention", "attention")
WINDOWS = ("sliding_attention", "chunked_attention", "local_attention", "local")
"""Types whose layers keep only part of a context."""


def check_config(config: Any, name: str) -> Any:
    """Refuse a config whose layers' cache can't be edited exactly, or whose weights can't be run here.

    Returns:
        The auto class of transformers that loads its model: of causal language models, or of models with images, of
        which the text alone is run.

    Raises:
        UnsupportedModelError: naming the layer type.
        BackboneError: no causal language model, or quantized in a way that needs what is not there.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kinds = (
        (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    )
    auto_class, model_class = next(
        ((auto, mapping[type(config)]) for auto, mapping in kinds if type(config) in mapping), (None, None)
    )
    check_layers(config, name, model_class)
    if auto_class is None and not getattr(config, "auto_map", None):
        raise BackboneError(
            f"{name} is a {config.model_type} model, which is no causal language model: give one that continues text"
        )
    _check_quantization(config, name)
    return auto_class or AutoModelForCausalLM


def check_layers(config: Any, name: str, model_class: Any) -> None:
    """Refuse layers whose cache does not hold a state for every position.

    Args:
        model_class: the model's class; it tells where the config does not.

    Raises:
        UnsupportedModelError: naming the layer type.
    """
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(name, "cross_attention", "the context lives in an encoder, not in a KV cache")
    types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    for layer_type in types or ():
        if layer_type in WINDOWS:
            raise UnsupportedModelError(name, layer_type, "a window forgets the start of a longer context")
        if layer_type not in FULL:
            raise UnsupportedModelError(name, layer_type, "their cache is not one of keys and values of every token")
    if "local" in (getattr(text, "attention_layers", None) or ()):
        raise UnsupportedModelError(name, "local_attention", "a window forgets the start of a longer context")
    # A class may have such layers and a config none of them: the config's own list decides.
    if not types and getattr(model_class, "_is_stateful", False):
        raise UnsupportedModelError(
            name, "linear_attention", "their state mixes all tokens and can't be edited by span"
        )
    if getattr(text, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(name, "multi_head_latent_attention", "keys are rebuilt from a compressed state")
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(name, "alibi", "they bias by the slots of the cache, which an erase moves")
    if model_class is not None and "position_ids" not in inspect.signature(model_class.forward).parameters:
        raise UnsupportedModelError(name, "implicit_positions", "the model takes no position_ids")
    window = _window(text)
    if window is not None and window < (text.max_position_embeddings or 0):
        raise UnsupportedModelError(
            name, "sliding_attention", f"a window of {window} forgets the start of a longer context"
        )


def check_model(model: Any, name: str) -> None:
    """Refuse a loaded model for its layers.

    Raises:
        UnsupportedModelError: naming the layer type.
    """
    check_layers(model.config, name, type(model))
    text = model.config.get_text_config(decoder=True)
    if _window(text) is not None:
        # A window that no position can leave is full attention: said so, the model builds the ordinary mask.
        text.sliding_window = None


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that does not say which characters its tokens stand for.

    Raises:
        BackboneError: it is a slow one.
    """
    if not getattr(tokenizer, "is_fast", True):
        raise BackboneError(
            f"{name}: {type(tokenizer).__name__} is a slow tokenizer, which does not tell where its tokens stand in "
            "the text: give the fast one, which AutoTokenizer loads where the model has a tokenizer.json"
        )


def _window(text: Any) -> int | None:
    """The window of a model whose config does not list its layers."""
    if getattr(text, "layer_types", None) or not getattr(text, "use_sliding_window", True):
        return None
    window: int | None = getattr(text, "sliding_window", None)
    return window


def _check_quantization(config: Any, name: str) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    given = quantization if isinstance(quantization, dict) else quantization.to_dict()
    try:
        quantizer = AutoHfQuantizer.from_config(given, pre_quantized=True)
        quantizer.validate_environment(device_map=None)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"{name} has weights quantized with {given.get('quant_method')}, which can't be run here ({reason}): "
            "install what it names, or use the model's unquantized weights"
        ) from error


def load_error(name: str | Path, error: Exception) -> BackboneError:
    """Why a backbone can't be loaded, and what to do about that."""
    if isinstance(error, ImportError):
        advice = "install what it names"
    elif isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        advice = "use a smaller model, or dtype=bfloat16"
    elif Path(name).is_dir():
        advice = "give a folder with a causal language model as save_pretrained writes it"
    elif isinstance(error, OSError):
        advice = "give a folder or hub id of a causal language model, and check the connection"
    else:
        advice = "give a folder or hub id of a causal language model that this version of transformers knows"
    reason = (str(error).splitlines() or ["no reason given"])[0]
    return BackboneError(f"can't load the backbone {name} ({type(error).__name__}: {reason}): {advice}")
