"""Base classes of request and response bodies."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

WHOLE = 2**31 - 1
"""Maximum number of tokens, messages or steps in a request."""


class Request(BaseModel):
    """A request body. Types are not converted, unknown fields are refused, and numbers must be finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Reply(BaseModel):
    """A response body. Fields without a default are always present."""

    model_config = ConfigDict(extra="forbid")
