"""Request and response bodies of the session routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kveraser.measure.probes import Probe
from kveraser.measure.receipt import ProbeKind
from kveraser.serve.body import WHOLE, Reply, Request
from kveraser.serve.engine import Sampling
from kveraser.serve.fields import (
    Happening,
    MethodName,
    SamplingFields,
    Selector,
    Usage,
    budget_fits,
)
from kveraser.serve.messages import Messages, Tool, answered
from kveraser.serve.types import Caches

LONGEST_LIFE = 366 * 24 * 3600.0
"""Maximum time to live of an unused session, in seconds."""

Words = Annotated[str, Field(min_length=1, pattern=r"\S")]

CONVERSATION = [
    {"role": "user", "content": "Where is my parcel?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"what": "parcel"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "It is in Rome, shelf 44."},
    {"role": "assistant", "content": "It waits in Rome."},
]


def _examples(*bodies: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


# Requests


class Contents(Request):
    """The contents of a session or an addition to it: messages or a text."""

    messages: Messages | None = None
    text: Words | None = None
    allow_special: bool = Field(
        False, description="Special tokens in messages, tools and text act as control tokens; otherwise they are text."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a session is made of messages or of a text: give one of them")
        return self

    def plain_messages(self) -> list[dict[str, Any]] | None:
        """The messages as dictionaries for chat templates."""
        return None if self.messages is None else [message.plain() for message in self.messages]


class NewSession(Contents):
    """A new session."""

    model_config = _examples({"messages": CONVERSATION}, {"text": "The ship left at noon. The captain is Ada."})

    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    ttl: float | None = Field(None, gt=0, le=LONGEST_LIFE, description="Seconds unused after which it is deleted.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.messages is not None:
            answered(self.messages)
        elif self.tools:
            raise ValueError("tools belong to messages: give messages, or leave the tools out")
        return self


class NewMessages(Contents):
    """An addition to a session."""

    model_config = _examples({"messages": [{"role": "user", "content": "And when does it arrive?"}]})


class ViewQuery(BaseModel):
    """Query parameters of a session view. They are texts, so types are converted."""

    model_config = ConfigDict(extra="forbid")

    contents: bool = Field(False, description="With the live text, and each message's.")


class EraseRequest(Request):
    """Spans to erase, and the method."""

    model_config = _examples(
        {"spans": ["shelf 44"], "method": "repair(32)"},
        {"spans": [{"tool_call_id": "call_1"}], "method": "auto", "max_kl": 0.02},
        {"spans": [{"message": 2}, {"pattern": "Rom[ae]"}], "undoable": False},
    )

    spans: Annotated[list[Selector], Field(min_length=1, max_length=256)]
    replace: Words | None = Field(None, description="A text that takes the place of each span.")
    method: MethodName | None = Field(None, description="null: the server's own.")
    max_kl: float | None = Field(None, ge=0, description="The cheapest method within this budget, nats per token.")
    undoable: bool = Field(True, description="false: what goes is overwritten, in snapshots too.")

    @model_validator(mode="after")
    def _budget(self) -> Self:
        budget_fits(self.method, self.max_kl)
        return self


class InfluenceRequest(Request):
    """Spans whose influence to measure."""

    model_config = _examples({"spans": [{"tool_call_id": "call_1"}]})

    spans: Annotated[list[Selector], Field(min_length=1, max_length=256)]


class UndoRequest(Request):
    """Number of operations to undo."""

    model_config = _examples({"steps": 1})

    steps: int = Field(1, ge=1, le=WHOLE)


class ProbeFields(Request):
    """A question of an audit, and its kind."""

    question: Words
    kind: ProbeKind = "influence"
    answer: str | None = Field(None, min_length=1, description="The answer to force; null: the exact cache's own.")
    answer_prefix: str = Field("", description="Text that the assistant's turn begins with, in front of the answer.")


class AuditRequest(Request):
    """Probes of an audit; by default, questions built from the spans and their surroundings."""

    model_config = _examples({"probes": ["Where is my parcel?"], "secrets": ["Rome", "44"]}, {})

    probes: Annotated[list[Words | ProbeFields], Field(min_length=1, max_length=64)] | None = None
    secrets: Annotated[list[Words], Field(max_length=64)] | None = None

    def made(self) -> list[str | Probe] | None:
        """The probes for the library.

        Raises:
            KVEraserError: a probe is invalid.
        """
        if self.probes is None:
            return None
        return [probe if isinstance(probe, str) else Probe(**probe.model_dump()) for probe in self.probes]


class AskRequest(SamplingFields):
    """A question to a session. Greedy unless a temperature is given."""

    model_config = _examples({"question": "Where is the parcel?", "max_tokens": 32, "caches": "edited"})

    question: Words
    keep: bool = Field(False, description="Question and answer become part of the session.")
    caches: Caches = Field("edited", description="The session's own cache, one without erases, or an exact one.")
    logprobs: int | None = Field(None, ge=0, le=20, description="How many likely tokens to report at each place.")
    stream: bool = False

    @model_validator(mode="after")
    def _keeps(self) -> Self:
        if self.keep and self.caches != "edited":
            raise ValueError(f"keep is for the session's own cache, not for {self.caches}: leave one of them out")
        return self

    def settings(self) -> Sampling:
        """The sampling settings."""
        return self.sampling(0.0, self.max_tokens, self.logprobs)


# Replies


class SessionMessage(Reply):
    """A message of a session."""

    index: int
    role: str
    characters: int
    text: str | None
    live: bool = Field(description="Whether any of it has not been erased.")


class SessionReply(Reply):
    """A session. Times in seconds since 1970; in a list, `messages` and `receipts` are empty."""

    id: str
    object: Literal["session"] = "session"
    created: float
    expires: float
    messages: list[SessionMessage]
    text: str | None
    tokens: int
    live_tokens: int
    exact: bool
    undo_steps: int
    receipts: list[dict[str, Any]]
    bytes: int
    revision: int
    warnings: list[str] = Field(
        default_factory=list, description="What of this request had no effect, and special tokens in it."
    )


class SessionsReply(Reply):
    """The key's sessions, oldest first."""

    object: Literal["list"] = "list"
    data: list[SessionReply]


