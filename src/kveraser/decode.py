"""Answers from a cache: greedy or sampled decoding, and teacher-forced scoring, at the cache's own positions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kveraser.backbone import Backbone
from kveraser.cache import EditableCache
from kveraser.errors import InputError

LogitsFilter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A transformers `LogitsProcessor`: `(input_ids [1, tokens], scores [1, vocabulary]) -> scores`."""

StopRule = Callable[[torch.Tensor, torch.Tensor], Any]
"""A transformers `StoppingCriteria`: `(input_ids [1, tokens], scores [1, vocabulary]) -> bool tensor [1]`."""


@dataclass(frozen=True)
class Decoding:
    """How to decode. Greedy by default; `seed` makes sampling repeatable.

    Attributes:
        max_new_tokens: most tokens to generate.
        do_sample: sample instead of taking the likeliest token.
        temperature, top_p, top_k: as in transformers; used when sampling.
        repetition_penalty: as in transformers; 1 is none. The question counts, the context does not.
        seed: of the sampler.
        stop: texts at which to stop; they are not part of the answer.
        logits_processors: further transformers `LogitsProcessor`s, applied first.
        stopping_criteria: further transformers `StoppingCriteria`.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logits_processors: tuple[LogitsFilter, ...] = ()
    stopping_criteria: tuple[StopRule, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}: ask for at least 1")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError(
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}: "
                "temperature is above 0, top_p in (0, 1], top_k at least 0; for greedy answers leave do_sample off"
            )
        if not isinstance(self.stop, tuple | list) or not all(self.stop):
            raise InputError(f"stop is {self.stop!r}: give a tuple of texts, none of them empty")

    def processors(self) -> Any:
        """The transformers `LogitsProcessorList` for these settings."""
        from transformers import (
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        processors = LogitsProcessorList(self.logits_processors)
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.do_sample:
            if self.temperature != 1:
                processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
        return processors

    def criteria(self, tokenizer: Any) -> Any:
        """The transformers `StoppingCriteriaList` for these settings."""
        from transformers import StoppingCriteriaList, StopStringCriteria

        criteria = StoppingCriteriaList(self.stopping_criteria)
        if self.stop:
            criteria.append(StopStringCriteria(tokenizer, list(self.stop)))
        return criteria


def end_tokens(backbone: Backbone) -> frozenset[int]:
    """The tokens that end an answer."""
    declared = backbone.model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in [*listed, backbone.tokenizer.eos_token_id] if token is not None)


def generate(
    backbone: Backbone, cache: EditableCache, prompt: Sequence[int], decoding: Decoding
) -> Iterator[tuple[int, bool]]:
    """Append `prompt` and decode, one `(token, ends)` at a time; end tokens are not yielded.

    The last token yielded is not in the cache. `ends` tells that a stop text or criterion fired with this token.

    Raises:
        ContextLengthError: the prompt does not fit; decoding itself stops at the last position.
    """
    ends = end_tokens(backbone)
    processors, criteria = decoding.processors(), decoding.criteria(backbone.tokenizer)
    generator = torch.Generator().manual_seed(decoding.seed) if decoding.seed is not None else None
    seen = torch.tensor([list(prompt)])
    feed: Sequence[int] = prompt
    for _ in range(decoding.max_new_tokens):
        if backbone.max_positions is not None and feed is not prompt and cache.next_position >= backbone.max_positions:
            return
        scores = processors(seen, backbone.logits(cache, feed).cpu())
        if decoding.do_sample:
            token = int(torch.multinomial(scores[0].softmax(dim=-1), 1, generator=generator))
        else:
            token = int(scores[0].argmax())
        if token in ends:
            return
        seen = torch.cat([seen, torch.tensor([[token]])], dim=1)
        stopped = bool(len(criteria)) and bool(torch.as_tensor(criteria(seen, scores)).all())
        yield token, stopped
        if stopped:
            return
        feed = [token]


@dataclass(frozen=True)
class Decoded:
    """What was decoded: the tokens, their text up to a stop text, and whether the answer came to its end."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


def stream_text(
    backbone: Backbone, cache: EditableCache, prompt: Sequence[int], decoding: Decoding
) -> Generator[str, None, Decoded]:
    """As `generate`, in pieces of text that never end inside a character or show part of a stop text."""
    tokens: list[int] = []
    shown, stopped = "", False

    def text() -> str:
        return _cut(backbone.tokenizer.decode(tokens, skip_special_tokens=True), decoding.stop)

    for token, stopped in generate(backbone, cache, prompt, decoding):
        tokens.append(token)
        ready = text() if stopped else _without_partial(text(), decoding.stop)
        if len(ready) > len(shown):
            yield ready[len(shown) :]
            shown = ready
    if len(text()) > len(shown):
        yield text()[len(shown) :]
    return Decoded(tuple(tokens), text(), stopped or len(tokens) < decoding.max_new_tokens)


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop text."""
    places = [text.find(stop) for stop in stops if stop in text]
    return text[: min(places)] if places else text


def _without_partial(text: str, stops: Sequence[str]) -> str:
    """The text without an unfinished character or a beginning of a stop text at its end."""
    text = text.rstrip("\ufffd")
    held = max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
    return text[: len(text) - held]


@contextmanager
def rewound(cache: EditableCache) -> Iterator[None]:
    """What is appended inside is gone afterwards, whatever happens."""
    length = cache.length
    try:
        yield
    finally:
        if cache.length > length:
            cache.truncate(length)


def score(backbone: Backbone, cache: EditableCache, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """Teacher-forced log-probabilities of every token at each place of `answer`, float32 `[answer, vocabulary]`.

    The cache is left as it was. The answer starts at the cache's own next position, after the prompt.
    """
    with rewound(cache):
        logits = backbone.logits(cache, [*prompt, *answer[:-1]], keep=len(answer))
    return logits.log_softmax(dim=-1)


def greedy(backbone: Backbone, cache: EditableCache, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The greedy answer's tokens, without the end token; the cache is left as it was."""
    with rewound(cache):
        return [token for token, _ in generate(backbone, cache, prompt, Decoding(max_new_tokens=max_new_tokens))]
