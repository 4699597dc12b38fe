"""Erase a span of a context from a live KV cache, and measure what was forgotten."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kveraser.backbone import Backbone
    from kveraser.cache import EditableCache
    from kveraser.decode import Decoding
    from kveraser.eraser import Eraser
    from kveraser.errors import KVEraserError
    from kveraser.methods import METHODS, make_method
    from kveraser.probes import Probe
    from kveraser.receipt import Audit, Receipt
    from kveraser.session import Answer, Session
    from kveraser.spans import Characters, Message, Pattern, Text, Tokens, ToolCall
    from kveraser.training.loop import train

_HOMES = {
    "Answer": "session",
    "Audit": "receipt",
    "Backbone": "backbone",
    "Characters": "spans",
    "Decoding": "decode",
    "EditableCache": "cache",
    "Eraser": "eraser",
    "KVEraserError": "errors",
    "METHODS": "methods",
    "Message": "spans",
    "Pattern": "spans",
    "Probe": "probes",
    "Receipt": "receipt",
    "Session": "session",
    "Text": "spans",
    "Tokens": "spans",
    "ToolCall": "spans",
    "make_method": "methods",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import kveraser` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kveraser' has no attribute {name!r}")
    return getattr(import_module(f"kveraser.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "METHODS", "Answer", "Audit", "Backbone", "Characters", "Decoding", "EditableCache", "Eraser", "KVEraserError",
    "Message", "Pattern", "Probe", "Receipt", "Session", "Text", "Tokens", "ToolCall", "make_method", "train",
]  # fmt: skip
