"""Many sessions under mixed operations: whether anything fails, crosses from session to session, or piles up."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from random import Random
from threading import Barrier, Event
from typing import Any

import numpy as np

from evaluation.serving.run import Bar
from evaluation.serving.server import Server, numbers
from kveraser.model.backbone import Backbone
from tests.stress.operations import Fault, LoadSettings, Worker
from tests.stress.replay import Alone, Difference, Reference

ALL = "all"
WATCH_SECONDS = 0.2
NOT_FOUND = 404
SHOWN = 20
"""Errors and differences that a result lists; all are counted."""


@dataclass(frozen=True)
class SoakSettings:
    """What the clients do.

    Attributes:
        sessions, clients: in all; every client has sessions of its own.
        seconds: for which they do it, once all sessions are there.
        memory: the server's budget for contexts in MiB.
        seed: of what each client does, though not of when.
    """

    sessions: int = 32
    clients: int = 8
    seconds: float = 300.0
    memory: float = 512.0
    seed: int = 0
    load: LoadSettings = field(default_factory=LoadSettings)


@dataclass(frozen=True)
class SoakRow:
    """Requests of one kind, or all: how many, how many the session could not take, and their seconds."""

    kind: str
    count: int
    refused: int
    p50_seconds: float
    p95_seconds: float
    most_seconds: float


@dataclass(frozen=True)
class SoakResult:
    """What became of it.

    Attributes:
        errors: server errors, sessions that were not there, broken connections; the first of them in `shown_errors`.
        compared: greedy answers that were compared with the same operations run alone; `ties` of them differ where two
            tokens are equally likely, and `unchecked` could not be compared since such an answer was kept.
        states: sessions whose live text was compared at the end.
        foreign: requests with the key of another client than the session's, told that there is no such session.
        differences: answers, refusals and texts that differ otherwise; the first of them in `shown_differences`.
        largest: the largest difference of an answer token's log-probability, in nats.
        waits: how often a client was asked to come back later.
        memory_budget, most_held, most_spilled: in bytes, of contexts.
        requests_per_second, answer_tokens_per_second: of all clients together.
    """

    rows: tuple[SoakRow, ...]
    sessions: int
    seconds: float
    errors: int
    shown_errors: tuple[str, ...]
    compared: int
    ties: int
    unchecked: int
    states: int
    foreign: int
    differences: int
    shown_differences: tuple[dict[str, Any], ...]
    largest: float
    waits: int
    memory_budget: int
    most_held: int
    most_spilled: int
    requests_per_second: float
    answer_tokens_per_second: float


def measure(
    server: Server, backbone: Backbone, settings: SoakSettings, progress: Callable[[str], None] | None = None
) -> SoakResult:
    """Run the clients, then every session's operations alone."""
    from httpx2 import TransportError

    report = progress or (lambda _: None)
    clients = range(min(settings.clients, settings.sessions))
    shares = [len(range(client, settings.sessions, settings.clients)) for client in clients]
    workers = []
    for number, share in enumerate(shares):
        # Tokenizers are not to be shared between threads.
        tokenizer, random = copy.deepcopy(backbone.tokenizer), Random(f"{settings.seed}/{number}")
        workers.append(Worker(server.http(number), tokenizer, random, settings.load, share))
    errors, started, over = list[str](), list[float](), Event()
    ready = Barrier(len(workers), lambda: started.append(time.perf_counter()))

    def work(worker: Worker) -> None:
        try:
            for _ in range(worker.most_sessions):
                worker.create()
            ready.wait()
        except BaseException:
            ready.abort()
            raise
        while time.perf_counter() < started[0] + settings.seconds and worker.sessions:
            try:
                worker.step()
            except Fault as fault:
                errors.append(str(fault))
                worker.ended += [session for session in worker.sessions if session.sent is not None]
                worker.sessions[:] = [session for session in worker.sessions if session.sent is None]
            except TransportError as error:
                errors.append(f"{type(error).__name__}: {error}")
                return

    held, spilled, foreign = [0.0], [0.0], [0]

    def watch() -> None:
        random = Random(f"{settings.seed}/foreign")
        with server.http() as client:
            while not over.wait(WATCH_SECONDS):
                with suppress(TransportError):
                    seen = numbers(client)
                    held.append(seen["kveraser_bytes_held"])
                    spilled.append(seen["kveraser_bytes_spilled"])
                    # Of the first client, which asks here, nothing is foreign.
                    others = [session for worker in workers[1:] for session in list(worker.sessions)]
                    if others and len(server.keys) > 1:
                        path = random.choice(others).path
                        verb, path = random.choice((("GET", path), ("POST", f"{path}/undo"), ("POST", f"{path}/audit")))
                        status = client.request(verb, path, json={} if verb == "POST" else None).status_code
                        foreign[0] += status == NOT_FOUND
                        if status != NOT_FOUND:
                            errors.append(f"{verb} of another key's session: {status}")

    report(f"{settings.sessions} sessions of {settings.clients} clients for {settings.seconds:g} seconds")
    with ThreadPoolExecutor(len(workers) + 1) as threads:
        watching = threads.submit(watch)
        try:
            working = [threads.submit(work, worker) for worker in workers]
            for one in working:
                one.result()
        finally:
            over.set()
        watching.result()
    seconds = time.perf_counter() - started[0]
    alone, states = _replayed(workers, backbone, errors, report)
    for worker in workers:
        worker.client.close()
    differences = [difference for one in alone for difference in one.differences]
    requests = sum(len(times) for worker in workers for times in worker.seconds.values())
    return SoakResult(
        rows=tuple(_rows(workers)),
        sessions=len(alone),
        seconds=seconds,
        errors=len(errors),
        shown_errors=tuple(errors[:SHOWN]),
        compared=sum(one.compared for one in alone),
        ties=sum(one.ties for one in alone),
        unchecked=sum(one.unchecked for one in alone),
        states=states,
        foreign=foreign[0],
        differences=len(differences),
        shown_differences=tuple(asdict(difference) for difference in differences[:SHOWN]),
        largest=max((one.largest for one in alone), default=0.0),
        waits=sum(worker.waits for worker in workers),
        memory_budget=int(settings.memory * 2**20),
        most_held=int(max(held)),
        most_spilled=int(max(spilled)),
        requests_per_second=requests / seconds,
        answer_tokens_per_second=sum(worker.answer_tokens for worker in workers) / seconds,
    )


