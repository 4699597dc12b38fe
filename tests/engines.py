"""What the tests of the server's engine share: contexts, answers, and the same answers decoded alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Sampling, Step, TokenLogprob
from kveraser.serve.held import HeldSession
from kveraser.session.erase import Change
from kveraser.text.spans import Span
from kveraser.text.tokenized import TokenizedText
from tests.sessions import consistent
from tests.tiny import random_tokens

GREEDY = Sampling(temperature=0.0, max_tokens=12)


def text_of(backbone: Backbone, text: str) -> TokenizedText:
    tokens, offsets = backbone.tokenize(text)
    return TokenizedText(text, tuple(tokens), tuple(offsets))


def words(count: int, seed: int = 0) -> TokenizedText:
    """Random tokens."""
    return of(random_tokens(count, seed))


def of(tokens: Sequence[int]) -> TokenizedText:
    """Tokens, a character each as far as offsets go."""
    return TokenizedText("x" * len(tokens), tuple(tokens), tuple((place, place + 1) for place in range(len(tokens))))


def first(count: int) -> TokenizedText:
    """What `words(60)` begins with."""
    return of(words(60).tokens[:count])


def finished(held: HeldSession) -> bool:
    """Whether the last token alone is pending, and slots, cache and transcript belong together."""
    pending = held.pending_places(1)
    run = HeldSession(state=replace(held.state, cache=held.cache.fork()))
    run.run_pending(1)
    whole = consistent(run)
    return whole and len(pending) == 1


def read(engine: TransformersEngine, text: TokenizedText) -> HeldSession:
    """A context of `text`, ready for an answer."""
    held = engine.hold(text)
    while engine.prefill(held, 7):
        pass
    return held


def alone(held: HeldSession, limit: int = 12) -> list[int]:
    """The greedy answer to a context as the library decodes it, from a copy."""
    last = [place for place, live in enumerate(held.transcript.live) if live][-1]
    assert held.pending == 1
    return greedy(held.backbone, held.cache.fork(), [held.transcript.tokens[last]], limit)


def answer(engine: TransformersEngine, held: HeldSession, sampling: Sampling = GREEDY, keep: bool = False) -> list[int]:
    """An answer's tokens, decoded without company."""
    stream = engine.begin(held, sampling)
    while engine.step([stream])[0].finish_reason is None:
        pass
    tokens = list(stream.tokens)
    engine.finish(stream, keep)
    return tokens


def contexts(engine: TransformersEngine) -> list[HeldSession]:
    """Contexts of several lengths; all but the first two edited, so that slots and positions part.

    The seeds are of contexts that are answered at length.
    """
    held = [read(engine, words(*size)) for size in ((40, 25), (150, 17), (61, 27), (90, 24), (33, 26))]
    for context, method in zip(held[2:], ("mask", "shift", "kveraser"), strict=True):
        engine.edit(context, [Change(Span(10, 21))], method, None, undoable=True)
    assert len({context.cache.length for context in held}) == len(held)
    assert held[2].cache.next_position > held[2].cache.length
    return held


class Scripted:
    """A sampler that says what it is told."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def choose(self, logits: Any) -> TokenLogprob:
        return TokenLogprob(self.tokens.pop(0), 0.0)


def scripted(
    engine: TransformersEngine, held: HeldSession, tokens: Sequence[int], sampling: Sampling = GREEDY
) -> tuple[Any, list[Step]]:
    """A stream that said `tokens`, not yet finished, and its steps."""
    stream: Any = engine.begin(held, sampling)
    stream.sampler = Scripted(tokens)
    steps = []
    while stream.sampler.tokens and (not steps or steps[-1].finish_reason is None):
        steps += engine.step([stream])
    return stream, steps
