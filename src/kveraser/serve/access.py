"""Access control: API keys, host names, and limits on request rates and concurrency."""

from __future__ import annotations

import hmac
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kveraser.errors import InputError
from kveraser.serve.errors import InvalidRequest, Overloaded, Unauthorized

ANONYMOUS = "anonymous"
"""Owner of all contexts on a server without keys."""

SHORTEST_KEY = 16
OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""Paths that need no key: the playground, which uses the key of its user, health, and the API description."""

PAGE_PATH = "/page/"


class Keys:
    """The accepted API keys, stored as hashes.

    Args:
        keys: the keys; if empty, all requests belong to one anonymous owner.

    Raises:
        InputError: a key is too short, or not printable ASCII without spaces.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        hashes = []
        for number, key in enumerate(keys, start=1):
            if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(
                    f"API key {number} has {len(key)} characters: give at least {SHORTEST_KEY}, of printable ASCII "
                    "without spaces, such as `openssl rand -hex 24` prints"
                )
            hashes.append(_hash(key.encode()))
        self._hashes = tuple(dict.fromkeys(hashes))

    def __len__(self) -> int:
        return len(self._hashes)

    def owner(self, authorization: str | None) -> str:
        """The owner for an `Authorization` header: a hash of the key, so that the key itself is not stored.

        Raises:
            Unauthorized: the header contains none of the keys.
        """
        if not self._hashes:
            return ANONYMOUS
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise Unauthorized("there is no API key: send the header Authorization: Bearer KEY")
        hashed = _hash(given.strip().encode())
        # Compare every key, each in constant time.
        matches = [hmac.compare_digest(hashed, known) for known in self._hashes]
        if not any(matches):
            raise Unauthorized("the API key is not one of this server's: check it")
        return hashed


def _hash(key: bytes) -> str:
    return sha256(b"kveraser owner\0" + key).hexdigest()


def read_keys(file: Path | None = None, variable: str = "KVERASER_API_KEYS") -> Keys:
    """Read keys from a file, one per line (`#` begins a comment), and from an environment variable with commas.

    Raises:
        InputError: the file can't be read or contains no key, or a key is invalid.
    """
    keys = [key.strip() for key in os.environ.get(variable, "").split(",")]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"can't read the API keys in {file} ({error}): check the path") from error
        listed = [line.partition("#")[0].strip() for line in lines]
        if not any(listed):
            raise InputError(f"{file} holds no API key: write one per line, or omit the file")
        keys += listed
    return Keys(key for key in keys if key)


@dataclass(frozen=True)
class Limits:
    """Request limits per key.

    Attributes:
        requests_per_minute: on average; bursts may use the requests of one minute at once. None: no limit.
        requests_at_once: maximum concurrent requests.
    """

    requests_per_minute: float | None = None
    requests_at_once: int = 32


class Gate:
    """Enforces the request limits of each owner.

    Args:
        limits: per owner.
        clock: monotonic time in seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.clock = limits, clock
        self._running: dict[str, int] = {}
        self._left: dict[str, tuple[float, float]] = {}

    def enter(self, owner: str) -> None:
        """Admit a request. Call `leave` when its response has ended.

        Raises:
            Overloaded: the owner has too many concurrent requests, or exceeds its rate.
        """
        running = self._running.get(owner, 0)
        if running >= self.limits.requests_at_once:
            raise Overloaded(
                f"{running} requests of this key are being answered, the limit: wait for one of them",
                code="too_many_requests_at_once",
                retry_after=1,
            )
        rate = self.limits.requests_per_minute
        if rate is not None:
            now, most = self.clock(), max(1.0, rate)
            left, since = self._left.get(owner, (most, now))
            left = min(most, left + (now - since) * rate / 60)
            if left < 1:
                raise Overloaded(
                    f"this key may ask {rate:g} times a minute: wait", retry_after=math.ceil((1 - left) * 60 / rate)
                )
            self._left[owner] = left - 1, now
        self._running[owner] = running + 1

    def leave(self, owner: str) -> None:
        """Count a request as ended."""
        self._running[owner] -= 1
        if not self._running[owner]:
            del self._running[owner]


class Access:
    """ASGI middleware that authenticates requests, sets `scope["owner"]` and enforces limits.

    Errors are raised before the body is read.

    Args:
        hosts: accepted host names without ports; None: any. On a loopback address this prevents DNS rebinding.
    """

    def __init__(self, app: ASGIApp, keys: Keys, gate: Gate, hosts: frozenset[str] | None) -> None:
        self.app, self.keys, self.gate, self.hosts = app, keys, gate, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            raise InvalidRequest(
                f"this server is not asked as {host!r}: use {', '.join(sorted(self.hosts))}, or start it with "
                "--allowed-host",
                code="unknown_host",
            )
        path: str = scope["path"]
        if path in OPEN_PATHS or path.startswith(PAGE_PATH):
            scope["owner"] = None
            await self.app(scope, receive, send)
            return
        owner = self.keys.owner(headers.get("authorization"))
        scope["owner"] = owner
        self.gate.enter(owner)
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.leave(owner)


def _name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    if host.startswith("["):
        return host.partition("]")[0].removeprefix("[").lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()
