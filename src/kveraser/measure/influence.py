"""Measure how much a span changed the text after it, by scoring that text with and without the span."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from kveraser.measure.audit import kl_by_place
from kveraser.model.backbone import Backbone, Progress
from kveraser.text.spans import Transcript

SCORED_TOKENS = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True)
class TokenInfluence:
    """What the span changed at one later token.

    Attributes:
        token: its index in the transcript.
        change: its log-probability with the span minus that without, in nats: positive where the span made it likelier.
        kl: KL(without || with) of the prediction at its place, in nats.
    """

    token: int
    change: float
    kl: float


@dataclass(frozen=True)
class MessageInfluence:
    """What the span changed at one later message: means over its tokens, in nats per token; see `TokenInfluence`."""

    message: int
    role: str
    tokens: int
    change: float
    kl: float


@dataclass(frozen=True)
class Influence:
    """What a span changed in all later text.

    Attributes:
        messages: those after the span's first token, in order; the content of each.
        tokens: the live tokens after the span's first token, without the span.
        kl: mean over these tokens.
    """

    messages: tuple[MessageInfluence, ...]
    tokens: tuple[TokenInfluence, ...]
    kl: float

    def above(self, threshold: float) -> tuple[MessageInfluence, ...]:
        """The messages whose KL is above `threshold` nats per token, the most influenced first."""
        found = [message for message in self.messages if message.kl > threshold]
        return tuple(sorted(found, key=lambda message: -message.kl))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the attributes' names as keys."""
        return asdict(self)


def measure_influence(
    backbone: Backbone, transcript: Transcript, span: AbstractSet[int], progress: Progress | None = None
) -> Influence:
    """Score the live text after the span twice, on a prefill with the span and on one without.

    Costs two prefills of the context and the logits of the text after the span. No session's cache is read.

    Args:
        span: indices of live tokens in the transcript.
        progress: called with tokens done and in all.

    Raises:
        ContextLengthError: more live tokens than the backbone has positions.
    """
    live = [index for index, alive in enumerate(transcript.live) if alive]
    first = live.index(min(span))
    tokens, total = transcript.tokens, 2 * len(live) - len(span)
    backbone.check_room(0, len(live))
    both = backbone.new_cache(len(live)), backbone.new_cache(len(live))
    # The last token before the span predicts the token after it in the run without the span.
    fed = [tokens[index] for index in live[: max(first - 1, 0)]]
    for cache in both:
        backbone.extend(cache, fed)
    waiting = [[tokens[index] for index in live[max(first - 1, 0) : first]] for _ in both]
    scored: list[TokenInfluence] = []
    for part in _parts(live[first:], span):
        ids = [tokens[index] for index in part]
        if part[0] in span:
            waiting[0] += ids
            continue
        if not waiting[1]:
            # No token precedes this one without the span, so nothing predicts it there.
            waiting[0] += ids[:1]
            waiting[1] += ids[:1]
            part, ids = part[1:], ids[1:]
        for start in range(0, len(ids), SCORED_TOKENS):
            chunk = ids[start : start + SCORED_TOKENS]
            scores = []
            for run, cache in enumerate(both):
                *earlier, last = waiting[run]
                backbone.extend(cache, earlier)
                logits = backbone.logits(cache, [last, *chunk[:-1]], keep=len(chunk))
                scores.append(logits.log_softmax(dim=-1))
                waiting[run] = [chunk[-1]]
            kls = kl_by_place(scores[1], scores[0]).tolist()
            for place, token in enumerate(chunk):
                change = float(scores[0][place, token]) - float(scores[1][place, token])
                scored.append(TokenInfluence(part[start + place], change, kls[place]))
            backbone.let_others_in()
            if progress is not None:
                progress(sum(cache.length for cache in both) + 2, total)
    return Influence(_messages(transcript, scored), tuple(scored), fmean(one.kl for one in scored) if scored else 0.0)


def _parts(live: Sequence[int], span: AbstractSet[int]) -> list[list[int]]:
    """The tokens in runs that are all in the span or all outside it."""
    parts: list[list[int]] = []
    for index in live:
        if parts and (parts[-1][-1] in span) == (index in span):
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def _messages(transcript: Transcript, scored: Sequence[TokenInfluence]) -> tuple[MessageInfluence, ...]:
    found = []
    for number, message in enumerate(transcript.messages):
        inside = [
            one
            for one in scored
            if transcript.offsets[one.token][0] < message.content_end
            and transcript.offsets[one.token][1] > message.content_start
        ]
        if inside:
            change, kl = (fmean(getattr(one, name) for one in inside) for name in ("change", "kl"))
            found.append(MessageInfluence(number, message.role, len(inside), change, kl))
    return tuple(found)
