"""Answers from a cache: greedy or sampled decoding, and teacher-forced scoring, at the cache's own positions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Any

import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError
from kveraser.model.backbone import Backbone

LogitsFilter = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A transformers `LogitsProcessor`: `(input_ids [1, tokens], scores [1, vocabulary]) -> scores`."""

BLOCK_TOKENS = 64
"""Tokens whose text is made together: each is decoded with those of its block before it."""
CONTEXT_TOKENS = 8
"""Tokens before a block that are decoded with it."""

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
        stop: texts at which to stop; they are not part of the answer's text, but of its tokens.
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
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens!r}: ask for at least 1")
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < inf or (name == "top_p" and value > 1):
                wanted = "in (0, 1]" if name == "top_p" else "above 0"
                raise InputError(
                    f"{name} is {value!r}, but it is a number {wanted}; for greedy answers leave do_sample off"
                )
        if type(self.top_k) is not int or self.top_k < 0:
            raise InputError(f"top_k is {self.top_k!r}, but it is a count, 0 for no limit")
        if self.seed is not None and type(self.seed) is not int:
            raise InputError(f"seed is {self.seed!r}: give a whole number, or None")
        if not isinstance(self.stop, tuple | list) or not all(isinstance(stop, str) and stop for stop in self.stop):
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
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.do_sample:
            if self.temperature != 1:
                processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
        return processors

    def stops(self, tokenizer: Any, answer: Sequence[int]) -> bool:
        """Whether a stop text stands at the end of an answer.

        Looked for in the text, not in the tokens: a character may be spread over several.
        """
        if not self.stop:
            return False
        # No character has more than four bytes, and no token less than one.
        tail = list(answer[-4 * max(map(len, self.stop)) - 4 :])
        texts = [tokenizer.decode(tail, skip_special_tokens=skip) for skip in (True, False)]
        return any(stop in text for stop in self.stop for text in texts)


def end_tokens(backbone: Backbone) -> frozenset[int]:
    """The tokens that end an answer."""
    declared = backbone.model.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in [*listed, backbone.tokenizer.eos_token_id] if token is not None)


def generate(
    backbone: Backbone, cache: EditableCache, prompt: Sequence[int], decoding: Decoding
) -> Generator[int, None, bool]:
    """Append `prompt` and decode, one token at a time; end tokens are not yielded.

    The last token yielded is not in the cache. The generator's return value tells whether the answer came to its end
    (an end token, a stop text or criterion) rather than to a limit.

    Raises:
        ContextLengthError: the prompt does not fit; decoding itself stops at the last position.
    """
    ends, processors = end_tokens(backbone), decoding.processors()
    generator = torch.Generator().manual_seed(decoding.seed) if decoding.seed is not None else None
    seen, answer = torch.tensor([list(prompt)]), list[int]()
    feed: Sequence[int] = prompt
    for _ in range(decoding.max_new_tokens):
        if backbone.max_positions is not None and feed is not prompt and cache.next_position >= backbone.max_positions:
            return False
        scores = processors(seen, backbone.logits(cache, feed).cpu())
        if decoding.do_sample:
            token = int(torch.multinomial(scores[0].softmax(dim=-1), 1, generator=generator))
        else:
            token = int(scores[0].argmax())
        if token in ends:
            return True
        answer.append(token)
        seen = torch.cat([seen, torch.tensor([[token]])], dim=1)
        stopped = [bool(torch.as_tensor(rule(seen, scores)).all()) for rule in decoding.stopping_criteria]
        yield token
        if any(stopped) or decoding.stops(backbone.tokenizer, answer):
            return True
        feed = [token]
    return False


@dataclass(frozen=True)
class Decoded:
    """What was decoded: the tokens, their text up to a stop text, and whether the answer came to its end."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


CALL_MARKERS = frozenset({"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<tool_call>", "</tool_call>", "<think>", "</think>"})
"""What tells calls and reasoning from an answer's text; some tokenizers count these among their special tokens."""


