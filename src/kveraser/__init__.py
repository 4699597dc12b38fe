"""Erase a span of a context from a live KV cache, and measure what was forgotten."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from kveraser.errors import extras

__version__ = metadata.version("kveraser")

if TYPE_CHECKING:
    from kveraser.cache.editable import EditableCache
    from kveraser.errors import KVEraserError
    from kveraser.measure.probes import Probe
    from kveraser.measure.receipt import Audit, Receipt
    from kveraser.methods import METHODS, make_method
    from kveraser.model.backbone import Backbone
    from kveraser.model.decode import Decoding
    from kveraser.session.session import Answer, Session
    from kveraser.steering.eraser import Eraser
    from kveraser.text.spans import Characters, Message, Pattern, Text, Tokens, ToolCall
    from kveraser.training.loop import train

_HOMES = {
    "Answer": "session.session",
    "Audit": "measure.receipt",
    "Backbone": "model.backbone",
    "Characters": "text.spans",
    "Decoding": "model.decode",
    "EditableCache": "cache.editable",
    "Eraser": "steering.eraser",
    "KVEraserError": "errors",
    "METHODS": "methods",
    "Message": "text.spans",
    "Pattern": "text.spans",
    "Probe": "measure.probes",
    "Receipt": "measure.receipt",
    "Session": "session.session",
    "Text": "text.spans",
    "Tokens": "text.spans",
    "ToolCall": "text.spans",
    "make_method": "methods",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import kveraser` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kveraser' has no attribute {name!r}")
    with extras():
        return getattr(import_module(f"kveraser.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "METHODS", "Answer", "Audit", "Backbone", "Characters", "Decoding", "EditableCache", "Eraser", "KVEraserError",
    "Message", "Pattern", "Probe", "Receipt", "Session", "Text", "Tokens", "ToolCall", "make_method", "train",
]  # fmt: skip
