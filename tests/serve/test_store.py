"""Where contexts are kept: within the budget, across restarts, and never at another state than was acknowledged."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kveraser.errors import SessionFileError
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.errors import OutOfSpace, Overloaded, ServeError, SessionGone, UnknownSession
from kveraser.serve.secure_delete import secure_delete
from kveraser.serve.service import Limits, Sampling, Service
from kveraser.serve.types import SessionView, Turn
from tests.served import GREEDY, Clock, backbone, chat, conversation, run, said, serving, uncached, whole
from tests.sessions import MESSAGES, TEXT


async def written(service: Service) -> None:
    """Until every changed session has its snapshot."""
    while service.store._unsaved() or (service.store._behind and not service.store._behind.done()):
        await asyncio.sleep(0.001)


async def seen(service: Service, id: str) -> SessionView:
    """What a client sees of a session's contents: not where they lie, nor what can be undone."""
    view = await service.view("ada", id, contents=True)
    return replace(view, expires=0.0, bytes=0, undo_steps=0)


async def asked(service: Service, id: str) -> tuple[int, ...]:
    sampling = Sampling(temperature=0.0, max_tokens=6, logprobs=0)
    return (await whole(service.ask("ada", id, "Where is it?", sampling))).tokens


def snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.session"))


# Memory


@cache
def context_bytes() -> int:
    """Of `conversation(5)` as a session."""

    async def measured() -> int:
        async with serving() as service:
            return (await service.create("ada", messages=conversation(5))).bytes

    return run(measured())


@pytest.fixture(autouse=True)
def measured() -> None:
    """Outside of any event loop."""
    context_bytes()


def budget(contexts: float) -> Limits:
    """Room for so many contexts of `conversation(5)`, with what is reserved for an answer to each."""
    return Limits(memory_bytes=int(contexts * context_bytes()))


def test_what_was_used_longest_ago_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    async def test() -> None:
        limits = budget(3)
        async with serving(tmp_path, limits=limits) as service:
            made = [await service.create("ada", messages=[*conversation(5), said("user", 5, n)]) for n in range(6)]
            states = {}
            for one in made:
                states[one.id] = (await seen(service, one.id), await asked(service, one.id))
                assert service.status()["bytes_held"] <= limits.memory_bytes
            away = [one.id for one in await service.list("ada") if one.bytes == 0]
            assert 0 < len(away) < len(made) and service.status()["bytes_spilled"] > 0
            for one in made:
                assert (await seen(service, one.id), await asked(service, one.id)) == states[one.id]
                assert service.status()["bytes_held"] <= limits.memory_bytes
            assert len({answer for _, answer in states.values()}) > 1

    run(test())


def test_cached_conversations_go_to_disk_too_and_serve_from_there(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=budget(2.5)) as service:
            talks = [[*conversation(5), said("user", 5, number)] for number in range(4)]
            talks = [[said("system", 6, 100 + number), *talk[1:]] for number, talk in enumerate(talks)]
            for talk in talks:
                await chat(service, talk)
            assert len(snapshots(tmp_path)) >= 2
            again = await chat(service, talks[0])
            assert again.started.cached_tokens == again.started.prompt_tokens - 1
            assert again.tokens == uncached(talks[0])
            # From disk it can be erased from as well.
            left = [*talks[1][:2], *talks[1][4:]]
            assert (await chat(service, left)).started.what.action == "erase"
        # They end with the process.
        async with serving(tmp_path) as service:
            assert snapshots(tmp_path) == [] and service.status()["contexts"] == 0

    run(test())


def test_without_a_folder_conversations_go_and_sessions_stay() -> None:
    async def test() -> None:
        async with serving(limits=budget(3)) as service:
            made = await service.create("ada", messages=conversation(5))
            before = await asked(service, made.id)
            for number in range(4):
                await chat(service, [said("system", 6, 100 + number), *conversation(5)[1:]])
            assert service.status()["contexts"] < 4
            assert await asked(service, made.id) == before
            with pytest.raises(OutOfSpace):
                for _ in range(4):
                    await service.create("ada", messages=conversation(5))
            assert await asked(service, made.id) == before

    run(test())


def test_what_can_never_fit_is_refused() -> None:
    async def test() -> None:
        async with serving(limits=budget(1.2)) as service:
            made = await service.create("ada", text=TEXT)
            with pytest.raises(OutOfSpace, match="shorten"):
                await chat(service, conversation(9))
            assert (await service.view("ada", made.id)).id == made.id
            assert service.status()["contexts"] == 0

    run(test())


