"""Request bodies of chat completions and completions: those of OpenAI's API with additional fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from kveraser.serve.body import WHOLE, Request
from kveraser.serve.context_edits import ContextEdit
from kveraser.serve.fields import Hint, Ignored, KVEraserFields, SamplingFields, ignored, only
from kveraser.serve.messages import Messages, Tool, answered
from kveraser.serve.types import Erasing, Turn
from kveraser.text.template import ChatOptions

COMPLETION_TOKENS = 16
"""Default length of a completion, as in OpenAI's API; an answer in a chat may fill the context."""

VARIABLE = "A variable of the chat template; where it has none, `kveraser.warnings` says so."

# Context management


class ContextManagement(Request):
    """Edits to the conversation before the model reads it."""

    edits: list[Annotated[ContextEdit, Field(discriminator="type")]] = Field(default_factory=list, max_length=8)


# Requests


class StreamOptions(Request):
    """Additional content of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Hint = None
    continuous_usage_stats: Ignored = None


class GenerationRequest(SamplingFields):
    """Common fields of requests for an answer."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Literal[1] | None, only(1, "one answer a request")] = None
    logit_bias: Annotated[dict[str, Any] | None, Field(max_length=0), only({}, "tokens can't be biased")] = None
    kveraser: KVEraserFields | None = None
    user: Hint = None
    min_tokens: Ignored = None
    length_penalty: Ignored = None
    typical_p: Ignored = None
    skip_special_tokens: Ignored = None
    spaces_between_special_tokens: Ignored = None
    truncate_prompt_tokens: Ignored = None
    priority: Ignored = None
    request_id: Ignored = None
    cache_prompt: Ignored = None
    cache_salt: Ignored = None
    id_slot: Ignored = None
    keep_alive: Ignored = None
    options: Ignored = None

    @model_validator(mode="after")
    def _streaming(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to a stream: set stream to true, or leave them out")
        return self

    @property
    def warnings(self) -> tuple[str, ...]:
        """Parts of the request that have no effect."""
        names = [
            *ignored(self),
            *(f"stream_options.{name}" for name in ignored(self.stream_options or StreamOptions())),
        ]
        return tuple(f"{name} has no effect on this server" for name in names)

    @property
    def erasing(self) -> Erasing:
        """How removed parts of the history are erased."""
        return Erasing() if self.kveraser is None else self.kveraser.erasing()


class ChatRequest(GenerationRequest):
    """A request for the next message of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "smollm2-135m-instruct",
                    "messages": [{"role": "user", "content": "Where is my parcel?"}],
                    "max_tokens": 32,
                    "temperature": 0,
                    "kveraser": {"method": "repair(32)"},
                }
            ]
        }
    )

    messages: Messages
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, Field(description="`none`: calls are not read.")] = None
    parallel_tool_calls: bool | None = Field(None, description="false: only the first call of an answer is read.")
    max_completion_tokens: int | None = Field(None, ge=1, le=WHOLE)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[dict[str, Any] | None, only({"type": "text"}, "answers are plain text")] = None
    modalities: Annotated[list[Literal["text"]] | None, only(["text"], "answers are text")] = None
    context_management: ContextManagement | None = None
    metadata: Hint = None
    store: Hint = None
    service_tier: Hint = None
    prompt_cache_key: Hint = None
    prompt_cache_retention: Hint = None
    safety_identifier: Hint = None
    reasoning_effort: str | None = Field(None, max_length=64, description=VARIABLE)
    verbosity: str | None = Field(None, max_length=64, description=VARIABLE)
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, max_length=64, description="Further variables of the chat template, such as enable_thinking."
    )
    reasoning: Ignored = None
    add_generation_prompt: Annotated[Literal[True] | None, only(True, "an answer is always opened")] = None

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice(cls, choice: Any) -> Any:
        if choice not in (None, "auto", "none"):
            raise ValueError("the model can't be made to call a tool: give auto or none")
        return choice

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        answered(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belong to logprobs: set logprobs to true, or leave them out")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    def chat_options(self) -> ChatOptions:
        """The options for rendering the conversation."""
        named = {"reasoning_effort": self.reasoning_effort, "verbosity": self.verbosity}
        given = {name: value for name, value in named.items() if value is not None}
        return ChatOptions(
            tuple(tool.plain() for tool in self.tools or []),
            given | (self.chat_template_kwargs or {}),
            self.kveraser is not None and self.kveraser.allow_special,
        )

    def turn(self) -> Turn:
        """Convert to the type of the service."""
        edits = self.context_management.edits if self.context_management is not None else []
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return Turn(
            messages=tuple(message.plain() for message in self.messages),
            options=self.chat_options(),
            sampling=self.sampling(1.0, most, (self.top_logprobs or 0) if self.logprobs else None),
            erasing=self.erasing,
            context_edits=tuple(edits),
            dropped=tuple(self.kveraser.drop_message) if self.kveraser is not None else (),
            warnings=self.warnings,
        )


TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=WHOLE)]], Field(min_length=1, fail_fast=True)]
PromptText = Annotated[str, Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """A request for the continuation of a text, without a chat template."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "smollm2-135m-instruct", "prompt": "The captain is", "max_tokens": 8, "temperature": 0}
            ]
        }
    )

    prompt: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=1)]
    ) = Field(description="A text or token ids; one prompt a request.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Annotated[Literal[False] | None, only(False, "prompts are not echoed")] = None
    best_of: Annotated[Literal[1] | None, only(1, "one answer a request")] = None
    suffix: Annotated[None, only(None, "text can't be inserted in front of a suffix")] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, prompt: Any) -> Any:
        # One error message instead of one for each of the four types.
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not texts or "" in texts or [] in texts:
            raise ValueError("the prompt is empty, or neither text nor token ids: give one of them")
        if not isinstance(texts[0], int) and len(texts) > 1:
            raise ValueError(f"there are {len(texts)} prompts: give one prompt a request")
        return prompt

    def turn(self) -> Turn:
        """Convert to the type of the service."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and not isinstance(prompt[0], int):
            prompt = prompt[0]
        return Turn(
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            sampling=self.sampling(1.0, self.max_tokens or COMPLETION_TOKENS, self.logprobs),
            erasing=self.erasing,
            warnings=self.warnings,
        )
