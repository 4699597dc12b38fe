"""The text of a span: a statement embedded in other text."""

from __future__ import annotations

import json
import random
import re

from kveraser.training.tasks.passages import Reader, clip
from kveraser.training.tasks.story import Style
from kveraser.training.tasks.tables import Cast, Tables, substitute


def span_text(
    rng: random.Random, style: Style, role: str, statement: str, size: int, tables: Tables, reader: Reader
) -> str:
    """Embed `statement` in a text of `size` words; a statement of that length or more stays alone.

    Styles: `page` is a retrieved page of corpus text, `records` are rows of a list or log, `json` is a tool result,
    `message` is a message with pasted text.
    """
    spoken = f"{role} " if role else ""
    free = size - len(spoken.split()) - len(statement.split())
    if free <= 0:
        return spoken + statement
    if free <= len(tables.texts["leads"]):
        return f"{spoken}{tables.texts['leads'][free - 1]} {statement}"
    if style == "records":
        return spoken + _records(rng, statement, free, tables)
    if style == "json":
        return spoken + _json(rng, statement, free, tables)
    if style == "message":
        return spoken + _message(rng, statement, free, tables, reader)
    return spoken + _page(rng, statement, free, tables, reader)


def _page(rng: random.Random, statement: str, free: int, tables: Tables, reader: Reader) -> str:
    template = rng.choice(tables.texts["pages"])
    slots = Cast(rng, tables).slots()
    frame = len(substitute(template, {**slots, "text": ""}).split())
    if frame >= free or rng.random() < 0.3:
        template, frame = "$text", 0
    words = reader.words(free - frame)
    ends = [0, *(at + 1 for at, word in enumerate(words) if re.search(r"[a-z0-9)]{2}[.!?]$", word)), len(words)]
    at = rng.choice(ends)
    return substitute(template, {**slots, "text": " ".join([*words[:at], statement, *words[at:]])})


def _records(rng: random.Random, statement: str, free: int, tables: Tables) -> str:
    rows = _rows(rng, free, tables)
    rows.insert(rng.randint(0, len(rows)), statement)
    return "\n".join(rows)


def _json(rng: random.Random, statement: str, free: int, tables: Tables) -> str:
    # The two keys count as words.
    fields = [("text", statement), ("entries", _rows(rng, free - 2, tables))]
    return json.dumps(dict(rng.sample(fields, 2)), ensure_ascii=False)


def _rows(rng: random.Random, count: int, tables: Tables) -> list[str]:
    """Make rows of `count` words in all; the last row is cut."""
    template = rng.choice(tables.texts["rows"])
    rows: list[str] = []
    while count > 0:
        # A new cast for each row, because long records need more names than one cast has.
        words = clip(substitute(template, Cast(rng, tables).slots()).split(), count)
        rows.append(" ".join(words))
        count -= len(words)
    return rows


def _message(rng: random.Random, statement: str, free: int, tables: Tables, reader: Reader) -> str:
    template = rng.choice(tables.texts["messages"])
    frame = len(substitute(template, {"statement": "", "text": ""}).split())
    if frame >= free:
        template, frame = "$statement $text", 0
    return substitute(template, {"statement": statement, "text": " ".join(reader.words(free - frame))})
