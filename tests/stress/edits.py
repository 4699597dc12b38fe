"""`python -m tests.stress.edits`: random scripts of edits on tiny models, checked after every step.

A script erases, replaces, inserts, appends, asks, undoes, forks, saves and loads. After every step the session has the
tokens of a plain list that was edited beside it; while it is exact, as after an edit by `recompute`, its states and
predictions are those of a fresh prefill; and what was undone is as before in every bit.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kveraser.errors import KVEraserError
from kveraser.methods import METHODS
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Characters, Selector, Text, Tokens, Transcript
from tests.sessions import EXACT, MESSAGES, consistent, far, same, state
from tests.tiny import attach_random_eraser, tiny_backbone

TEXT = (
    "The ship left at noon. The captain is Ada. She keeps the log in the cabin. The crew of 12 trusts her. "
    "The harbour is in Lisbon, and the ship is old. Nobody knows the way to the northern lighthouse."
)
WORDS = (" The tide is in.", " Rome", " She sleeps.", " 44 crates of oranges wait on the quay.", " no", " [cleared]")
OPERATIONS = ("erase",) * 4 + ("replace",) * 4 + ("insert",) * 3 + ("append", "ask", "undo", "undo", "fork", "load")
APPROXIMATE = tuple(name for name in METHODS if name != "recompute")


@dataclass
class Reference:
    """What the session's transcript should be: its tokens with their text, and which of them are live."""

    tokens: list[int]
    pieces: list[str]
    live: list[bool]
    body: int

    def copy(self) -> Reference:
        return Reference([*self.tokens], [*self.pieces], [*self.live], self.body)

    def insert(self, place: int, tokens: list[int], pieces: list[str]) -> None:
        self.tokens[place:place] = tokens
        self.pieces[place:place] = pieces
        self.live[place:place] = [True] * len(tokens)

    def parted(self, token: int) -> bool:
        """Whether the token shares no character with the one before it."""
        return token == len(self.tokens) or bool(self.pieces[token] and self.pieces[token - 1])

    def characters(self, token: int) -> int:
        """Where a token begins, counted from the body."""
        return len("".join(self.pieces[self.body : token]))


