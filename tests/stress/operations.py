"""What clients do with a server's sessions: seeded operations, one after the other, each recorded once answered."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from evaluation.serving.texts import PEOPLE, QUESTIONS, said, short_conversation

if TYPE_CHECKING:
    import httpx2

Kind = Literal["create", "append", "erase", "undo", "ask", "keep", "fork", "view", "delete"]
"""`keep` is a question that stays in the session, with its answer."""

WEIGHTS: dict[Kind, int] = {"erase": 5, "undo": 3, "ask": 6, "keep": 2, "append": 3, "fork": 1}
"""How often each operation is chosen."""

CHANGING: frozenset[Kind] = frozenset({"create", "append", "erase", "undo", "keep"})
"""Operations after which a session is another one, at the next revision."""

METHODS = ("repair(16)", "shift", "recompute")
LEARNED = "kveraser"
"""Erased with as well where there is an eraser."""

REFUSED = frozenset({400, 409})
"""Statuses of an operation that the session can't take."""

SENTENCE = re.compile(r"Parcel \d{5} [^.]*\.")
LIKELY = 2
LONGEST_WAIT = 5.0


@dataclass(frozen=True)
class LoadSettings:
    """What sessions are like.

    Attributes:
        turn: tokens of a message.
        most_tokens: a session that has read and said more is deleted, and another one made.
        answer: most tokens of an answer.
        methods: to erase with.
    """

    turn: int = 48
    most_tokens: int = 700
    answer: int = 12
    methods: tuple[str, ...] = METHODS


@dataclass(frozen=True)
class Operation:
    """One operation: its kind, and the body of its request."""

    kind: Kind
    body: dict[str, Any]


@dataclass(frozen=True)
class Said:
    """An answer.

    Attributes:
        tokens: the text of each.
        logprobs: of each, in nats.
        gaps: at each place, between the two likeliest tokens, in nats.
    """

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float, ...]


@dataclass(frozen=True)
class Done:
    """An operation that the server has answered; `refused` is what it said against it."""

    operation: Operation
    refused: str | None = None
    said: Said | None = None


@dataclass
class Followed:
    """A session as its client knows it.

    Attributes:
        done: all operations on it, from its creation on; in a fork those of its origin before it.
        own: how many of these were another session's.
        revision: last acknowledged.
        view: the last one with contents, while it is what the session is; else None.
        sent: the operation that the server has not answered yet.
    """

    id: str
    done: list[Done]
    revision: int
    own: int = 0
    view: dict[str, Any] | None = None
    sent: Operation | None = None

    @property
    def path(self) -> str:
        return f"/v1/sessions/{self.id}"


class Fault(Exception):
    """An answer that no client should get: a server's error, or a session that is not there any more."""


