"""Starts `kveraser serve` in a separate process, and makes clients of it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kveraser.errors import InputError, MeasurementError

if TYPE_CHECKING:
    import httpx2
    import openai

COMMAND = (sys.executable, "-m", "kveraser", "serve")
HOST = "127.0.0.1"
MEBIBYTES = 1024
"""In a GiB, in which the server takes its budget."""

START_SECONDS = 300.0
"""How long a server may take to load its model."""

STOP_SECONDS = 60.0
POLL_SECONDS = 0.05
REQUEST_SECONDS = 600.0
KEYS_VARIABLE = "KVERASER_API_KEYS"
SHOWN_LOG = 2000


@dataclass(frozen=True)
class ServerSettings:
    """Options of a server.

    Attributes:
        model, eraser, device, dtype: as the command takes them.
        method: erasing method. None: the server's default.
        memory: budget for contexts in MiB. None: the server's default.
        keys: API keys. Empty: none is required.
    """

    model: str
    eraser: str
    device: str | None = None
    dtype: str | None = None
    method: str | None = None
    memory: float | None = None
    keys: tuple[str, ...] = ()

    def arguments(self, port: int, folder: Path) -> list[str]:
        """The arguments of `kveraser serve`."""
        memory = None if self.memory is None else self.memory / MEBIBYTES
        named = {
            "--host": HOST, "--port": port, "--model": self.model, "--eraser": self.eraser, "--device": self.device,
            "--dtype": self.dtype, "--method": self.method, "--memory": memory, "--sessions": folder,
        }  # fmt: skip
        return [part for name, value in named.items() if value is not None for part in (name, str(value))]

    def shared(self, memory: float, clients: int) -> ServerSettings:
        """The same with another budget, in MiB, and a key for each of several clients."""
        return replace(self, memory=memory, keys=tuple(secrets.token_hex(16) for _ in range(clients)))


class Server:
    """A running server. Leaving the context stops it.

    Args:
        settings: how it is started.
        folder: for its sessions and its log. Another server can use it afterwards.
        command: starts it; arguments are appended.

    Raises:
        InputError: it does not start.
    """

    def __init__(self, settings: ServerSettings, folder: Path, command: Sequence[str] = COMMAND) -> None:
        with socket.create_server((HOST, 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        self.keys, self._log = settings.keys, folder / "server.log"
        environment = {**os.environ, KEYS_VARIABLE: ",".join(settings.keys)} if settings.keys else None
        line = [*command, *settings.arguments(port, folder / "sessions")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def _wait(self) -> None:
        import httpx2

        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if (code := self._process.poll()) is not None:
                shown = self._log.read_text("utf-8", "replace")[-SHOWN_LOG:].strip()
                raise InputError(f"the server ended with code {code} before it was ready: {shown}")
            with suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/health", timeout=5.0).is_success:
                    return
            time.sleep(POLL_SECONDS)
        raise InputError(f"the server was not ready within {START_SECONDS:g} seconds: see whether the model loads")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it with SIGTERM, so that it saves its sessions; kill it if it does not end.

        Raises:
            MeasurementError: it had to be killed.
        """
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise MeasurementError(f"the server did not end within {STOP_SECONDS:g} seconds of SIGTERM") from None

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self._process.kill()
        self._process.wait()

    # Clients

    def http(self, client: int = 0) -> httpx2.Client:
        """For the routes of sessions, which OpenAI's client does not know.

        Args:
            client: whose key it has, by number.
        """
        import httpx2

        headers = {"authorization": f"Bearer {self.keys[client % len(self.keys)]}"} if self.keys else {}
        return httpx2.Client(base_url=self.url, timeout=REQUEST_SECONDS, headers=headers)

    def client(self) -> openai.OpenAI:
        """OpenAI's client, without retries, which would be timed too."""
        import openai

        key = self.keys[0] if self.keys else "unused"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=REQUEST_SECONDS)

    def model(self) -> str:
        """The name of the model."""
        with self.client() as client:
            return client.models.list().data[0].id


def numbers(client: httpx2.Client) -> dict[str, float]:
    """The server's metrics without labels, by name."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(client.get("/metrics").raise_for_status().text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
