"""Session files: one safetensors file with a JSON document and a checksum in its header, written atomically."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError, SessionFileError
from kveraser.files import replacing
from kveraser.measure.receipt import Audit, ProbeResult, Receipt, TokenKL
from kveraser.model.backbone import SHIPPED_ERASER, Backbone
from kveraser.session.state import SessionState
from kveraser.text.chat import ChatOptions
from kveraser.text.spans import MessageRange, Transcript

FORMAT = "kveraser-session"
VERSION = "2"


def save(state: SessionState, path: str | Path) -> None:
    """Write a session to `path`: its cache, transcript and receipts.

    Undo history is not saved. The file still contains the erased text, in transcript and receipts, which audits need;
    after `zero_value` also the span's keys, and after `erratum` the span's keys and values.

    Raises:
        SessionFileError: the file can't be written; an earlier file at `path` is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    cache = state.cache
    tensors = {"positions": cache.positions.clone(), "slot_to_token": cache.slot_to_token.clone()}
    for layer, (keys, values) in enumerate(cache.read(0, cache.length)):
        tensors[f"keys.{layer}"] = keys.contiguous().cpu()
        tensors[f"values.{layer}"] = values.contiguous().cpu()
    fields = {
        "backbone": state.backbone.name,
        "dtype": str(state.backbone.model.dtype).removeprefix("torch."),
        "fingerprint": state.backbone.fingerprint,
        "next_position": cache.next_position,
        "exact_length": cache.exact_length,
        "turn_open": state.turn_open,
        "tools": list(state.options.tools),
        "chat_template_kwargs": dict(state.options.variables),
        "allow_special": state.options.allow_special,
        "transcript": asdict(state.transcript),
        "receipts": [receipt.to_json() for receipt in state.receipts],
    }
    try:
        document = json.dumps(fields)
    except (TypeError, ValueError) as error:
        raise SessionFileError(
            f"can't write the session to {target} ({error}): tools and method parameters must be JSON values"
        ) from error
    metadata = {"format": FORMAT, "version": VERSION, "document": document, "sha256": _checksum(document, tensors)}
    try:
        with replacing(target) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise SessionFileError(
            f"can't write the session to {target} ({error}): free space or choose another place"
        ) from error


def load(path: str | Path, backbone: Backbone | str | Path | None = None, **loading: Any) -> SessionState:
    """Read a session that `save` wrote.

    Args:
        backbone: a loaded backbone, or what `Backbone.load` takes; None: the one named in the file.
        loading: device, dtype and eraser for `Backbone.load`; the default dtype is the one named in the file.

    Raises:
        SessionFileError: the file is missing, corrupt, of another version, or made with another model.
        InputError: device or dtype with a loaded backbone, or an unknown argument.
        BackboneError: the backbone can't be loaded.
    """
    unknown = sorted(set(loading) - {"device", "dtype", "eraser"})
    if unknown:
        raise InputError(f"loading a session takes no {unknown[0]!r}: it takes device, dtype and eraser")
    chosen = {name: value for name, value in loading.items() if value is not None or name == "eraser"}
    if isinstance(backbone, Backbone) and {"device", "dtype"} & set(chosen):
        raise InputError("device and dtype are chosen when a backbone is loaded: give them to Backbone.load")
    document, tensors = _read(Path(path))
    try:
        named, fingerprint, dtype = (str(document[name]) for name in ("backbone", "fingerprint", "dtype"))
    except KeyError as error:
        raise SessionFileError(f"{path} is not a whole session file (no {error}): save the session again") from error
    if not isinstance(backbone, Backbone):
        backbone = Backbone.load(backbone or named, **{"dtype": dtype} | chosen)
    elif chosen.get("eraser") not in (None, SHIPPED_ERASER) and backbone.fingerprint == fingerprint:
        backbone.load_eraser(chosen["eraser"])
    if backbone.fingerprint != fingerprint:
        raise SessionFileError(
            f"{path} was made with another model ({named} in {dtype}, fingerprint {fingerprint[:12]}; this is "
            f"{backbone.name} in {str(backbone.model.dtype).removeprefix('torch.')}, {backbone.fingerprint[:12]}): "
            "load it with the model and dtype it was made with"
        )
    try:
        states = [
            (tensors[f"keys.{layer}"].to(backbone.device), tensors[f"values.{layer}"].to(backbone.device))
            for layer in range(backbone.layers)
        ]
        cache = EditableCache.from_states(
            states, backbone.layers, tensors["positions"], tensors["slot_to_token"], document["next_position"],
            document["exact_length"],
        )  # fmt: skip
        return SessionState(
            backbone,
            cache,
            _transcript(document["transcript"]),
            ChatOptions(document["tools"], document["chat_template_kwargs"], document["allow_special"]),
            document["turn_open"],
            [_receipt(receipt) for receipt in document["receipts"]],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SessionFileError(f"{path} is not a whole session file ({error!r}): save the session again") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SessionFileError(f"no session file at {path}: check the path")
    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise SessionFileError(f"{path} can't be read as a session file ({error}): save the session again") from error
    if metadata.get("format") != FORMAT:
        raise SessionFileError(f"{path} is not a kveraser session file: give one that Session.save wrote")
    if metadata.get("version") != VERSION:
        raise SessionFileError(
            f"{path} has session format {metadata.get('version')}, this release reads {VERSION}: "
            "use the release that wrote it, or open the context again"
        )
    text = metadata.get("document", "")
    if metadata.get("sha256") != _checksum(text, tensors):
        raise SessionFileError(
            f"{path} is corrupt (its checksum differs): take another copy, or save the session again"
        )
    document: dict[str, Any] = json.loads(text)
    return document, tensors


def _checksum(document: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        # Through bytes: numpy has no bfloat16.
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _transcript(fields: dict[str, Any]) -> Transcript:
    return Transcript(
        text=fields["text"],
        tokens=list(fields["tokens"]),
        offsets=[(start, end) for start, end in fields["offsets"]],
        live=list(fields["live"]),
        inserted=list(fields["inserted"]),
        messages=[MessageRange(**message) for message in fields["messages"]],
        body_start=fields["body_start"],
    )


def _receipt(fields: dict[str, Any]) -> Receipt:
    audited = fields.pop("audit")
    if audited is not None:
        audited = Audit(**audited | {"probes": tuple(_probe_result(probe) for probe in audited["probes"])})
    return Receipt(
        **fields
        | {
            "spans": tuple((start, end) for start, end in fields["spans"]),
            "text": tuple(fields["text"]),
            "inserted_text": tuple(fields["inserted_text"]),
            "audit": audited,
        }
    )


def _probe_result(fields: dict[str, Any]) -> ProbeResult:
    return ProbeResult(**fields | {"by_token": tuple(TokenKL(**token) for token in fields["by_token"])})
