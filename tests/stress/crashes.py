"""A server that is killed at random moments under load: what its sessions are when another takes up their folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event
from typing import Any, Literal

from evaluation.serving.run import Bar
from evaluation.serving.server import Server, ServerSettings
from evaluation.serving.texts import QUESTIONS
from kveraser.errors import KVEraserError
from kveraser.model.backbone import Backbone
from tests.stress.operations import (
    CHANGING,
    Done,
    Fault,
    Followed,
    LoadSettings,
    Operation,
    Worker,
    ask,
    said_of,
)
from tests.stress.replay import Alone, Compared, Reference

State = Literal["back", "gone", "wrong"]
SHOWN = 20


@dataclass(frozen=True)
class CrashSettings:
    """What happens to the server.

    Attributes:
        times: how often it is killed.
        sessions, clients: in all, as in the soak; what does not come back is made anew.
        moment: shortest and longest time in seconds from the beginning of the load, when all sessions are there, to the
            kill. The server writes a session when it has time, and at the latest 10 seconds after a change.
        pause: mean seconds between a client's requests; in them the server finds time to write.
        seed: of what the clients do, and of the moments.
    """

    times: int = 20
    sessions: int = 12
    clients: int = 4
    moment: tuple[float, float] = (0.5, 20.0)
    pause: float = 0.5
    seed: int = 0
    load: LoadSettings = field(default_factory=LoadSettings)


@dataclass(frozen=True)
class CrashRow:
    """One kill.

    Attributes:
        moment: seconds from the beginning of the load.
        acknowledged: operations that the server had answered since the kill before.
        sessions: that it had acknowledged; each is back, gone or wrong.
        back: at the acknowledged revision with the same live text and greedy answer, or so with the one operation
            besides that was under way; `ahead` counts the latter.
        gone: reported gone (410).
        wrong: anything else.
        unknown: sessions that nobody had been told of.
    """

    moment: float
    acknowledged: int
    sessions: int
    back: int
    ahead: int
    gone: int
    wrong: int
    unknown: int


@dataclass(frozen=True)
class CrashResult:
    """A row a kill; `faults` are answers before a kill that no client should get."""

    rows: tuple[CrashRow, ...]
    back: int
    gone: int
    wrong: int
    shown_wrong: tuple[str, ...]
    faults: tuple[str, ...]


def measure(
    server: ServerSettings,
    folder: Path,
    backbone: Backbone,
    settings: CrashSettings,
    progress: Callable[[str], None] | None = None,
) -> CrashResult:
    """Start, load, kill and look, again and again on the same folder.

    Args:
        folder: an empty one for the servers.
    """
    report = progress or (lambda _: None)
    random = Random(f"{settings.seed}/moments")
    rows, wrong, faults = list[CrashRow](), list[str](), list[str]()
    clients = range(min(settings.clients, settings.sessions))
    shares = [len(range(client, settings.sessions, settings.clients)) for client in clients]
    alone: dict[str, Alone] = {}
    kept: list[list[Followed]] = [[] for _ in shares]
    running = Server(server, folder)
    try:
        with Reference(backbone) as reference:
            for number in range(settings.times):
                report(f"load {number + 1} of {settings.times}")
                seeds = [Random(f"{settings.seed}/{number}/{client}") for client in range(len(shares))]
                workers = [
                    # Tokenizers are not to be shared between threads.
                    Worker(running.http(), copy.deepcopy(backbone.tokenizer), seed, settings.load, share, sessions)
                    for seed, share, sessions in zip(seeds, shares, kept, strict=True)
                ]
                before = _done(workers)
                moment = random.uniform(*settings.moment)
                faults += _load_and_kill(running, workers, moment, settings.pause)
                running = Server(server, folder)
                report(f"looking at what came back, {number + 1} of {settings.times}")
                done = _done(workers) - before
                row, found = _look(running, workers, alone, reference, moment, done, settings.load.answer)
                rows.append(row)
                wrong += found
                kept = [worker.sessions for worker in workers]
        running.stop()
    except BaseException:
        running.kill()
        raise
    return CrashResult(
        rows=tuple(rows),
        back=sum(row.back for row in rows),
        gone=sum(row.gone for row in rows),
        wrong=sum(row.wrong for row in rows),
        shown_wrong=tuple(wrong[:SHOWN]),
        faults=tuple(faults[:SHOWN]),
    )


def bars(result: CrashResult) -> list[Bar]:
    """Every figure that has a bar."""
    faults = len(result.faults)
    return [
        Bar("crashes", "wrong sessions", float(result.wrong), "0", result.wrong == 0),
        Bar("crashes", "faults before a kill", float(faults), "0", faults == 0),
    ]


def _done(workers: Sequence[Worker]) -> int:
    """How many operations of the clients' sessions have been answered."""
    sessions = [session for worker in workers for session in (*worker.sessions, *worker.ended)]
    return sum(len(session.done) - session.own for session in sessions)


