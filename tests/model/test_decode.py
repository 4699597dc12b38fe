"""Decoding against transformers: greedy, sampled, stopped, streamed; and scores that leave no trace in the cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from kveraser.cache.editable import EditableCache
from kveraser.errors import ContextLengthError, InputError
from kveraser.model.backbone import Backbone
from kveraser.model.decode import (
    AnswerText,
    Decoding,
    end_tokens,
    generate,
    greedy,
    score,
    stream_text,
    text_with_offsets,
)
from kveraser.serve.tools import CallReader, formats_of
from tests.tiny import DEVICE, random_tokens, same_bits, snapshot, tiny_backbone, tiny_tokenizer

CONTEXT = random_tokens(40, seed=1)
PROMPT = random_tokens(6, seed=2)


def decode(backbone: Backbone, cache: EditableCache | None = None, **settings: Any) -> tuple[list[int], bool]:
    """The tokens that follow the prompt, and whether they came to an end."""
    steps = generate(backbone, cache or backbone.prefill(CONTEXT), PROMPT, Decoding(**settings))
    tokens = []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as finished:
            return tokens, finished.value


def stream(backbone: Backbone, **settings: Any) -> tuple[list[str], Any]:
    steps = stream_text(backbone, backbone.prefill(CONTEXT), PROMPT, Decoding(**settings))
    pieces = []
    while True:
        try:
            pieces.append(next(steps))
        except StopIteration as finished:
            return pieces, finished.value


class Forced:
    """A logits processor that makes a backbone say given tokens, then its end token."""

    def __init__(self, backbone: Backbone, text: str) -> None:
        self.tokens = [*backbone.tokenize(text)[0], backbone.tokenizer.eos_token_id]

    def __call__(self, seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[0, self.tokens[seen.shape[1] - len(PROMPT)]] = 0.0
        return forced


def transformers_generate(backbone: Backbone, count: int, **settings: Any) -> list[int]:
    output = backbone.model.generate(
        torch.tensor([CONTEXT + PROMPT]),
        attention_mask=torch.ones(1, len(CONTEXT + PROMPT), dtype=torch.long),
        max_new_tokens=count,
        eos_token_id=backbone.tokenizer.eos_token_id,
        **settings,
    )
    return output[0, len(CONTEXT + PROMPT) :].tolist()


# Which tokens come


def test_greedy_equals_transformers(backbone_of_family: Backbone) -> None:
    tokens, _ = decode(backbone_of_family, max_new_tokens=24)
    expected = transformers_generate(backbone_of_family, 24, do_sample=False)
    end = backbone_of_family.tokenizer.eos_token_id
    assert tokens == (expected[: expected.index(end)] if end in expected else expected)
    assert len(set(tokens)) > 3


def test_an_end_token_ends_the_answer_and_is_not_part_of_it(backbone: Backbone) -> None:
    free, ended = decode(backbone, max_new_tokens=6)
    assert len(free) == 6 and not ended
    stopping = tiny_backbone()
    stopping.model.generation_config.eos_token_id = [free[3], 0]
    assert end_tokens(stopping) == {free[3], 0, 2}
    assert decode(stopping, max_new_tokens=6) == (free[:3], True)


def test_greedy_leaves_the_cache_as_it_was(backbone: Backbone) -> None:
    cache = backbone.prefill(CONTEXT)
    before = snapshot(cache)
    tokens = greedy(backbone, cache, PROMPT, 8)
    assert tokens == decode(backbone, max_new_tokens=8)[0]
    assert same_bits(before, snapshot(cache))


def test_decoding_writes_prompt_and_answer_but_the_last_token(backbone: Backbone) -> None:
    cache = backbone.prefill(CONTEXT)
    tokens, _ = decode(backbone, cache, max_new_tokens=5)
    fresh = backbone.prefill([*CONTEXT, *PROMPT, *tokens[:-1]])
    assert cache.length == fresh.length == len(CONTEXT) + len(PROMPT) + 4
    for (keys, values), (fresh_keys, fresh_values) in zip(
        cache.read(0, cache.length), fresh.read(0, fresh.length), strict=True
    ):
        torch.testing.assert_close(keys, fresh_keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(values, fresh_values, atol=1e-4, rtol=1e-4)


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 2},
    {"top_k": 5},
    {"top_p": 0.6},
    {"repetition_penalty": 2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_sampling_equals_the_processors_of_transformers(backbone: Backbone, settings: dict[str, Any]) -> None:
    tokens, _ = decode(backbone, max_new_tokens=10, do_sample=True, seed=3, **settings)
    as_floats = {name: value if name == "top_k" else float(value) for name, value in settings.items()}
    expected: list[int] = []
    generator = torch.Generator().manual_seed(3)
    processors = transformers_processors(backbone, as_floats)
    for _ in range(10):
        logits = backbone.model(torch.tensor([[*CONTEXT, *PROMPT, *expected]], device=DEVICE)).logits[:, -1].float()
        scores = processors(torch.tensor([[*PROMPT, *expected]]), logits)
        expected.append(int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator)))
        if expected[-1] in end_tokens(backbone):
            expected.pop()
            break
    assert tokens == expected


def transformers_processors(backbone: Backbone, settings: dict[str, Any]) -> LogitsProcessorList:
    """The list that transformers' own `generate` builds for these settings."""
    config = backbone.model._prepare_generation_config(None, do_sample=True, **{"top_k": 0, **settings})[0]
    return backbone.model._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu")


