"""Messages and tools in OpenAI's format, and their conversion for chat templates."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import from_json

from kveraser.serve.body import Request
from kveraser.serve.fields import Hint

OTHER_PARTS = {
    "image_url": "images", "input_image": "images", "image": "images", "input_audio": "audio", "audio": "audio",
    "video_url": "videos", "video": "videos", "file": "files", "input_file": "files", "document": "documents",
}  # fmt: skip
"""Names of unsupported content parts, for error messages."""


class _Echoed(BaseModel):
    """A part of a message. Unknown fields, which clients return from replies of other servers, are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class TextPart(_Echoed):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(_Echoed):
    """A function with its arguments as JSON text."""

    name: str = Field(min_length=1)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _json(cls, arguments: str) -> str:
        try:
            parsed = from_json(arguments or "{}", allow_inf_nan=False)
        except ValueError as error:
            raise ValueError(f"the arguments are not JSON ({error}): give an object as JSON text") from error
        if not isinstance(parsed, dict):
            raise ValueError(f"the arguments are JSON of a {type(parsed).__name__}: give an object as JSON text")
        return arguments or "{}"


class ToolCall(_Echoed):
    """A tool call of the assistant."""

    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Echoed):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, description="Of a tool's message: the call that it answers.")
    function_call: CalledFunction | None = Field(None, description="Legacy: a call without id.")
    reasoning_content: str | None = Field(None, description="The assistant's reasoning, where the template writes it.")
    reasoning: str | None = Field(None, description="The same.")

    @field_validator("content", mode="before")
    @classmethod
    def _texts(cls, content: Any) -> Any:
        kinds = [part.get("type") for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        other = next((kind for kind in kinds if isinstance(kind, str) and kind != "text"), None)
        if other is not None:
            what = OTHER_PARTS.get(other, f"parts of type {other[:40]!r}")
            raise ValueError(f"the model reads text alone, and no {what}: send text parts only")
        return content

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.tool_calls and self.function_call:
            raise ValueError("a message has both tool_calls and function_call: give one of them")
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.function_call)):
            raise ValueError(f"a message of role {self.role} has no content: give a text")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of role tool answers a call: give its tool_call_id")
        for name in ("tool_calls", "function_call", "reasoning_content", "reasoning"):
            if getattr(self, name) and self.role != "assistant":
                raise ValueError(f"a message of role {self.role} has {name}: only an assistant's has")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as a dictionary for chat templates."""
        content = self.content if isinstance(self.content, str | None) else "".join(part.text for part in self.content)
        read: dict[str, Any] = {"role": self.role, "content": content}
        if self.name is not None:
            read["name"] = self.name
        if self.tool_calls:
            read["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.function_call:
            read["function_call"] = self.function_call.model_dump()
        if self.reasoning_content or self.reasoning:
            read["reasoning_content"] = self.reasoning_content or self.reasoning
        if self.role == "tool":
            read["tool_call_id"] = self.tool_call_id
        return read


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


def answered(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Check that every tool result answers an earlier call, and return the messages.

    Calls without results are accepted, since clients may remove results from the history.

    Raises:
        ValueError: the call of a result does not exist.
    """
    known: set[str] = set()
    for index, message in enumerate(messages):
        known |= {call.id for call in message.tool_calls or []}
        if message.role == "tool" and message.tool_call_id not in known:
            raise ValueError(
                f"message {index} is the result of a tool call {message.tool_call_id!r}, and no message before it "
                "makes that call: drop the result together with its call"
            )
    return messages


# Tools


class FunctionDescription(Request):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments.")
    strict: Hint = None


class Tool(Request):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDescription

    def plain(self) -> dict[str, Any]:
        """The tool as a dictionary for chat templates."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}
