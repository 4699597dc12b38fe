"""Measures fidelity and leaks of an erase against the exact reference. Definitions: docs/measures.md.

Three caches answer the same questions: *exact* (a fresh prefill without the span), *edited*
(the cache after the erase) and *unerased* (a fresh prefill with the span).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch

from kveraser.cache.editable import EditableCache
from kveraser.measure.packing import greedy_together, score_together
from kveraser.measure.probes import Probe, mentions
from kveraser.measure.receipt import Audit, ProbeResult, TokenKL
from kveraser.model.backbone import Backbone
from kveraser.model.decode import end_tokens, text_with_offsets

T = TypeVar("T")

ANSWER_TOKENS = 32
LEAK_TOKENS = 64
BOOTSTRAP_SAMPLES = 2000
INSENSITIVE = 1e-6
"""Below this KL of the unerased cache, in nats per token, the span has no influence and fidelity is undefined."""


@dataclass(frozen=True)
class PreparedProbe:
    """A probe as tokens: the prompt that is appended to the cache, and the forced answer, if one is given."""

    probe: Probe
    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None


@dataclass(frozen=True)
class References:
    """The two fresh prefills that an audit compares with. They can be reused for every erase of the same span.

    Answers, log-probabilities and the position-gap cache are computed once and kept.
    """

    exact: EditableCache
    unerased: EditableCache
    memory: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value under `key`, computed on first use."""
        if key not in self.memory:
            self.memory[key] = compute()
        value: T = self.memory[key]
        return value


def kl_divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Sum over places of KL(exact || other), in nats, from log-probabilities `[answer, vocabulary]`."""
    return float(kl_by_place(exact, other).sum())


def kl_by_place(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """float64 `[answer]`."""
    probabilities, difference = exact.double().exp(), exact.double() - other.double()
    # Where both probabilities are 0, the product is not a number.
    return (probabilities * difference).masked_fill(probabilities == 0, 0.0).sum(dim=-1)


def audit(
    backbone: Backbone,
    references: References,
    edited: EditableCache,
    probes: Sequence[PreparedProbe],
    secrets: Sequence[str],
    position_gap: EditableCache | None = None,
    seed: int = 0,
    answer_tokens: int = ANSWER_TOKENS,
) -> Audit:
    """Measure `edited` against the references. All caches are left as they were.

    Args:
        secrets: a greedy answer that contains one of these texts counts as a leak.
        position_gap: the remaining tokens prefilled at the edited cache's positions, where these have a gap.
        seed: of the bootstrap.
        answer_tokens: maximum tokens of a greedy answer.
    """
    results = _measure(backbone, references, edited, position_gap, probes, secrets, answer_tokens)
    of_kind = {kind: [result for result in results if result.kind == kind] for kind in ("influence", "leak", "no_harm")}
    influence, leak, no_harm = of_kind["influence"], of_kind["leak"], of_kind["no_harm"]
    fidelity, low, high = fidelity_interval(
        [result.kl * result.tokens for result in influence],
        [result.kl_unerased * result.tokens for result in influence],
        sum(result.tokens for result in influence),
        seed,
    )
    return Audit(
        kl=_mean(influence, "kl"),
        kl_unerased=_mean(influence, "kl_unerased"),
        fidelity=fidelity,
        fidelity_low=low,
        fidelity_high=high,
        leak=_difference(leak, "log_probability_edited", "log_probability_exact"),
        leak_rate=_difference(leak, "reproduced", "reproduced_exact"),
        no_harm=_mean(no_harm, "kl"),
        kl_hole=_mean(influence, "kl_hole") if position_gap is not None else None,
        probes=tuple(results),
    )


def fidelity_interval(
    edited: Sequence[float], unerased: Sequence[float], tokens: int, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Fidelity and its 95% bootstrap interval over cases, from each case's summed KL in nats.

    Returns:
        `(None, None, None)` when the span has no influence on the cases (mean unerased KL below 1e-6 nats per token).
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
    position_gap: EditableCache | None,
    probes: Sequence[PreparedProbe],
    secrets: Sequence[str],
    answer_tokens: int,
) -> list[ProbeResult]:
    prompts = tuple(prepared.prompt for prepared in probes)
    replies = greedy_together(backbone, edited, prompts, answer_tokens)
    exact_replies = references.remember(
        ("replies", prompts, answer_tokens),
        lambda: greedy_together(backbone, references.exact, prompts, answer_tokens),
    )
    # An empty greedy answer is the end token alone: the caches are compared on that.
    answers = tuple(
        tuple(prepared.answer or reply or sorted(end_tokens(backbone))[:1])[:LEAK_TOKENS]
        for prepared, reply in zip(probes, exact_replies, strict=True)
    )

    def scores(cache: EditableCache) -> list[torch.Tensor]:
        return score_together(backbone, cache, list(zip(prompts, answers, strict=True)))

    exact = references.remember(("exact", prompts, answers), lambda: scores(references.exact))

    def distances(cache: EditableCache) -> list[list[float]]:
        """KL(exact || cache) at every token of every probe's answer, in nats."""
        pairs = zip(exact, scores(cache), strict=True)
        return [kl_by_place(reference, other).tolist() for reference, other in pairs]

    unerased = references.remember(("unerased", prompts, answers), lambda: distances(references.unerased))
    gaps: Sequence[float | None] = [None] * len(probes)
    if position_gap is not None:
        key = ("gap", prompts, answers, position_gap.next_position, tuple(position_gap.positions.tolist()))
        gaps = [fmean(one) for one in references.remember(key, lambda: distances(position_gap))]
    results = []
    for place, (prepared, edited_scores) in enumerate(zip(probes, scores(edited), strict=True)):
        answer = answers[place]
        places, forced = torch.arange(len(answer)), torch.tensor(answer)
        kls = kl_by_place(exact[place], edited_scores).tolist()
        said, said_exact = (
            backbone.tokenizer.decode(tokens, skip_special_tokens=True)
            for tokens in (replies[place], exact_replies[place])
        )
        results.append(
            ProbeResult(
                question=prepared.probe.question,
                kind=prepared.probe.kind,
                answer=backbone.tokenizer.decode(answer, skip_special_tokens=True),
                edited_answer=said,
                tokens=len(answer),
                kl=fmean(kls),
                kl_unerased=fmean(unerased[place]),
                kl_hole=gaps[place],
                log_probability_exact=float(exact[place][places, forced].mean()),
                log_probability_edited=float(edited_scores[places, forced].mean()),
                reproduced=any(mentions(said, secret) for secret in secrets),
                reproduced_exact=any(mentions(said_exact, secret) for secret in secrets),
                by_token=tuple(map(TokenKL, _pieces(backbone, answer), kls, unerased[place])),
            )
        )
    return results


def _pieces(backbone: Backbone, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens is assigned to the first one."""
    text, offsets = text_with_offsets(backbone.tokenizer, tokens)
    reached = accumulate((end for _, end in offsets), max, initial=0)
    return [text[max(start, before) : end] for (start, end), before in zip(offsets, reached, strict=False)]


def _mean(results: Sequence[ProbeResult], key: str) -> float | None:
    """Mean over all answer tokens."""
    tokens = sum(result.tokens for result in results)
    return sum(float(getattr(result, key)) * result.tokens for result in results) / tokens if tokens else None


def _difference(results: Sequence[ProbeResult], edited: str, exact: str) -> float | None:
    if not results:
        return None
    return sum(float(getattr(result, edited)) - float(getattr(result, exact)) for result in results) / len(results)
