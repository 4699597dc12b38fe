"""What was forgotten and what leaks, measured against the exact reference (definitions: docs/measures.md).

The answers of three caches are compared under the same questions: *exact* (a fresh prefill without the span), *edited*
(the cache after the erase) and *unerased* (a fresh prefill with the span).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache
from kveraser.decode import end_tokens, greedy, score
from kveraser.probes import Probe, mentions
from kveraser.receipt import Audit, ProbeResult

T = TypeVar("T")

ANSWER_TOKENS = 32
LEAK_TOKENS = 64
BOOTSTRAP_SAMPLES = 2000
INSENSITIVE = 1e-6
"""Below this KL, in nats per token, the probes do not feel the span at all, and a ratio to it means nothing."""


@dataclass(frozen=True)
class PreparedProbe:
    """A probe as tokens: the prompt as it is appended to the cache, and the answer to force, if one is given."""

    probe: Probe
    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None


@dataclass(frozen=True)
class References:
    """The two fresh prefills that an audit compares with; they serve every erase of the same span.

    What is computed from them once (answers, log-probabilities, the hole floor's cache) is remembered.
    """

    exact: EditableCache
    unerased: EditableCache
    memory: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under `key`, computed when it is first asked for."""
        if key not in self.memory:
            self.memory[key] = compute()
        value: T = self.memory[key]
        return value

    def reply(self, backbone: Backbone, prompt: tuple[int, ...]) -> list[int]:
        """The exact cache's greedy answer."""
        return self.remember(("reply", prompt), lambda: greedy(backbone, self.exact, prompt, ANSWER_TOKENS))


def kl_divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over places of KL(exact || other), in nats, from log-probabilities `[answer, vocabulary]`."""
    probabilities, difference = exact.double().exp(), exact.double() - other.double()
    # What the exact reference rules out adds nothing, even where the other rules it out as well.
    return float((probabilities * difference).masked_fill(probabilities == 0, 0.0).sum())


def audit(
    backbone: Backbone,
    references: References,
    edited: EditableCache,
    probes: Sequence[PreparedProbe],
    secrets: Sequence[str],
    hole: EditableCache | None = None,
    seed: int = 0,
) -> Audit:
    """Measure `edited` against the references. All caches are left as they were.

    Args:
        secrets: texts whose appearance in a greedy answer counts as given away.
        hole: the exact suffix at the edited cache's positions, where those leave a hole.
        seed: of the bootstrap.
    """
    results = [_measure(backbone, references, edited, hole, prepared, secrets) for prepared in probes]
    of_kind = {kind: [result for result in results if result.kind == kind] for kind in ("influence", "leak", "no_harm")}
    influence, leak, no_harm = of_kind["influence"], of_kind["leak"], of_kind["no_harm"]
    fidelity, low, high = fidelity_interval(
        [result.kl * result.tokens for result in influence],
        [result.kl_unerased * result.tokens for result in influence],
        sum(result.tokens for result in influence),
        seed,
    )
    return Audit(
        kl=_mean(influence, "kl") or 0.0,
        kl_unerased=_mean(influence, "kl_unerased") or 0.0,
        fidelity=fidelity,
        fidelity_low=low,
        fidelity_high=high,
        leak=_difference(leak, "log_probability_edited", "log_probability_exact"),
        leak_rate=_difference(leak, "reproduced", "reproduced_exact"),
        no_harm=_mean(no_harm, "kl"),
        kl_hole=_mean(influence, "kl_hole") if hole is not None else None,
        probes=tuple(results),
    )


def fidelity_interval(
    edited: Sequence[float], unerased: Sequence[float], tokens: int, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Fidelity and its 95% bootstrap interval over cases, from each case's summed KL in nats.

    Returns:
        `(None, None, None)` when the cases do not feel the span (mean unerased KL below 1e-6 nats a token).
    """
    top, bottom = np.asarray(edited, dtype=float), np.asarray(unerased, dtype=float)
    if len(top) == 0 or bottom.sum() < INSENSITIVE * max(tokens, 1):
        return None, None, None
    picks = np.random.default_rng(seed).integers(0, len(top), size=(BOOTSTRAP_SAMPLES, len(top)))
    bottoms = bottom[picks].sum(axis=1)
    usable = bottoms > 0
    samples = 1 - top[picks].sum(axis=1)[usable] / bottoms[usable]
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(1 - top.sum() / bottom.sum()), float(low), float(high)


def _measure(
    backbone: Backbone,
    references: References,
    edited: EditableCache,
    hole: EditableCache | None,
    prepared: PreparedProbe,
    secrets: Sequence[str],
) -> ProbeResult:
    prompt, probe, tokenizer = prepared.prompt, prepared.probe, backbone.tokenizer
    edited_reply, exact_reply = greedy(backbone, edited, prompt, ANSWER_TOKENS), references.reply(backbone, prompt)
    # An empty greedy answer is the end token alone, and that is what the caches are compared on.
    answer = tuple(prepared.answer or exact_reply or sorted(end_tokens(backbone))[:1])[:LEAK_TOKENS]
    exact_scores = references.remember(
        ("exact", prompt, answer), lambda: score(backbone, references.exact, prompt, answer)
    )
    kl_unerased = references.remember(
        ("unerased", prompt, answer),
        lambda: kl_divergence(exact_scores, score(backbone, references.unerased, prompt, answer)),
    )
    edited_scores = score(backbone, edited, prompt, answer)
    places, forced = torch.arange(len(answer)), torch.tensor(answer)
    said, said_exact = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (edited_reply, exact_reply))
    return ProbeResult(
        question=probe.question,
        kind=probe.kind,
        answer=tokenizer.decode(answer, skip_special_tokens=True),
        edited_answer=said,
        tokens=len(answer),
        kl=kl_divergence(exact_scores, edited_scores) / len(answer),
        kl_unerased=kl_unerased / len(answer),
        kl_hole=None
        if hole is None
        else kl_divergence(exact_scores, score(backbone, hole, prompt, answer)) / len(answer),
        log_probability_exact=float(exact_scores[places, forced].mean()),
        log_probability_edited=float(edited_scores[places, forced].mean()),
        reproduced=any(mentions(said, secret) for secret in secrets),
        reproduced_exact=any(mentions(said_exact, secret) for secret in secrets),
    )


def _mean(results: Sequence[ProbeResult], key: str) -> float | None:
    """Mean over answer tokens, so that long answers weigh as much as they have tokens."""
    tokens = sum(result.tokens for result in results)
    return sum(float(getattr(result, key)) * result.tokens for result in results) / tokens if tokens else None


def _difference(results: Sequence[ProbeResult], edited: str, exact: str) -> float | None:
    if not results:
        return None
    return sum(float(getattr(result, edited)) - float(getattr(result, exact)) for result in results) / len(results)
