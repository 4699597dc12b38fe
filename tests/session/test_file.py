"""Session files: what comes back, what is refused, and that a failed write leaves the file before it alone."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kveraser.errors import BackboneError, InputError, SessionError, SessionFileError
from kveraser.methods import METHODS
from kveraser.model.backbone import Backbone
from kveraser.session.file import VERSION
from kveraser.session.session import Session
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Message
from kveraser.text.template import ChatOptions
from tests.sessions import EXACT, MESSAGES, TEXT, far, same, state
from tests.tiny import attach_random_eraser, same_bits, snapshot, tiny_backbone, tiny_model, tiny_tokenizer

SPAN = "She keeps the log 🙂 in the cabin."
NEW = {"max_new_tokens": 6}


@pytest.fixture
def session(backbone: Backbone) -> Session:
    """One with a past: erased, answered, audited."""
    session = Session(backbone, text=TEXT)
    session.erase(SPAN, "mask")
    session.ask("Who?", keep=True, **NEW)
    session.erase("Ada", "repair", window=3)
    session.audit(["Who is the captain?"])
    return session


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.kv"


def saved(session: Session) -> dict[str, Any]:
    """The session's state, less what a file leaves out."""
    return {**state(session), "history": 0}


def contents(path: Path) -> tuple[dict[str, str], dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(str(path), framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    return metadata, json.loads(metadata["document"]), tensors


# What comes back


@pytest.mark.parametrize("method", METHODS)
def test_a_session_comes_back_bit_for_bit(method: str, path: Path) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings(layout="closed"))
    session = Session(backbone, text=TEXT)
    session.erase(SPAN, method, force=True)
    session.save(path)
    loaded = Session.load(path, backbone)
    assert same(saved(loaded), saved(session)) and loaded.receipts == session.receipts
    positions = loaded.cache.positions
    # The edited positions are part of it: a hole after mask, fractions after a closed gap.
    if method == "mask":
        assert float(positions[-1]) >= len(positions)
    if method.startswith("kveraser"):
        assert bool((positions != positions.round()).any())
    assert loaded.exact is session.exact is (method == "recompute")
    assert loaded.ask("Who?", **NEW).tokens == session.ask("Who?", **NEW).tokens


def test_receipts_audits_messages_and_erased_flags_come_back(session: Session, path: Path) -> None:
    session.save(path)
    loaded = Session.load(path, session.backbone)
    assert loaded.receipts == session.receipts and loaded.receipts[1].audit is not None
    assert isinstance(loaded.receipts[1].spans[0], tuple) and loaded.receipts[1].parameters == {
        "window": 3,
        "per_span": 0.0,
    }
    assert loaded.transcript == session.transcript and not all(loaded.transcript.live)
    assert loaded.text == session.text and "Ada" not in loaded.text and "Ada" in loaded.transcript.text
    assert [place.role for place in loaded.transcript.messages] == ["user", "assistant"]


def test_a_loaded_session_goes_on_like_the_one_that_was_saved(session: Session, path: Path) -> None:
    session.save(path)
    loaded = Session.load(path, session.backbone)
    for one in (session, loaded):
        one.ask("Where?", keep=True, **NEW)
        one.erase(Message(-1), "shift")
    assert same_bits(snapshot(loaded.cache), snapshot(session.cache))
    assert loaded.audit(["What is old?"]) == session.audit(["What is old?"])
    loaded.erase("harbour", "recompute")
    assert loaded.exact and far(loaded) < EXACT


def test_a_conversation_with_tools_comes_back(backbone: Backbone, path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "find", "description": "d", "parameters": {}}}]
    session = Session(backbone, messages=MESSAGES, tools=tools)
    session.save(path)
    loaded = Session.load(path, backbone)
    assert list(loaded.options.tools) == tools and not loaded.turn_open
    assert same(saved(loaded), saved(session))
    loaded.append(messages=[{"role": "user", "content": "More."}])
    loaded.erase(Message(3), "recompute")
    assert far(loaded) < EXACT


