"""What the API calls: answers from cached conversations, and sessions that clients edit by hand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from kveraser.probes import Probe
from kveraser.serve.engine import Sampling, TokenLogprob
from kveraser.serve.exchange import (
    Action,
    Caches,
    Delta,
    Erasing,
    Event,
    Finished,
    Happened,
    MessageView,
    ModelCard,
    SessionView,
    Started,
    TokenView,
    Turn,
)
from kveraser.serve.tool_results import ToolResultEdit


class Service:
    """Contexts in caches, and what is done with them. Every method raises `ServeError` only.

    `key` is whose contexts they are: nothing is ever shared between keys, and a foreign session is an unknown one.
    """

    def models(self) -> Sequence[ModelCard]:
        """The models that can be asked."""
        raise NotImplementedError

    def generate(self, key: str, turn: Turn) -> AsyncIterator[Event]:
        """Answer a request: one `Started`, `Delta`s, one `Finished`. Closing the iterator cancels.

        The first `__anext__` raises whatever is wrong with the request.
        """
        raise NotImplementedError

    async def create(
        self,
        key: str,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        ttl: float | None = None,
    ) -> SessionView:
        """A new session of messages or a text, prefilled. `ttl` in seconds from its last use; None: the server's."""
        raise NotImplementedError

    async def list(self, key: str) -> Sequence[SessionView]:
        """The key's sessions, oldest first."""
        raise NotImplementedError

    async def view(self, key: str, id: str, contents: bool = False) -> SessionView:
        """One session."""
        raise NotImplementedError

    async def tokens(self, key: str, id: str) -> Sequence[TokenView]:
        """Every token of a session, erased ones included."""
        raise NotImplementedError

    async def delete(self, key: str, id: str) -> None:
        """Delete a session; its states are overwritten, on disk too."""
        raise NotImplementedError

    async def erase(
        self,
        key: str,
        id: str,
        what: Any,
        method: str | None = None,
        max_kl: float | None = None,
        undoable: bool = True,
    ) -> dict[str, Any]:
        """Erase from a session; the receipt. `what`: a selector as `selector_from_json` reads it, or a list of them.

        A list of two integers is one range of characters, as in case files.
        """
        raise NotImplementedError

    async def undo(self, key: str, id: str, steps: int = 1) -> SessionView:
        """Take back the session's last operations: erases, appends, kept answers."""
        raise NotImplementedError

    async def fork(self, key: str, id: str) -> SessionView:
        """An independent copy."""
        raise NotImplementedError

    async def audit(
        self,
        key: str,
        id: str,
        probes: Sequence[str | Probe] | None = None,
        secrets: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Measure what the session's erases achieved."""
        raise NotImplementedError

    async def append(
        self,
        key: str,
        id: str,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: str | None = None,
    ) -> SessionView:
        """Add messages to a conversation, or text to a text session."""
        raise NotImplementedError

    def ask(
        self,
        key: str,
        id: str,
        question: str,
        sampling: Sampling | None = None,
        keep: bool = False,
        caches: Caches = "edited",
    ) -> AsyncIterator[Event]:
        """Ask a session; events as of `generate`.

        Args:
            keep: question and answer become part of the session; only with `edited`.
            caches: answer from the session's own cache; from one in which nothing was erased; or from an exact one.
        """
        raise NotImplementedError

    def status(self) -> dict[str, float]:
        """Numbers for health and metrics: contexts, sessions, bytes_held, bytes_spilled, waiting, streams."""
        raise NotImplementedError

    async def close(self) -> None:
        """Write what is not on disk yet, and let everything go."""
        raise NotImplementedError


__all__ = [
    "Action", "Caches", "Delta", "Erasing", "Event", "Finished", "Happened", "MessageView", "ModelCard", "Sampling",
    "Service", "SessionView", "Started", "TokenLogprob", "TokenView", "ToolResultEdit", "Turn",
]  # fmt: skip