class AnswerText:
    """An answer's text while its tokens come. What is shown never ends inside a character or shows part of a stop text.

    Special tokens are left out, except for `CALL_MARKERS`: without them a call could not be told from text.

    Args:
        show_special: none is left out.

    Attributes:
        text: of all tokens so far, up to a stop text.
        shown: the part of it that can be shown.
        cut: whether a stop text came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], show_special: bool = False) -> None:
        self.text = self.shown = ""
        self.cut = False
        self._tokenizer, self._stop = tokenizer, stop
        added = tokenizer.added_tokens_decoder
        shown = set(map(str, added.values())) if show_special else CALL_MARKERS
        self._hidden = {token for token, text in added.items() if text.special and str(text) not in shown}
        # The text of all tokens but those of the window; the window's first `_known` tokens only give it a beginning.
        self._decoded, self._window, self._known = "", list[int](), 0

    def add(self, token: int) -> str:
        """Add a token; what can be shown now and could not before.

        Decodes a window of the last tokens, as in vLLM and TGI, so that the cost of a token does not grow with the
        answer.
        """
        if token not in self._hidden:
            self._window.append(token)
        known = len(self._tokenizer.decode(self._window[: self._known]))
        new = self._tokenizer.decode(self._window)[known:]
        whole = self._decoded + new
        if new and (not new.endswith("\ufffd") or len(self._window) - self._known >= BLOCK_TOKENS):
            # No character is unfinished: these tokens become the beginning of the next window.
            self._decoded, self._window = whole, self._window[self._known :]
            self._known = len(self._window)
        self.text = _cut(whole, self._stop)
        self.cut = len(self.text) < len(whole)
        return self._show(_without_partial(self.text, self._stop))

    def finish(self) -> str:
        """Nothing follows: what was held back."""
        return self._show(self.text)

    def _show(self, ready: str) -> str:
        before = len(self.shown)
        if len(ready) > before:
            self.shown = ready
        return ready[before:]


def stream_text(
    backbone: Backbone, cache: EditableCache, prompt: Sequence[int], decoding: Decoding
) -> Generator[str, None, Decoded]:
    """As `generate`, in pieces of text that never end inside a character or show part of a stop text."""
    tokens: list[int] = []
    answer = AnswerText(backbone.tokenizer, decoding.stop)
    steps = generate(backbone, cache, prompt, decoding)
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as finished:
            ended = bool(finished.value)
            break
        if piece := answer.add(tokens[-1]):
            yield piece
    if rest := answer.finish():
        yield rest
    return Decoded(tuple(tokens), answer.text, ended)


def text_with_offsets(
    tokenizer: Any, tokens: Sequence[int], before: int | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of decoded tokens, and the `(start, end)` of each in it, in characters.

    Tokens that only together make a character all span it. Behind a token `before`, they keep the space that they begin
    with; SentencePiece tokenizers drop it from the beginning of a text.
    """
    if before is not None:
        lead = tokenizer.decode([before])
        whole, places = text_with_offsets(tokenizer, [before, *tokens])
        if whole.startswith(lead):
            size = len(lead)
            return whole[size:], [(max(0, start - size), max(0, end - size)) for start, end in places[1:]]
    text: str = tokenizer.decode(tokens)
    finished, size = _finished(tokenizer, tokens, BLOCK_TOKENS)
    if size != len(text):
        # This tokenizer's text of a part is no part of the text.
        finished, _ = _finished(tokenizer, tokens, len(tokens))
    reached = [min(size, len(text)) for size in accumulate(finished, max)]
    starts = [0, *reached][: len(tokens)]
    ends = [reached[place] if (place := bisect_right(reached, start)) < len(reached) else len(text) for start in starts]
    return text, list(zip(starts, ends, strict=True))


def _finished(tokenizer: Any, tokens: Sequence[int], block: int) -> tuple[list[int], int]:
    """Characters that are whole behind every token, and characters in all; decoded `block` tokens at a time.

    What stands before a block is decoded with it, as far as it can matter to how its text begins.
    """
    finished: list[int] = []
    start, size = 0, 0
    while start < len(tokens):
        context, count, text, whole = max(0, start - CONTEXT_TOKENS), 0, "", ""
        before = len(tokenizer.decode(tokens[context:start]))
        # A block ends with a whole character, if one ends soon.
        while start + count < len(tokens) and (count < block or (text != whole and count < 2 * block)):
            count += 1
            text = tokenizer.decode(tokens[context : start + count])
            whole = text.rstrip("\ufffd")
            finished.append(size + max(0, len(whole) - before))
        start, size = start + count, size + len(text) - before
    return finished, size


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

    The cache is left as it was. The answer starts at the cache's own next position, after the prompt; neither is empty.
    """
    if not prompt or not answer:
        raise InputError(f"nothing to score: {len(prompt)} tokens of question, {len(answer)} of answer")
    with rewound(cache):
        logits = backbone.logits(cache, [*prompt, *answer[:-1]], keep=len(answer))
    return logits.log_softmax(dim=-1)


def greedy(backbone: Backbone, cache: EditableCache, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """The greedy answer's tokens, without the end token; the cache is left as it was."""
    with rewound(cache):
        return list(generate(backbone, cache, prompt, Decoding(max_new_tokens=max_new_tokens)))
