"""Reply bodies of chat completions, completions and models: those of OpenAI's API with additional fields."""

from __future__ import annotations

from typing import Any, Literal

from kveraser.serve.body import Reply
from kveraser.serve.fields import Happening, Usage
from kveraser.serve.messages import ToolCall


class TopLogprob(Reply):
    """A likely token with its log-probability; `bytes` is null for an incomplete character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """A chosen token, and the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Reply):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenLogprobs] | None
    refusal: None = None


class AssistantMessage(Reply):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    """The answer."""

    index: Literal[0] = 0
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class AppliedEdits(Reply):
    """The applied context edits."""

    applied_edits: list[dict[str, Any]]


class ChatReply(Reply):
    """The next message of a conversation."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    kveraser: Happening
    context_management: AppliedEdits | None = None


class CompletionLogprobs(Reply):
    """Log-probabilities of a completion's tokens."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """The completion."""

    index: Literal[0] = 0
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    """The continuation of a text."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    kveraser: Happening


class ModelReply(Reply):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kveraser"] = "kveraser"
    context_length: int | None


class ModelsReply(Reply):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelReply]
