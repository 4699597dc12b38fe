"""Structured logs: one JSON object per line, without any text from clients or the model."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = "kveraser.serve"


class JsonLines(logging.Formatter):
    """Formats a record as a JSON object; `fields` in `extra` become keys beside the event."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= error_fields(record.exc_info[1])
        return json.dumps(line, default=str)


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send this server's and uvicorn's records to `stream` (default: stderr) as JSON lines."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level.upper())


def log(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event. Fields must be names, numbers and ids, never text from a body."""
    logging.getLogger(LOGGER).log(level, event, extra={"fields": fields})


def error_fields(error: BaseException) -> dict[str, Any]:
    """The class and stack of an error, without its message, which may quote contents."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
        "cause": type(error.__cause__).__name__ if error.__cause__ is not None else None,
    }