def test_bfloat16_comes_back_bit_for_bit(path: Path) -> None:
    backbone = Backbone(tiny_model().to(torch.bfloat16), tiny_tokenizer(), "tiny-bfloat16")
    session = Session(backbone, text=TEXT)
    session.erase(SPAN, "shift")
    session.save(path)
    loaded = Session.load(path, backbone)
    assert snapshot(loaded.cache)["keys"][0].dtype == torch.bfloat16
    assert same_bits(snapshot(loaded.cache), snapshot(session.cache))
    assert loaded.ask("Who?", **NEW).tokens == session.ask("Who?", **NEW).tokens


def test_the_model_named_in_the_file_is_loaded_in_its_dtype(tmp_path: Path, path: Path) -> None:
    backbone = tiny_backbone()
    folder = tmp_path / "model"
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    attach_random_eraser(backbone).save_pretrained(tmp_path / "eraser")
    session = Session(folder, text=TEXT, dtype="bfloat16")
    session.erase(SPAN, "mask")
    session.save(path)
    loaded = Session.load(path)
    assert loaded.backbone.model.dtype == torch.bfloat16 and loaded.backbone is not session.backbone
    assert same_bits(snapshot(loaded.cache), snapshot(session.cache))
    with pytest.raises(SessionFileError, match=r"in bfloat16.*in float32.*load it with the model and dtype"):
        Session.load(path, dtype="float32")
    erasing = Session.load(path, eraser=tmp_path / "eraser")
    assert erasing.erase("Ada", "kveraser").method == "kveraser"
    given = Session.load(path, Backbone.load(folder, dtype="bfloat16"), eraser=tmp_path / "eraser")
    assert given.backbone.eraser is not None


def test_a_file_holds_nothing_to_undo_with(session: Session, path: Path) -> None:
    held = sum(marks.journal.bytes for marks in session.state.history if marks.journal is not None)
    session.save(path)
    metadata, document, tensors = contents(path)
    layers = session.backbone.layers
    own = {"positions", "slot_to_token"}
    assert set(tensors) == own | {f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(layers)}
    assert all(states.shape[2] == session.cache.length for name, states in tensors.items() if name not in own)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + session.cache.nbytes + 2 * session.cache.positions.nbytes
    assert held > 1000 and "history" not in document and "journal" not in metadata["document"]
    loaded = Session.load(path, session.backbone)
    with pytest.raises(SessionError, match="0 can be undone"):
        loaded.undo()


def test_a_file_is_safetensors_and_never_pickle(session: Session, path: Path) -> None:
    session.save(path)
    start = path.read_bytes()[:9]
    assert int.from_bytes(start[:8], "little") < path.stat().st_size and start[8:] == b"{"
    assert contents(path)[0]["format"] == "kveraser-session"
    assert oct(path.stat().st_mode & 0o777) == "0o600"


# What is refused


def test_a_missing_file_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    for place in (tmp_path / "none.kv", tmp_path):
        with pytest.raises(SessionFileError, match=f"no session file at {place}: check the path"):
            Session.load(place, backbone)


def test_every_truncation_is_refused(session: Session, path: Path) -> None:
    session.save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(SessionFileError, match="save the session again"):
            Session.load(path, session.backbone)
    path.write_bytes(whole)
    assert same(saved(Session.load(path, session.backbone)), saved(session))


def test_a_flipped_byte_is_found_wherever_it_is(session: Session, path: Path) -> None:
    session.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, 211), *range(header, len(whole), 4001), header, len(whole) - 1]
    said: list[str] = []
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(SessionFileError) as raised:
            Session.load(path, session.backbone)
        said.append(str(raised.value))
    assert all("checksum differs" in one for one in said[-2:]) and len(said) > 40


def test_files_of_others_are_refused(session: Session, path: Path) -> None:
    path.write_bytes(b"\x80\x04not a tensor file at all" * 20)
    with pytest.raises(SessionFileError, match="can't be read as a session file"):
        Session.load(path, session.backbone)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(SessionFileError, match="is not a kveraser session file"):
        Session.load(path, session.backbone)


