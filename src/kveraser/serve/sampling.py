"""Token sampling with the settings of OpenAI's and vLLM's APIs.

Every stream has its own random generator, so its answer does not depend on other streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import isfinite
from typing import Any

import torch

from kveraser.errors import BackboneError, InputError
from kveraser.serve.engine import Sampling, TokenLogprob

GREEDY_BELOW = 1e-5
"""Decoding is greedy below this temperature: division by it would overflow float32."""

MOST_LOGPROBS = 20

RANGES = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}
"""Allowed values, as in OpenAI's and vLLM's APIs."""


def check(sampling: Sampling) -> None:
    """Validate sampling settings.

    Raises:
        InputError: a setting is out of range.
    """
    for name, (low, high) in RANGES.items():
        value = getattr(sampling, name)
        if type(value) not in (int, float) or not isfinite(value) or not low <= value <= high:
            raise InputError(f"{name} is {value!r}, but it is a number from {low:g} to {high:g}")
    if sampling.max_tokens is not None and (type(sampling.max_tokens) is not int or sampling.max_tokens < 1):
        raise InputError(f"max_tokens is {sampling.max_tokens!r}: ask for at least 1")
    if type(sampling.top_k) is not int or sampling.top_k < 0:
        raise InputError(f"top_k is {sampling.top_k!r}: give a count of tokens, 0 for all")
    if sampling.seed is not None and type(sampling.seed) is not int:
        raise InputError(f"seed is {sampling.seed!r}: give a whole number, or none")
    if sampling.logprobs is not None and (
        type(sampling.logprobs) is not int or not 0 <= sampling.logprobs <= MOST_LOGPROBS
    ):
        raise InputError(f"logprobs is {sampling.logprobs!r}, but it is a count from 0 to {MOST_LOGPROBS}")
    if not all(isinstance(stop, str) and stop for stop in sampling.stop):
        raise InputError(f"stop is {sampling.stop!r}: give texts, none of them empty")


class Sampler:
    """Samples the tokens of one answer.

    Args:
        prompt: tokens that the repetition penalty includes, in addition to the answer's.

    Raises:
        InputError: see `check`.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int] = ()) -> None:
        check(sampling)
        self._seen = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        self.sampling = sampling
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**63)
        self._warpers = _warpers(sampling)

    def choose(self, logits: torch.Tensor) -> TokenLogprob:
        """Sample the next token. Log-probabilities are those before penalties, temperature and filters.

        Args:
            logits: float32 `[vocabulary]`, on the CPU.

        Raises:
            BackboneError: some logits are NaN.
        """
        if bool(logits.isnan().any()):
            raise BackboneError("the model's logits are not numbers: load it in another dtype, such as float32")
        scores = self._penalized(logits)
        if self.sampling.temperature < GREEDY_BELOW:
            token = int(scores.argmax())
        else:
            for warper in self._warpers:
                scores = warper(None, scores[None])[0]
            token = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
        self._counts[token] += 1
        logprobs = logits.log_softmax(dim=-1)
        likeliest = logprobs.topk(min(self.sampling.logprobs or 0, logits.numel()))
        top = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
        return TokenLogprob(token, float(logprobs[token]), top)

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Apply the repetition, frequency and presence penalties."""
        repetition = self.sampling.repetition_penalty
        if repetition != 1 and (seen := self._seen | self._counts.keys()):
            places = torch.tensor(sorted(token for token in seen if token < logits.numel()))
            old = logits[places]
            logits = logits.index_copy(0, places, torch.where(old > 0, old / repetition, old * repetition))
        frequency, presence = self.sampling.frequency_penalty, self.sampling.presence_penalty
        if not self._counts or not (frequency or presence):
            return logits
        said = torch.tensor(list(self._counts))
        times = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
        return logits.index_add(0, said, -(frequency * times + presence))


def _warpers(sampling: Sampling) -> list[Any]:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = []
    if sampling.temperature >= GREEDY_BELOW and sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(float(sampling.min_p)))
    return warpers