def test_a_seed_makes_sampling_repeatable(backbone: Backbone) -> None:
    def sample(seed: int | None) -> list[int]:
        return decode(backbone, max_new_tokens=12, do_sample=True, temperature=3.0, seed=seed)[0]

    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert torch.equal(state, torch.get_rng_state())
    assert sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_own_logits_processors_come_first(backbone: Backbone) -> None:
    seen: list[tuple[int, ...]] = []

    def ban(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tokens[0].tolist()))
        scores[:, free[0]] = -torch.inf
        return scores

    free, _ = decode(backbone, max_new_tokens=4)
    tokens, _ = decode(backbone, max_new_tokens=4, logits_processors=(ban,))
    assert free[0] not in tokens and len(tokens) == 4
    assert seen == [(*PROMPT, *tokens[:count]) for count in range(4)]


# Where it ends


def test_stopping_criteria_end_the_answer_with_the_token_they_fire_on(backbone: Backbone) -> None:
    def fourth(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.tensor([seen.shape[1] >= len(PROMPT) + 4])

    free, _ = decode(backbone, max_new_tokens=9)
    assert decode(backbone, max_new_tokens=9, stopping_criteria=(fourth,)) == (free[:4], True)


def test_decoding_stops_at_the_last_position_and_is_not_ended() -> None:
    short = tiny_backbone(max_position_embeddings=50)
    tokens, ended = decode(short, max_new_tokens=30)
    # 46 tokens of context and question; the last answer token is never read.
    assert len(tokens) == 5 and not ended
    assert decode(short, max_new_tokens=5) == (tokens, False)
    with pytest.raises(ContextLengthError):
        decode(short, short.prefill(random_tokens(45)), max_new_tokens=3)


def test_the_most_tokens_are_a_limit_and_no_end(backbone: Backbone) -> None:
    forced = {"logits_processors": (Forced(backbone, "the end"),)}
    length = len(Forced(backbone, "the end").tokens) - 1
    assert [decode(backbone, max_new_tokens=count, **forced)[1] for count in (length, length + 1)] == [False, True]
    assert stream(backbone, max_new_tokens=length, **forced)[1].ended is False
    assert stream(backbone, max_new_tokens=length + 1, **forced)[1].ended is True


@pytest.mark.parametrize(
    ("said", "stop", "shown"),
    [
        ("one, two\nthree", ("\n",), "one, two"),
        ("one, two three", ("two",), "one, "),
        ("the thing in it", ("hing",), "the t"),
        ("say 🙂 and go", ("🙂",), "say "),
        ("a b c", ("c", "b"), "a "),
        ("never there", ("stop",), "never there"),
        ("ends in sto", ("stop",), "ends in sto"),
        ("a<|im_start|>b", ("<|im_start|>",), "a"),
    ],
)
def test_a_stop_text_is_never_shown_not_even_in_part(
    backbone: Backbone, said: str, stop: tuple[str, ...], shown: str
) -> None:
    pieces, decoded = stream(backbone, stop=stop, logits_processors=(Forced(backbone, said),))
    assert decoded.text == shown == "".join(pieces)
    assert decoded.ended
    held = len(backbone.tokenizer.decode(decoded.tokens))
    found = [said.find(one) + len(one) for one in stop if one in said]
    # The answer goes on to the token that completes the stop text, and no further.
    assert held == (min(found) if found else len(said))
    for count in range(len(pieces)):
        assert shown.startswith("".join(pieces[:count]))


def test_a_stop_text_in_the_question_does_not_stop(backbone: Backbone) -> None:
    last = backbone.tokenizer.decode(PROMPT[-1:])
    free, _ = decode(backbone, max_new_tokens=3)
    across = last + backbone.tokenizer.decode(free[:1])
    assert decode(backbone, max_new_tokens=3, stop=(across,)) == (free, False)
    assert decode(backbone, max_new_tokens=3, stop=(backbone.tokenizer.decode(free[:2]),)) == (free[:2], True)


# What is shown


def test_unfinished_characters_are_not_shown_in_the_stream(backbone: Backbone) -> None:
    said = "a 漢字 🙂!"
    pieces, decoded = stream(backbone, logits_processors=(Forced(backbone, said),))
    assert "".join(pieces) == decoded.text == said
    assert len(decoded.tokens) > len(said) and len(pieces) == len(said)
    assert all("\ufffd" not in piece for piece in pieces)


def test_a_character_cut_off_by_the_limit_is_shown_as_what_it_is(backbone: Backbone) -> None:
    pieces, decoded = stream(backbone, logits_processors=(Forced(backbone, "a🙂"),), max_new_tokens=3)
    assert pieces == ["a", "\ufffd"] and decoded.text == "a\ufffd" and len(decoded.tokens) == 3


WORDS = ("the thing", "🙂", " 漢字", "é", "\n\n", " a", "x🙂🙂", "don't", " .", "  ")


class Counting:
    """A tokenizer that notes how many tokens it decodes at once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.added_tokens_decoder, self.most = tokenizer, tokenizer.added_tokens_decoder, 0

    def decode(self, tokens: list[int]) -> str:
        self.most = max(self.most, len(tokens))
        return str(self.tokenizer.decode(tokens))


def test_the_text_of_a_long_answer_is_decoded_a_window_at_a_time(backbone: Backbone) -> None:
    text = "".join(WORDS[number * number % 7 + number % 4] for number in range(200))
    tokens = backbone.tokenize(text)[0]
    counting = Counting(backbone.tokenizer)
    answer = AnswerText(counting, ())
    pieces = [answer.add(token) for token in tokens]
    assert "".join(pieces) == answer.text == text and len(tokens) > 600
    assert counting.most < 20


def test_broken_characters_leave_the_window_bounded(backbone: Backbone) -> None:
    broken = backbone.tokenize("🙂")[0][:1] * 500
    counting = Counting(backbone.tokenizer)
    answer = AnswerText(counting, ())
    pieces = [answer.add(token) for token in [*broken, *backbone.tokenize(" end")[0]]]
    assert answer.text == "".join(pieces) == "\ufffd" * 500 + " end" and counting.most < 200


def test_special_tokens_that_mark_calls_are_shown_so_that_calls_can_be_read() -> None:
    """As Mistral's, whose marker is a special token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[OTHER]"]})
    call = '[{"name": "find", "arguments": {"what": "parcel"}}]'
    answer, reader = AnswerText(tokenizer, ()), CallReader(formats=formats_of("[TOOL_CALLS]"))
    tokens = tokenizer(f"[OTHER]Yes. [TOOL_CALLS]{call}<|endoftext|>")["input_ids"]
    shown = [reader.feed(answer.add(token)) for token in tokens]
    shown += [reader.feed(answer.finish()), reader.finish()]
    assert "".join(text for text, _ in shown) == "Yes."
    assert [(one.name, one.arguments) for _, calls in shown for one in calls] == [("find", '{"what": "parcel"}')]


def test_special_tokens_are_not_shown(backbone: Backbone) -> None:
    pieces, decoded = stream(backbone, logits_processors=(Forced(backbone, "a<|im_start|>b"),))
    assert decoded.text == "".join(pieces) == "ab" and len(decoded.tokens) == 3


@pytest.mark.parametrize("text", ["", "the thing", "🙂", "a 漢字 🙂! the", "<|im_start|>é"])
def test_offsets_of_decoded_tokens_are_those_of_the_tokenizer(backbone: Backbone, text: str) -> None:
    tokens, offsets = backbone.tokenize(text)
    assert text_with_offsets(backbone.tokenizer, tokens) == (text, offsets)


def test_offsets_of_broken_characters_cover_the_text_in_order(backbone: Backbone) -> None:
    tokens = backbone.tokenize("🙂")[0][:2] + backbone.tokenize("a")[0] + backbone.tokenize("漢")[0][:1]
    text, offsets = text_with_offsets(backbone.tokenizer, tokens)
    assert text == "\ufffda\ufffd"
    assert offsets == [(0, 2), (0, 2), (0, 2), (2, 3)]


def test_offsets_of_a_long_text_are_made_a_block_at_a_time(backbone: Backbone) -> None:
    words = ["the thing", "🙂", " 漢字", "é", "\n\n", " a", "x🙂🙂", "<|im_start|>"]
    text = "".join(words[number * number % 7] for number in range(400))
    tokens, offsets = backbone.tokenize(text)
    decoded: list[int] = []

    class Counting:
        def decode(self, tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return str(backbone.tokenizer.decode(tokens))

    assert text_with_offsets(Counting(), tokens) == (text, offsets) and len(tokens) > 600
    # Not of every token with all before it.
    assert sum(decoded) < 150 * len(tokens)
    broken = [token for token in tokens for _ in range(2)]
    whole = backbone.tokenizer.decode(broken)
    found, places = text_with_offsets(backbone.tokenizer, broken)
    assert found == whole and places[0][0] == 0 and places[-1][1] == len(whole)
    assert all(start <= later for (start, _), (later, _) in pairwise(places))


def test_offsets_survive_a_tokenizer_that_rewrites_across_tokens() -> None:
    class Joining:
        """Two equal letters in a row are written as one."""

        def decode(self, tokens: list[int]) -> str:
            letters = [chr(token) for token in tokens]
            return "".join(one for place, one in enumerate(letters) if not place or letters[place - 1] != one)

    tokens = [ord("a"), ord("a"), ord("b")] * 100
    text, offsets = text_with_offsets(Joining(), tokens)
    assert text == "ab" * 100 and offsets[:3] == [(0, 1), (1, 2), (1, 2)] and offsets[-1] == (199, 200)


# Scores


def test_scores_equal_log_softmax_of_an_uncached_pass(backbone_of_family: Backbone) -> None:
    cache, answer = backbone_of_family.prefill(CONTEXT), random_tokens(5, seed=3)
    before = snapshot(cache)
    scores = score(backbone_of_family, cache, PROMPT, answer)
    logits = backbone_of_family.model(torch.tensor([[*CONTEXT, *PROMPT, *answer]], device=DEVICE)).logits[0].float()
    start = len(CONTEXT) + len(PROMPT)
    expected = logits[start - 1 : start + 4].log_softmax(-1)
    assert scores.shape == expected.shape == (5, logits.shape[-1])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert same_bits(before, snapshot(cache))
    torch.testing.assert_close(score(backbone_of_family, cache, PROMPT, answer[:1]), expected[:1], atol=1e-4, rtol=1e-4)


def test_scores_start_at_the_caches_own_next_position(backbone: Backbone) -> None:
    cache = backbone.prefill(CONTEXT)
    here = score(backbone, cache, PROMPT, [7, 8])
    with cache.edit():
        cache.set_next_position(200)
    there = score(backbone, cache, PROMPT, [7, 8])
    assert cache.next_position == 200
    positions = torch.tensor([[*range(len(CONTEXT)), *range(200, 200 + len(PROMPT) + 1)]], device=DEVICE)
    logits = (
        backbone.model(torch.tensor([[*CONTEXT, *PROMPT, 7]], device=DEVICE), position_ids=positions)
        .logits[0, -2:]
        .float()
    )
    torch.testing.assert_close(there, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert float((here - there).abs().max()) > 0.01


def test_a_failing_score_takes_back_what_it_wrote(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = backbone.prefill(CONTEXT)
    before = snapshot(cache)
    inside = backbone.model.lm_head.forward

    def broken(states: torch.Tensor) -> torch.Tensor:
        inside(states)
        raise KeyboardInterrupt

    monkeypatch.setattr(backbone.model.lm_head, "forward", broken)
    with pytest.raises(KeyboardInterrupt):
        score(backbone, cache, PROMPT, [7, 8])
    assert same_bits(before, snapshot(cache))


@pytest.mark.parametrize(("prompt", "answer"), [([], [3]), ([3], [])])
def test_there_must_be_something_to_score(backbone: Backbone, prompt: list[int], answer: list[int]) -> None:
    with pytest.raises(InputError, match="nothing to score"):
        score(backbone, backbone.prefill(CONTEXT), prompt, answer)


# Settings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": "9"}, "max_new_tokens is '9'"),
        ({"temperature": 0}, "temperature is 0, but it is a number above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_p": 0}, r"top_p is 0, but it is a number in \(0, 1\]"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stop": "text"}, "stop is 'text': give a tuple"),
        ({"stop": ("",)}, r"stop is \('',\)"),
        ({"stop": (3,)}, r"stop is \(3,\)"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Decoding(**settings)