def _load_and_kill(server: Server, workers: Sequence[Worker], moment: float, pause: float) -> list[str]:
    """Let the clients work until the server is killed; the faults they met before."""
    from httpx2 import TransportError

    killed, faults = Event(), list[str]()

    def fill(worker: Worker) -> None:
        while len(worker.sessions) < worker.most_sessions:
            worker.create()

    def work(worker: Worker) -> None:
        try:
            while not killed.wait(worker.random.expovariate(1 / pause)):
                worker.step()
        except TransportError as error:
            if not killed.is_set():
                faults.append(f"{type(error).__name__}: {error}")
        except Fault as fault:
            faults.append(str(fault))

    with ThreadPoolExecutor(len(workers)) as threads:
        list(threads.map(fill, workers))
        working = [threads.submit(work, worker) for worker in workers]
        killed.wait(moment)
        # Set first: a connection that breaks is expected from now on.
        killed.set()
        server.kill()
        for one in working:
            one.result()
    for worker in workers:
        worker.client.close()
    return faults


def _look(
    server: Server,
    workers: Sequence[Worker],
    alone: dict[str, Alone],
    reference: Reference,
    moment: float,
    acknowledged: int,
    answer: int,
) -> tuple[CrashRow, list[str]]:
    """What became of every session; those that are not back are taken from their clients."""
    counts: dict[State, int] = {"back": 0, "gone": 0, "wrong": 0}
    ahead, wrong, sessions = 0, list[str](), 0
    with server.http() as client:
        listed = client.get("/v1/sessions").raise_for_status().json()["data"]
        known = {one.id for worker in workers for one in (*worker.sessions, *worker.ended)}
        for worker in workers:
            deleted = [session for session in worker.sessions if session.sent and session.sent.kind == "delete"]
            worker.sessions[:] = [session for session in worker.sessions if session not in deleted]
            worker.ended += deleted
            for session in list(worker.sessions):
                sessions += 1
                reached = len(session.done)
                state, reason = came_back(client, session, alone, reference, answer)
                counts[state] += 1
                ahead += len(session.done) > reached
                if state == "wrong":
                    wrong.append(f"session {session.id} after {session.done[-1].operation.kind}: {reason}")
                if state != "back":
                    worker.sessions.remove(session)
        kept = {session.id for worker in workers for session in worker.sessions}
        for id in set(alone) - kept:
            alone.pop(id).close()
        unknown = [session["id"] for session in listed if session["id"] not in known]
        for id in unknown:
            client.delete(f"/v1/sessions/{id}").raise_for_status()
    row = CrashRow(moment, acknowledged, sessions, counts["back"], ahead, counts["gone"], counts["wrong"], len(unknown))
    return row, wrong


def came_back(
    client: Any, session: Followed, alone: dict[str, Alone], reference: Reference, answer: int
) -> tuple[State, str]:
    """Whether a session is what it was, and if it is wrong why. One that is back is brought up to date."""
    response = client.get(f"{session.path}?contents=true")
    if response.status_code == 410:
        return "gone", ""
    if not response.is_success:
        return "wrong", f"{response.status_code} {response.text}"
    view = response.json()
    one = alone.setdefault(session.id, Alone(session.id, reference))
    one.follow(session.done, session.own)
    if one.differences:
        difference = one.differences[0]
        return "wrong", f"it said {difference.served!r} before the kill, alone it says {difference.alone!r}"
    sent, session.sent, session.view = session.sent, None, None
    if sent is not None and sent.kind in CHANGING and view["revision"] == session.revision + 1:
        # Nobody was told of it, and it was done all the same.
        try:
            one.apply(sent)
        except KVEraserError as error:
            return "wrong", f"revision {view['revision']} came of an operation that is refused: {error}"
        session.done.append(Done(sent))
        session.revision += 1
        one.reached += 1
    if view["revision"] != session.revision:
        return "wrong", f"revision {view['revision']}, acknowledged was {session.revision}"
    if one.parted:
        return "back", ""
    if view["text"] != one.text():
        return "wrong", f"its text is {view['text']!r}, alone it is {one.text()!r}"
    return _answers(client, session, one, ask(QUESTIONS[-1], answer))


def _answers(client: Any, session: Followed, one: Alone, question: Operation) -> tuple[State, str]:
    response = client.post(f"{session.path}/ask", json=question.body)
    if not response.is_success:
        return "wrong", f"it can't be asked: {response.status_code} {response.text}"
    served = said_of(response.json())
    own = one.apply(question)
    if own is None or not Compared.of(own, served).agree:
        return "wrong", f"it answers {served.text!r}, alone it answers {own and own.text!r}"
    return "back", ""
