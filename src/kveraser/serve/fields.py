"""Common fields of request and response bodies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from kveraser.errors import KVEraserError
from kveraser.methods import make_method
from kveraser.serve.body import WHOLE, Reply, Request
from kveraser.serve.engine import Sampling
from kveraser.serve.types import Action, Erasing
from kveraser.text.spans import selector_from_json


def only(neutral: Any, why: str) -> BeforeValidator:
    """Accept null and the neutral value; refuse all others with the reason `why`."""

    def check(value: Any) -> Any:
        if value is not None and value != neutral:
            raise ValueError(f"{why}: leave it out")
        return value

    return BeforeValidator(check)


def _library(check: Callable[[Any], Any]) -> AfterValidator:
    """Validate a value with a function of the library, and report its error."""

    def checked(value: Any) -> Any:
        try:
            check(value)
        except (KVEraserError, ArithmeticError) as error:
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(checked)


Hint = Annotated[Any, Field(description="Accepted and without effect.")]

NO_EFFECT = "Accepted and without effect, which the reply's `kveraser.warnings` says."

Ignored = Annotated[Any, Field(description=NO_EFFECT)]
"""A field of other servers that this one does not support and can safely ignore."""


def ignored(body: BaseModel) -> list[str]:
    """Fields of `body` that were given and have no effect."""
    fields = type(body).model_fields
    return [
        name
        for name in fields
        if fields[name].description == NO_EFFECT and name in body.model_fields_set and getattr(body, name) is not None
    ]


MethodName = Annotated[
    str,
    # The library parses calls in Python's syntax: accept only names and numbers.
    Field(
        pattern=r"^[a-z_+]+(\(([a-z_]+=)?[0-9.]+(, ?([a-z_]+=)?[0-9.]+)*\))?$",
        max_length=64,
        examples=["repair(32)", "recompute", "auto"],
    ),
    _library(lambda name: name == "auto" or make_method(name)),
]

Selector = Annotated[
    Any,
    _library(selector_from_json),
    WithJsonSchema(
        {
            "title": "Span",
            "anyOf": [
                {"type": "string", "minLength": 1, "description": "A text that occurs once."},
                {
                    "type": "array",
                    "items": {"type": "integer"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "[start, end) in characters of the session's own text.",
                },
                {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string", "minLength": 1},
                        "occurrence": {"type": ["integer", "null"], "description": "Which one, from 1."},
                    },
                    "required": ["text"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "pattern": {"type": "string", "description": "A regular expression; every match is erased."},
                        "occurrence": {"type": ["integer", "null"], "description": "Only this match, from 1."},
                    },
                    "required": ["pattern"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "message": {"type": "integer", "description": "Index; negative counts from the end."},
                        "keep_turn": {"type": "boolean"},
                    },
                    "required": ["message"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "tool_call_id": {"type": "string", "description": "The result of this call."},
                        "keep_turn": {"type": "boolean"},
                    },
                    "required": ["tool_call_id"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "properties": {
                        "tokens": {
                            "type": "array",
                            "items": {"type": "integer"},
                            "minItems": 2,
                            "maxItems": 2,
                            "description": "[start, end) in tokens, as GET /v1/sessions/{id}/tokens lists them.",
                        }
                    },
                    "required": ["tokens"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]
"""A span as `kveraser.text.spans.selector_from_json` reads it."""

StopText = Annotated[str, Field(min_length=1, max_length=256)]


class SamplingFields(Request):
    """Sampling settings, with OpenAI's names."""

    max_tokens: int | None = Field(None, ge=1, le=WHOLE)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    top_k: int | None = Field(None, ge=-1, le=WHOLE, description="Likeliest tokens to choose among; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability of a token, as a part of the best's.")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = Field(None, description="Go on where the model would end.")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = Field(
        None, description="Up to 4 texts at which the answer ends."
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, stop: Any) -> Any:
        # Clients that write every field send an empty text for none.
        left = [one for one in stop if one != ""] if isinstance(stop, list) else stop
        return None if left in ("", []) else left

    def sampling(self, temperature: float, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """The settings; `temperature` is the default."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=self.seed,
            stop=tuple(stop),
            logprobs=logprobs,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            ignore_eos=bool(self.ignore_eos),
        )


def budget_fits(method: str | None, max_kl: float | None) -> None:
    """Check that a budget is given only for method `auto`.

    Raises:
        ValueError: a budget is given for another method.
    """
    if max_kl is not None and method not in (None, "auto"):
        raise ValueError(f"max_kl is the budget of method auto, but the method is {method}: leave one of them out")


class KVEraserFields(Request):
    """How parts removed from the history are erased from the cache."""

    method: MethodName | None = Field(None, description="`recompute` asks for an exact answer; null: the server's own.")
    max_kl: float | None = Field(None, ge=0, description="The cheapest method within this budget, nats per token.")
    now_then_exact: bool = Field(False, description="Answer from the edited cache; an exact one takes its place later.")
    drop_message: Annotated[list[Annotated[int, Field(ge=-WHOLE, le=WHOLE)]], Field(max_length=4096)] = Field(
        default_factory=list,
        description="Indices of messages that are left out of the conversation, and erased from the cache.",
    )
    allow_special: bool = Field(
        False, description="Special tokens in messages and tools act as control tokens; otherwise they are text."
    )

    @model_validator(mode="after")
    def _budget(self) -> Self:
        budget_fits(self.method, self.max_kl)
        return self

    def erasing(self) -> Erasing:
        """Convert to the type of the service."""
        return Erasing(self.method, self.max_kl, self.now_then_exact)


class Happening(Reply):
    """The cache operations of the request."""

    action: Action = Field(
        description="`prefill`: nothing cached was used; `append`: text was added; `erase`: spans were erased from the "
        "cache; `edit`: text was replaced or inserted in it; `recompute`: run again from the first difference on; "
        "`prefix`: the common prefix was used, the rest is new."
    )
    context: str = Field(description="Id of the cached context.")
    erased_tokens: int
    recomputed_tokens: int
    prefilled_tokens: int
    exact: bool = Field(description="The cache that answered equals a fresh prefill of its live tokens.")
    receipts: list[dict[str, Any]] = Field(description="Of this request's erases.")
    applied_edits: list[dict[str, Any]] = Field(description="Of this request's context management.")
    exact_pending: bool = Field(description="An exact cache is being made in idle time.")
    warnings: list[str] = Field(
        default_factory=list,
        description="What of the request had no effect, and special tokens in messages.",
    )


class PromptTokensDetails(Reply):
    """How many tokens of the prompt came from the cache."""

    cached_tokens: int


class Usage(Reply):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ErrorObject(Reply):
    """The problem and its solution."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """The body of every error."""

    error: ErrorObject
