"""Every error that kveraser raises on purpose: one hierarchy, so that `except KVEraserError` catches them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class KVEraserError(Exception):
    """Base of all kveraser errors. The message says what was wrong, with the value, and what to do."""


class BackboneError(KVEraserError):
    """The backbone can't be found, read or converted."""


class UnsupportedModelError(BackboneError):
    """The backbone has layers whose cache can't be edited exactly.

    `layer_type` names the offending kind, for example `sliding_attention`.
    """

    def __init__(self, model: str, layer_type: str, reason: str) -> None:
        super().__init__(
            f"{model}: layers of type '{layer_type}' are not supported: {reason}. "
            "Use a decoder-only model with full attention in every layer."
        )
        self.layer_type = layer_type


class RotationError(BackboneError):
    """A method needs rotary positions that can be moved, and this backbone has none."""


class ContextLengthError(KVEraserError):
    """The context would need more positions than the backbone has."""


class CacheError(KVEraserError):
    """The cache was used in a way that would corrupt it."""


class SpanError(KVEraserError):
    """The span to erase can't be resolved: empty, outside the context, not found, already erased."""


class AmbiguousSpanError(SpanError):
    """The text to erase occurs several times; `occurrences` lists (start, end) in characters, `shown` the context of
    the first few."""

    def __init__(self, text: str, occurrences: Sequence[tuple[int, int]], shown: Sequence[str]) -> None:
        listing = "; ".join(
            f"occurrence {number} at characters {start}-{end}: {context!r}"
            for number, ((start, end), context) in enumerate(zip(occurrences, shown, strict=False), start=1)
        )
        if len(shown) < len(occurrences):
            listing += f"; and {len(occurrences) - len(shown)} more"
        super().__init__(
            f"{text!r} occurs {len(occurrences)} times. Say which with occurrence=1..{len(occurrences)}: {listing}"
        )
        self.occurrences = tuple(occurrences)


class EraserError(KVEraserError):
    """The eraser adapter is missing, corrupt, or made for another backbone."""


class MethodError(KVEraserError):
    """No such erasing method, or a parameter it does not take."""


class SessionError(KVEraserError):
    """The session can't do that in its present state."""


class SessionFileError(SessionError):
    """A session file can't be written, read, or belongs to another model."""


class MeasurementError(KVEraserError):
    """What was measured contradicts what must hold of any measurement."""


class MissingExtraError(KVEraserError, ImportError):
    """A package of an extra is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'kveraser[{EXTRAS[package]}]'")


EXTRAS = {
    "typer": "cli", "rich": "cli", "pydantic": "cli", "gguf": "cli", "matplotlib": "plot", "yaml": "train",
    "accelerate": "train", "datasets": "train", "pyarrow": "train", "fastapi": "serve", "uvicorn": "serve",
    "prometheus_client": "serve", "regex": "serve",
}  # fmt: skip
"""The extra that installs each optional package."""


@contextmanager
def extras() -> Iterator[None]:
    """Turn the import of a missing optional package inside into a MissingExtraError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise MissingExtraError(error.name) from error


class InputError(KVEraserError):
    """An input file or document has the wrong form."""