def test_when_all_is_in_use_clients_come_back_later() -> None:
    async def test() -> None:
        async with serving(limits=replace(budget(1.9), busy_seconds=0.05)) as service:
            made = await service.create("ada", messages=conversation(5))
            stream = service.ask("ada", made.id, "What?", Sampling(temperature=0.0, max_tokens=50))
            await anext(stream)
            with pytest.raises(Overloaded) as refused:
                await chat(service, conversation(5))
            assert refused.value.retry_after == service.store.limits.busy_seconds
            await stream.aclose()  # type: ignore[attr-defined]
            assert service.status()["bytes_held"] <= service.store.limits.memory_bytes

    run(test())


def test_a_request_waits_a_moment_for_memory() -> None:
    async def test() -> None:
        async with serving(limits=replace(budget(1.9), busy_seconds=60.0)) as service:
            stream = service.generate("ada", Turn(messages=tuple(conversation(5)), sampling=GREEDY))
            await anext(stream)
            waiting = asyncio.create_task(chat(service, [said("system", 9, 7), *conversation(5)[1:]]))
            while not any(entry.held is None for entry in service.store.entries.values()):
                await asyncio.sleep(0.001)
            assert not waiting.done()
            await stream.aclose()  # type: ignore[attr-defined]
            answered = await waiting
            assert answered.tokens == uncached([said("system", 9, 7), *conversation(5)[1:]])
            assert service.status()["contexts"] == 1

    run(test())


def test_conversations_give_way_to_the_disks_budget(tmp_path: Path) -> None:
    async def test() -> None:
        limits = replace(budget(1.5), disk_bytes=3 * context_bytes())
        async with serving(tmp_path, limits=limits) as service:
            for number in range(6):
                await chat(service, [said("system", 6, 100 + number), *conversation(5)[1:]])
                assert service.status()["bytes_spilled"] <= limits.disk_bytes
            assert 1 <= len(snapshots(tmp_path)) < 5

    run(test())


# Restarts


def test_sessions_come_back_as_they_were(tmp_path: Path) -> None:
    async def test() -> None:
        clock = Clock()
        async with serving(tmp_path, clock=clock) as service:
            one = await service.create("ada", messages=MESSAGES)
            await service.erase("ada", one.id, {"message": 3}, method="mask")
            await service.append("ada", one.id, messages=[said("user", 4, 3)])
            two = await service.create("ada", text=TEXT, ttl=50.0)
            three = await service.create("ada", text=TEXT)
            await service.delete("ada", three.id)
            states = {id: (await seen(service, id), await asked(service, id)) for id in (one.id, two.id)}
        async with serving(tmp_path, clock=clock) as service:
            listed = await service.list("ada")
            assert [(view.id, view.revision, view.bytes) for view in listed] == [(one.id, 3, 0), (two.id, 1, 0)]
            for id, state in states.items():
                assert (await seen(service, id), await asked(service, id)) == state
            # A text goes on in its open turn.
            await service.append("ada", two.id, text=" It rains.")
            with pytest.raises(UnknownSession):
                await service.view("ada", three.id)
            with pytest.raises(UnknownSession):
                await service.view("bob", one.id)
            clock.now += 60
        async with serving(tmp_path, clock=clock) as service:
            with pytest.raises(SessionGone):
                await service.view("ada", two.id)
            assert [view.id for view in await service.list("ada")] == [one.id]

    run(test())