def bars(result: SoakResult) -> list[Bar]:
    """Every figure that has a bar."""
    held, budget = result.most_held / 2**20, result.memory_budget / 2**20
    different = result.differences
    return [
        Bar("soak", "errors", float(result.errors), "0", result.errors == 0),
        Bar("soak", "differences from the same operations alone", float(different), "0", different == 0),
        Bar("soak", "most memory of contexts, MiB", held, f"at most {budget:g}", held <= budget),
    ]


def _replayed(
    workers: Sequence[Worker], backbone: Backbone, errors: list[str], report: Callable[[str], None]
) -> tuple[list[Alone], int]:
    """Every session run alone, and how many of their texts were compared with the served ones."""
    replayed, states = list[Alone](), 0
    total = sum(len(worker.sessions) + len(worker.ended) for worker in workers)
    with Reference(backbone) as reference:
        for worker in workers:
            for session in [*worker.sessions, *worker.ended]:
                report(f"session {len(replayed) + 1} of {total} run alone")
                one = Alone(session.id, reference)
                one.follow(session.done, session.own)
                if session.sent is None and not one.parted:
                    view = worker.client.get(f"{session.path}?contents=true")
                    if view.is_success:
                        states += 1
                        served, text = view.json()["text"], one.text()
                        if served != text:
                            last = session.done[-1].operation
                            difference = Difference(session.id, len(session.done), last, served, text or "")
                            one.differences.append(difference)
                    else:
                        errors.append(f"view: {view.status_code} {view.text}")
                one.close()
                replayed.append(one)
    return replayed, states


def _rows(workers: Sequence[Worker]) -> list[SoakRow]:
    kinds = list(dict.fromkeys(kind for worker in workers for kind in worker.seconds))
    times = {kind: [one for worker in workers for one in worker.seconds.get(kind, [])] for kind in kinds}
    refused = {kind: sum(worker.refused.get(kind, 0) for worker in workers) for kind in kinds}
    everything = [one for listed in times.values() for one in listed]
    return [
        SoakRow(kind, len(listed), count, *(float(np.percentile(listed, share)) for share in (50, 95, 100)))
        for kind, listed, count in [
            (ALL, everything, sum(refused.values())),
            *((kind, times[kind], refused[kind]) for kind in sorted(kinds)),
        ]
    ]