@dataclass
class Worker:
    """One client: its sessions, and what became of its requests.

    Attributes:
        seconds: of every answered request, waiting for room included, by kind.
        waits: how often the server asked it to come back later.
        ended: sessions that it has deleted.
    """

    client: httpx2.Client
    tokenizer: Any
    random: Random
    settings: LoadSettings
    most_sessions: int
    sessions: list[Followed] = field(default_factory=list)
    ended: list[Followed] = field(default_factory=list)
    seconds: dict[Kind, list[float]] = field(default_factory=dict)
    refused: dict[Kind, int] = field(default_factory=dict)
    waits: int = 0
    answer_tokens: int = 0

    def create(self) -> Followed:
        """A new session."""
        messages = short_conversation(self.tokenizer, self.random, self.settings.turn)
        operation = Operation("create", {"messages": messages})
        reply = self._request("create", "POST", "/v1/sessions", operation.body)
        assert not isinstance(reply, str), reply
        session = Followed(reply["id"], [Done(operation)], reply["revision"])
        self.sessions.append(session)
        return session

    def step(self) -> None:
        """One operation on one of the sessions.

        Raises:
            Fault: the server failed. httpx2.TransportError: it is not there.
        """
        session = self.random.choice(self.sessions)
        kind = self.random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if kind == "fork":
            self._fork(session)
            return
        if kind == "erase":
            self._look(session)
            if session.view is not None and session.view["tokens"] > self.settings.most_tokens:
                self._leave(session)
                session = self.create()
                self._look(session)
        self.perform(session, self._chosen(kind, session))

    def _look(self, session: Followed) -> None:
        """Read what the session holds, unless that is known."""
        if session.view is None:
            view = self._request("view", "GET", f"{session.path}?contents=true", None)
            if isinstance(view, str):
                raise Fault(f"session {session.id} can't be read: {view}")
            if view["revision"] != session.revision:
                raise Fault(
                    f"session {session.id} is at revision {view['revision']}, its client left it at {session.revision}"
                )
            session.view = view

    def _chosen(self, kind: Kind, session: Followed) -> Operation:
        random, settings = self.random, self.settings
        if kind == "undo":
            return Operation("undo", {"steps": random.choice((1, 1, 2))})
        spans = _erasable(random, session.view) if kind == "erase" and session.view is not None else []
        if spans:
            method, undoable = random.choice(settings.methods), random.random() > 0.1
            return Operation("erase", {"spans": spans, "method": method, "undoable": undoable})
        if kind in ("ask", "keep"):
            question = random.choice((*QUESTIONS, f"What do you know about {random.choice(PEOPLE)}?"))
            return ask(question, settings.answer, kind == "keep")
        text = said(random, self.tokenizer, settings.turn)
        added = [{"role": "assistant", "content": "Noted."}, {"role": "user", "content": text}]
        return Operation("append", {"messages": added})

    def perform(self, session: Followed, operation: Operation) -> Done:
        """Do something with a session, and record it once the server has answered."""
        kind = operation.kind
        route = {"append": "messages", "keep": "ask"}.get(kind, kind)
        session.sent = operation
        reply = self._request(kind, "POST", f"{session.path}/{route}", operation.body)
        session.sent = None
        if isinstance(reply, str):
            done = Done(operation, refused=reply)
        else:
            done = Done(operation, said=said_of(reply) if kind in ("ask", "keep") else None)
            if kind in CHANGING:
                session.revision = reply.get("revision", session.revision + 1)
                session.view = None
        if done.said is not None:
            self.answer_tokens += len(done.said.tokens)
        session.done.append(done)
        return done

    def _fork(self, session: Followed) -> None:
        reply = self._request("fork", "POST", f"{session.path}/fork", None)
        if isinstance(reply, str):
            return
        self.sessions.append(Followed(reply["id"], list(session.done), reply["revision"], own=len(session.done)))
        if len(self.sessions) > self.most_sessions:
            self._leave(self.random.choice(self.sessions))

    def _leave(self, session: Followed) -> None:
        session.sent = Operation("delete", {})
        self._request("delete", "DELETE", session.path, None)
        self.sessions.remove(session)
        self.ended.append(session)

    def _request(self, kind: Kind, verb: str, path: str, body: dict[str, Any] | None) -> dict[str, Any] | str:
        """The server's reply, or why it refused."""
        started = time.perf_counter()
        while True:
            response = self.client.request(verb, path, json=body)
            if response.status_code != 429:
                break
            self.waits += 1
            time.sleep(min(float(response.headers.get("retry-after", 1.0)), LONGEST_WAIT))
        self.seconds.setdefault(kind, []).append(time.perf_counter() - started)
        reply: dict[str, Any] = response.json()
        if response.is_success:
            return reply
        message = str(reply["error"]["message"])
        if response.status_code not in REFUSED:
            raise Fault(f"{kind}: {response.status_code} {message}")
        self.refused[kind] = self.refused.get(kind, 0) + 1
        return message


def ask(question: str, tokens: int, keep: bool = False) -> Operation:
    """A greedy question."""
    body = {"question": question, "max_tokens": tokens, "temperature": 0, "logprobs": LIKELY, "keep": keep}
    return Operation("keep" if keep else "ask", body)


def said_of(reply: dict[str, Any]) -> Said:
    """The answer in a reply of a session."""
    tokens: Sequence[dict[str, Any]] = reply["tokens"]
    return Said(
        reply["text"],
        tuple(token["token"] for token in tokens),
        tuple(token["logprob"] for token in tokens),
        tuple(token["top"][0]["logprob"] - token["top"][1]["logprob"] for token in tokens),
    )


def _erasable(random: Random, view: dict[str, Any]) -> list[dict[str, Any]]:
    """A live message or one sentence of it, to erase; the system prompt stays."""
    live = [message for message in view["messages"] if message["live"] and message["role"] != "system"]
    if not live:
        return []
    message = random.choice(live)
    found = SENTENCE.findall(message["text"] or "")
    if found and random.random() < 0.6:
        return [{"text": random.choice(found)}]
    return [{"message": message["index"]}]