@dataclass
class Script:
    """A session with its reference and their earlier states."""

    session: Session
    rng: random.Random
    reference: Reference
    folder: Path
    limit: float
    earlier: list[tuple[dict[str, Any], Reference]] = field(default_factory=list)
    origins: list[tuple[Session, dict[str, Any]]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def step(self, operation: str) -> None:
        """One random step, checked."""
        before, reference = state(self.session), self.reference.copy()
        try:
            recomputed = getattr(self, operation)()
        except KVEraserError as error:
            # Refused, as inserting by a method that can't: nothing has changed.
            assert same(before, state(self.session)), error
            self.reference = reference
            self.counts["refused"] += 1
            return
        if operation in ("erase", "replace", "insert", "append", "ask"):
            self.earlier.append((before, reference))
        self.counts[operation] += 1
        transcript = self.session.transcript
        assert (transcript.tokens, transcript.live) == (self.reference.tokens, self.reference.live), operation
        alive = zip(self.reference.pieces, self.reference.live, strict=True)
        assert self.session.text == "".join(piece for piece, live in alive if live), operation
        assert consistent(self.session), operation
        if recomputed:
            assert self.session.exact, operation
            self.counts["recomputed"] += 1
        if self.session.exact:
            assert far(self.session) < self.limit, operation

    def finish(self) -> None:
        """Undo all that can be undone, and look at the sessions that forks were made of."""
        if self.earlier:
            self.session.undo(len(self.earlier))
            assert same(self.earlier[0][0], state(self.session))
        for session, left in self.origins:
            assert same(left, state(session))

    # Steps; each returns whether `recompute` was used

    def erase(self) -> bool:
        spans = self._spans(self.rng.randint(1, 3))
        method = self._method()
        self.session.erase([self._selector(span) for span in spans], method)
        self._erased(spans)
        return method == "recompute"

    def replace(self) -> bool:
        spans, text, method = self._spans(self.rng.randint(1, 3)), self.rng.choice(WORDS), self._method()
        receipt = self.session.replace([self._selector(span) for span in spans], text, method)
        assert receipt.inserted_text == (text,) * len(spans)
        self._erased(spans)
        for number, span in enumerate(sorted(spans, key=lambda span: span.start)):
            self._inserted(span.stop + number * receipt.inserted // len(spans), receipt.inserted // len(spans), text)
        return method == "recompute"

    def insert(self) -> bool:
        places = range(self.reference.body + 1, len(self.reference.tokens))
        place = self.rng.choice([place for place in places if self.reference.parted(place)])
        text, method = self.rng.choice(WORDS), self._method()
        receipt = self.session.insert(self.reference.characters(place), text, method)
        self._inserted(place, receipt.inserted, text)
        return method == "recompute"

    def append(self) -> bool:
        text, size = self.rng.choice(WORDS), len(self.reference.tokens)
        self.session.append(text)
        self._inserted(size, len(self.session.transcript.tokens) - size, text)
        return False

    def ask(self) -> bool:
        size = len(self.reference.tokens)
        self.session.ask("Who?", keep=True, max_new_tokens=3)
        self._inserted(size, len(self.session.transcript.tokens) - size, None)
        return False

    def undo(self) -> bool:
        if self.earlier:
            steps = self.rng.randint(1, min(3, len(self.earlier)))
            self.session.undo(steps)
            before, self.reference = self.earlier[-steps]
            del self.earlier[-steps:]
            assert same(before, state(self.session))
        return False

    def fork(self) -> bool:
        self.origins.append((self.session, state(self.session)))
        self.session = self.session.fork()
        return False

    def load(self) -> bool:
        path, before = self.folder / "session.safetensors", state(self.session)
        self.session.save(path)
        self.session = Session.load(path, self.session.backbone)
        # A file has nothing to undo.
        assert same(before | {"history": 0}, state(self.session))
        self.earlier.clear()
        return False

    # What they draw, and what becomes of the reference

    def _method(self) -> str:
        return "recompute" if self.rng.random() < 0.5 else self.rng.choice(APPROXIMATE)

    def _spans(self, count: int) -> list[range]:
        """Runs of tokens without overlap, each with a live one."""
        reference, found = self.reference, list[range]()
        for _ in range(20):
            start = self.rng.randrange(reference.body, len(reference.tokens))
            span = range(start, min(start + self.rng.randint(1, 9), len(reference.tokens)))
            apart = all(span.stop <= other.start or other.stop <= span.start for other in found)
            apart = apart and reference.parted(span.start) and reference.parted(span.stop)
            if apart and any(reference.live[span.start : span.stop]) and len(found) < count:
                found.append(span)
        return found

    def _selector(self, span: range) -> Selector:
        """One of the ways to name the run."""
        reference = self.reference
        start, end = reference.characters(span.start), reference.characters(span.stop)
        text = "".join(reference.pieces[span.start : span.stop])
        ways: list[Selector] = [Tokens(span.start, span.stop), Characters(start, end)]
        if "".join(reference.pieces).count(text) == 1 and all(reference.live[span.start : span.stop]):
            ways.append(Text(text))
        return self.rng.choice(ways)

    def _erased(self, spans: list[range]) -> None:
        for span in spans:
            self.reference.live[span.start : span.stop] = [False] * len(span)

    def _inserted(self, place: int, count: int, text: str | None) -> None:
        """Tokens that the session put in at a place: they must read `text`."""
        transcript = self.session.transcript
        pieces = _pieces(transcript)[place : place + count]
        assert text is None or "".join(pieces) == text
        self.reference.insert(place, transcript.tokens[place : place + count], pieces)


def _pieces(transcript: Transcript) -> list[str]:
    """The text of every token; of several that share a character, the first has it."""
    pieces, reached = [], 0
    for start, end in transcript.offsets:
        pieces.append(transcript.text[max(start, reached) : end])
        reached = max(reached, end)
    return pieces


def run_script(backbone: Backbone, seed: int, steps: int, folder: Path, limit: float = EXACT) -> Counter[str]:
    """Run the script of a seed; returns how often each operation was done.

    Args:
        limit: on the distance of exact states and predictions from those of a fresh prefill.

    Raises:
        AssertionError: the session differs from the reference.
    """
    rng = random.Random(seed)
    session = Session(backbone, messages=MESSAGES) if seed % 3 == 0 else Session(backbone, text=TEXT)
    transcript = session.transcript
    pieces = _pieces(transcript)
    assert "".join(pieces) == transcript.text
    body = next(place for place, (start, _) in enumerate(transcript.offsets) if start >= transcript.body_start)
    script = Script(session, rng, Reference([*transcript.tokens], pieces, [*transcript.live], body), folder, limit)
    for _ in range(steps):
        script.step(rng.choice(OPERATIONS))
    script.finish()
    return script.counts


def backbones() -> list[Backbone]:
    """Tiny models with random erasers."""
    made = [tiny_backbone(seed=seed) for seed in range(3)]
    for backbone in made:
        attach_random_eraser(backbone)
    return made


def main(
    scripts: Annotated[int, typer.Option(min=1, help="Random scripts.")] = 2000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the first script; each has the next.")] = 0,
) -> None:
    """Run random scripts of edits and compare after every step."""
    made, counts, wrong = backbones(), Counter[str](), list[int]()
    with tempfile.TemporaryDirectory(prefix="kveraser-edits-") as folder:
        for number in range(seed, seed + scripts):
            try:
                counts += run_script(made[number % len(made)], number, steps, Path(folder))
            except Exception as error:
                wrong.append(number)
                print(f"script {number}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
    print(", ".join(f"{count} {operation}" for operation, count in sorted(counts.items())))
    print(f"{len(wrong)} of {scripts} scripts are wrong: {wrong[:20]}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