class DeletedReply(Reply):
    """The confirmation of a deletion."""

    id: str
    object: Literal["session.deleted"] = "session.deleted"
    deleted: Literal[True] = True


class ReceiptReply(Reply):
    """The receipt of an erase, with the attributes of `kveraser.Receipt`."""

    object: Literal["receipt"] = "receipt"
    receipt: dict[str, Any]


class InfluenceReply(Reply):
    """The influence of spans, with the attributes of `kveraser.measure.influence.Influence`."""

    object: Literal["influence"] = "influence"
    influence: dict[str, Any]


class AuditReply(Reply):
    """An audit of the erases, with the attributes of `kveraser.Audit`."""

    object: Literal["audit"] = "audit"
    audit: dict[str, Any]


class MethodReply(Reply):
    """An erasing method."""

    name: str
    summary: str
    cost: str
    source: str
    exact: bool = Field(description="All that follows the span is run again.")
    removes_text: bool = Field(description="false: the erased text stays in the cache, and is only taken back.")
    parameters: dict[str, float | None] = Field(description="The numbers that it takes; null: it chooses by itself.")
    default: bool = Field(description="It erases where a request names no method.")


class MethodsReply(Reply):
    """The available erasing methods."""

    object: Literal["list"] = "list"
    data: list[MethodReply]


class SessionToken(Reply):
    """A token of a session."""

    text: str = Field(description="What it adds to the text.")
    live: bool
    message: int | None
    start: int = Field(description="Its first character, as spans count them; below 0: what the template begins with.")
    end: int
    content: bool = Field(description="It stands in what a message or the text says, not in what the template adds.")


class TokensReply(Reply):
    """Every token of a session, erased ones included."""

    object: Literal["list"] = "list"
    data: list[SessionToken]


class LikelyToken(Reply):
    """A token with its log-probability, in nats."""

    token: str
    logprob: float


class AnswerToken(LikelyToken):
    """A token of an answer, and the most likely tokens at its position."""

    top: list[LikelyToken]


class AnswerReply(Reply):
    """An answer of a session."""

    object: Literal["answer"] = "answer"
    text: str
    tokens: list[AnswerToken] | None = Field(description="With logprobs; else null.")
    finish_reason: Literal["stop", "length"]
    usage: Usage
    kveraser: Happening
