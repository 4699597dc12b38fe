"""What the clients of a server say: seeded, no two conversations alike, and every sentence once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random
from typing import Any

PEOPLE = ("Ada", "Bruno", "Clara", "David", "Elena", "Farid", "Greta", "Hugo", "Ines", "Jonas")
CITIES = ("Lisbon", "Oslo", "Naples", "Bergen", "Porto", "Riga", "Dublin", "Malta", "Hamburg", "Trieste")
GOODS = ("oil lamps", "salted fish", "copper wire", "old maps", "dried figs", "ship bells", "blue glass", "wool")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

ASKED = "What did you write down?"
CALL = "call_1"

QUESTIONS = (
    "Who signed for the last parcel?",
    "Which city comes up most often in the ledger?",
    "What is the first thing that you wrote down?",
    "On which day did the last parcel leave?",
)


def sentences(random: Random) -> Iterator[str]:
    """Sentences without end; a number in each makes it the only one of its kind."""
    start = random.randrange(10_000, 90_000)
    for number in count(start):
        yield (
            f"Parcel {number} of {random.choice(GOODS)} left for {random.choice(CITIES)} on {random.choice(DAYS)}, "
            f"and {random.choice(PEOPLE)} signed for it."
        )


def said(random: Random, tokenizer: Any, tokens: int) -> str:
    """Sentences of at least `tokens` tokens together."""
    text = ""
    for sentence in sentences(random):
        text = f"{text} {sentence}".lstrip()
        if len(tokenizer.encode(text, add_special_tokens=False)) >= tokens:
            break
    return text


def opening(random: Random) -> dict[str, Any]:
    """A system prompt that no other conversation begins with."""
    return {"role": "system", "content": f"{random.choice(CITIES)} harbour, office {random.getrandbits(40)}. Be brief."}


def agent_conversation(tokenizer: Any, seed: str, tokens: int, result: int, turn: int = 120) -> list[dict[str, Any]]:
    """A conversation of about `tokens` tokens with a tool result of `result` tokens early in it; the user comes last.

    Args:
        turn: tokens of each further message.
    """
    random = Random(seed)
    function = {"name": "read_ledger", "arguments": '{"page": 1}'}
    page = tokenizer.encode(said(random, tokenizer, result), add_special_tokens=False)[:result]
    messages: list[dict[str, Any]] = [
        opening(random),
        {"role": "user", "content": "Look into the ledger, page 1."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": CALL, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": CALL, "content": tokenizer.decode(page)},
        {"role": "assistant", "content": "I have read the page. Tell me what else came in."},
    ]

    def size(added: list[dict[str, Any]]) -> int:
        return sum(len(tokenizer.encode(message["content"], add_special_tokens=False)) for message in added)

    held = size(messages)
    while held < tokens:
        told = {"role": "user", "content": said(random, tokenizer, turn)}
        added = [told, {"role": "assistant", "content": "Noted. Go on."}]
        held += size(added)
        messages += added
    return [*messages, {"role": "user", "content": ASKED}]


def short_conversation(tokenizer: Any, random: Random, turn: int) -> list[dict[str, Any]]:
    """What a session begins with: a tool result among two exchanges; each message of `turn` tokens."""
    messages = agent_conversation(tokenizer, f"{random.getrandbits(64)}", 0, turn)[:-1]
    return [*messages, {"role": "user", "content": said(random, tokenizer, turn)}]