def rewrite(path: Path, version: str = VERSION, **changes: Any) -> None:
    """Change a file's document and put the right checksum to it."""
    from kveraser.session.file import _checksum

    metadata, document, tensors = contents(path)
    document |= changes
    text = json.dumps({name: value for name, value in document.items() if value != "gone"})
    path.unlink()
    save_file(tensors, path, {**metadata, "version": version, "document": text, "sha256": _checksum(text, tensors)})


def test_another_version_is_refused(session: Session, path: Path) -> None:
    session.save(path)
    rewrite(path)
    assert same(saved(Session.load(path, session.backbone)), saved(session))
    rewrite(path, version="1")
    with pytest.raises(SessionFileError, match="has session format 1, this release reads 2"):
        Session.load(path, session.backbone)


@pytest.mark.parametrize("name", ["backbone", "fingerprint", "dtype", "next_position", "transcript", "receipts"])
def test_a_document_that_lacks_something_is_refused(session: Session, path: Path, name: str) -> None:
    session.save(path)
    rewrite(path, **{name: "gone"})
    with pytest.raises(SessionFileError, match=f"not a whole session file .*'{name}'"):
        Session.load(path, session.backbone)


def test_another_model_is_refused(session: Session, path: Path) -> None:
    session.save(path)
    others = [tiny_backbone(seed=1), tiny_backbone("qwen2"), tiny_backbone(rms_norm_eps=1e-4)]
    others.append(Backbone(tiny_model().to(torch.bfloat16), tiny_tokenizer()))
    for other in others:
        with pytest.raises(SessionFileError, match=r"made with another model \(tiny-llama in float32, fingerprint"):
            Session.load(path, other)
    assert same(saved(Session.load(path, tiny_backbone())), saved(session))


def test_wrong_arguments_are_refused(session: Session, path: Path) -> None:
    session.save(path)
    with pytest.raises(InputError, match=r"give them to Backbone.load"):
        Session.load(path, session.backbone, dtype="float32")
    with pytest.raises(InputError, match="takes no 'precision': it takes device, dtype and eraser"):
        Session.load(path, precision="float32")
    with pytest.raises(BackboneError, match=r"can't load the backbone ./tiny-llama"):
        Session.load(path, "./tiny-llama")
    assert Session.load(path, session.backbone, dtype=None, eraser=None).text == session.text


# Writing


@contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes inside."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("earlier", [False, True])
def test_a_write_that_runs_out_of_space_leaves_the_earlier_file(session: Session, path: Path, earlier: bool) -> None:
    if earlier:
        session.fork().save(path)
    before, contents_before = state(session), path.read_bytes() if earlier else None
    session.append(messages=[{"role": "user", "content": "More."}])
    after = state(session)
    with small_disk(4096), pytest.raises(SessionFileError, match=r"can't write the session to .*free space"):
        session.save(path)
    assert [one.name for one in path.parent.iterdir()] == ([path.name] if earlier else [])
    assert (path.read_bytes() if earlier else None) == contents_before
    assert same(after, state(session)) and not same(before, after)
    session.save(path)
    assert same(saved(Session.load(path, session.backbone)), saved(session))


def test_an_interrupted_write_leaves_the_earlier_file(session: Session, path: Path, monkeypatch: Any) -> None:
    session.save(path)
    before = path.read_bytes()

    def interrupt(handle: int) -> None:
        assert len(os.listdir(path.parent)) == 2
        raise KeyboardInterrupt

    session.append(messages=[{"role": "user", "content": "More."}])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", interrupt)
        session.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_place_that_can_not_be_written_is_refused(session: Session, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    for place in (tmp_path / "none" / "session.kv", blocked / "session.kv", tmp_path):
        with pytest.raises(SessionFileError, match=f"can't write the session to {place}.*choose another place"):
            session.save(place)
    assert os.listdir(tmp_path) == ["file"] and blocked.read_text() == "not a folder"
    session.ask("Who?", **NEW)


def test_what_json_can_not_hold_is_refused(session: Session, path: Path) -> None:
    session.state.options = ChatOptions([{"type": "function", "function": object()}])
    with pytest.raises(SessionFileError, match="must be JSON values"):
        session.save(path)
    assert not path.exists()