def test_a_kill_at_any_moment_brings_back_what_was_acknowledged_or_says_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied whenever something has been written, renamed, synced or deleted in it."""
    draw = random.Random(11)
    folder, copies = tmp_path / "live", tmp_path / "copies"
    copies.mkdir()
    told: dict[str, int] = {}
    states: dict[tuple[str, int], tuple[SessionView, tuple[int, ...]]] = {}
    taken: list[tuple[Path, dict[str, int]]] = []

    def copying(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            before = dict(told)
            for moment in ("before", "after"):
                if moment == "after":
                    result = original(*arguments, **settings)
                if len(taken) < 70 and draw.random() < 0.35:
                    copy = copies / str(len(taken))
                    copy.mkdir()
                    for path in list(folder.iterdir()):
                        try:
                            shutil.copyfile(path, copy / path.name)
                        except FileNotFoundError:
                            continue
                    taken.append((copy, before))
            return result

        return call

    async def work() -> None:
        async with serving(folder) as service:

            async def note(id: str) -> None:
                view = await seen(service, id)
                told[id] = view.revision
                states[id, view.revision] = view, await asked(service, id)

            for step in range(28):
                ids = [view.id for view in await service.list("ada")]
                move = draw.random()
                if len(ids) < 2 or move < 0.1:
                    id = (await service.create("ada", text=TEXT)).id
                elif move < 0.2:
                    id = (await service.fork("ada", draw.choice(ids))).id
                else:
                    id = draw.choice(ids)
                    view = await seen(service, id)
                    word = next((word for word in ("noon", "Ada", "log", "crew") if word in (view.text or "")), None)
                    steps = (await service.view("ada", id)).undo_steps
                    if move < 0.5 and word:
                        await service.erase("ada", id, {"text": word, "occurrence": 1}, "mask", undoable=move < 0.4)
                    elif move < 0.65 and steps:
                        await service.undo("ada", id)
                    elif move < 0.72 and len(ids) > 2:
                        del told[id]
                        await service.delete("ada", id)
                        continue
                    else:
                        await service.append("ada", id, text=f" And {step}.")
                await note(id)
                if draw.random() < 0.5:
                    await written(service)

    for module, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        monkeypatch.setattr(module, name, copying(getattr(module, name)))
    run(work())
    monkeypatch.undo()

    came_back, gone = set(), 0

    async def check(copy: Path, acknowledged: dict[str, int]) -> None:
        nonlocal gone
        async with serving(copy) as service:
            for id, revision in acknowledged.items():
                try:
                    view = await seen(service, id)
                except SessionGone:
                    gone += 1
                    continue
                except UnknownSession:
                    # Deleted at this very moment.
                    assert (id, revision + 1) not in states
                    continue
                assert view.revision in (revision, revision + 1)
                assert (view, await asked(service, id)) == states[id, view.revision]
                came_back.add((id, view.revision))

    for copy, acknowledged in taken:
        run(check(copy, acknowledged))
    assert len(taken) == 70 and len(came_back) > 10 and gone > 10


def test_a_ledger_cut_at_any_byte_brings_back_nothing_older(tmp_path: Path) -> None:
    async def work() -> dict[str, tuple[SessionView, tuple[int, ...]]]:
        async with serving(tmp_path / "live") as service:
            made = [(await service.create("ada", text=TEXT)).id for _ in range(2)]
            await service.erase("ada", made[0], "Ada", "mask")
            await written(service)
            await service.append("ada", made[1], text=" It rains.")
            await service.erase("ada", made[0], "noon", "mask", undoable=False)
            await written(service)
            shutil.copytree(tmp_path / "live", tmp_path / "crashed")
            return {id: (await seen(service, id), await asked(service, id)) for id in made}

    last = run(work())
    outcomes: dict[str, int] = {"back": 0, "gone": 0}

    async def check(folder: Path) -> None:
        async with serving(folder) as service:
            for id, state in last.items():
                try:
                    view = await seen(service, id)
                except (SessionGone, UnknownSession):
                    outcomes["gone"] += 1
                else:
                    assert (view, await asked(service, id)) == state
                    outcomes["back"] += 1

    page, header = 4096, 24
    for kind, name in [("crashed", "ledger.sqlite3-wal"), ("live", "ledger.sqlite3")]:
        ledger = (tmp_path / kind / name).read_bytes()
        ends = range(32, len(ledger), page + header) if kind == "crashed" else range(page, len(ledger), page)
        for length in {*range(0, len(ledger), 1999), *ends, *(end - 1 for end in ends), len(ledger)}:
            copy = tmp_path / "cut"
            shutil.copytree(tmp_path / kind, copy)
            (copy / name).write_bytes(ledger[:length])
            run(check(copy))
            shutil.rmtree(copy)
    assert outcomes["back"] >= 4 and outcomes["gone"] > 20


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "another"])
def test_a_damaged_snapshot_makes_its_session_gone_and_no_other(tmp_path: Path, damage: str) -> None:
    async def test() -> None:
        async with serving(tmp_path) as service:
            one = await service.create("ada", text=TEXT)
            two = await service.create("ada", messages=MESSAGES)
            before = await asked(service, two.id)
        path = next(path for path in snapshots(tmp_path) if one.id in path.name)
        content = path.read_bytes()
        if damage == "flipped":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "missing":
            path.unlink()
        else:
            path.write_bytes(next(path for path in snapshots(tmp_path) if two.id in path.name).read_bytes())
        for _ in range(2):
            async with serving(tmp_path) as service:
                for _ in range(2):
                    with pytest.raises(SessionGone):
                        await service.erase("ada", one.id, "Ada", "mask")
                with pytest.raises(UnknownSession):
                    await service.view("bob", one.id)
                assert await asked(service, two.id) == before
                assert [view.id for view in await service.list("ada")] == [two.id]

    run(test())


def test_a_damaged_spill_file_of_a_conversation_is_prefilled_afresh(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path, limits=budget(1.5)) as service:
            await chat(service, conversation(5))
            other = [said("system", 9, 7), *conversation(5)[1:]]
            await chat(service, other)
            [path] = snapshots(tmp_path)
            path.write_bytes(path.read_bytes()[:-20])
            answered = await chat(service, conversation(5))
            assert answered.started.what.action == "prefill" and answered.tokens == uncached(conversation(5))
            assert path not in snapshots(tmp_path)

    run(test())


def test_a_folder_serves_one_server(tmp_path: Path) -> None:
    async def test() -> None:
        async with serving(tmp_path) as service:
            made = await service.create("ada", text=TEXT)
            with pytest.raises(ServeError, match="other server"):
                async with serving(tmp_path):
                    pass
            assert (await service.view("ada", made.id)).id == made.id
        with pytest.raises(ServeError, match="can't be made"):
            (tmp_path / "file").write_text("")
            async with serving(tmp_path / "file" / "folder"):
                pass

    run(test())


# A full disk


class Full(TransformersEngine):
    """An engine whose snapshots find no room while `full`."""

    full = False

    def save(self, held: Any, path: Path) -> None:
        if self.full:
            path.with_name("partly.part").write_bytes(b"half")
            raise SessionFileError(f"can't write the session to {path} (no space left on device)")
        super().save(held, path)


def test_with_a_full_disk_sessions_go_on_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        engine = Full(backbone())
        async with serving(tmp_path, engine=engine) as service:
            one, two = [await service.create("ada", text=TEXT) for _ in range(2)]
            await written(service)
            engine.full = True
            await service.append("ada", one.id, text=" It rains.")
            expected = await asked(service, one.id)
            # A conversation is dropped when it can't be written, a session is not.
            room = service.status()["bytes_held"] + 0.9 * context_bytes()
            service.store.limits = replace(service.store.limits, memory_bytes=int(room))
            with pytest.raises(OutOfSpace, match="can be put on disk"):
                await chat(service, conversation(9))
            service.store.limits = replace(service.store.limits, memory_bytes=int(2 * room))
            assert await asked(service, one.id) == expected
            assert await service.erase("ada", two.id, "Ada", "mask") is not None
        # What had no snapshot is gone, as it was told.
        async with serving(tmp_path) as service:
            for id in (one.id, two.id):
                with pytest.raises(SessionGone):
                    await service.view("ada", id)
            assert not list(tmp_path.glob("*.part"))

    run(test())


def test_when_the_ledger_has_no_room_sessions_go_on_and_are_gone_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with serving(tmp_path) as service:
            one, two = [await service.create("ada", text=TEXT) for _ in range(2)]
            await written(service)
            ledger = service.store.ledger
            assert ledger is not None

            def full(record: Any) -> None:
                raise OutOfSpace("no room")

            monkeypatch.setattr(ledger, "append", full)
            await service.erase("ada", one.id, "Ada", "mask")
            assert "Ada" not in ((await service.view("ada", one.id, contents=True)).text or "")
            await service.undo("ada", one.id)
            with pytest.raises(OutOfSpace):
                await service.create("ada", text=TEXT)
            assert service.status()["sessions"] == 2
        async with serving(tmp_path) as service:
            with pytest.raises(SessionGone):
                await service.view("ada", one.id)
            assert (await service.view("ada", two.id)).revision == 1

    run(test())


# Erasing for good


def test_what_was_erased_for_good_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of the erased words are looked for in all that was ever written, as far as it is still there."""
    destroyed: list[bytes] = []
    original = Path.unlink

    def looking(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".session" and path.is_file():
            destroyed.append(path.read_bytes())
        original(path, missing_ok)

    async def test() -> None:
        async with serving(tmp_path) as service:
            made = await service.create("ada", text=TEXT)
            await written(service)
            entry = service.store.entries[made.id]
            held: Any = entry.held
            place = held.transcript.text.index("Ada")
            token = next(t for t, (start, end) in enumerate(held.transcript.offsets) if start <= place < end)
            keys = held.cache.read(token, token + 1)[0][0].numpy().tobytes()
            [before] = snapshots(tmp_path)
            needle = keys[:32]
            assert needle in before.read_bytes()
            monkeypatch.setattr(Path, "unlink", looking)
            await service.erase("ada", made.id, "Ada", "mask", undoable=False)
            assert snapshots(tmp_path) == [] or needle not in snapshots(tmp_path)[0].read_bytes()
            await written(service)
            [after] = snapshots(tmp_path)
            assert after != before and needle not in after.read_bytes()
            await service.delete("ada", made.id)
            assert snapshots(tmp_path) == []
        assert destroyed and not any(any(content) for content in destroyed)

    run(test())


def test_secure_delete_overwrites_a_file_before_deleting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"secret" * 500_000)
    held = []
    original = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (held.append(path.read_bytes()), original(path)))
    secure_delete(path)
    assert held == [bytes(3_000_000)] and not path.exists()
    secure_delete(path)
