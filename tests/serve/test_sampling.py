"""Sampling as OpenAI's API describes it, against the formulas."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from kveraser.errors import BackboneError, InputError
from kveraser.serve.engine import Sampling
from kveraser.serve.sampling import Sampler

LOGITS = torch.tensor([1.0, 2.0, 0.5, -1.0, 1.5, -3.0])
PROBABILITIES = LOGITS.softmax(dim=-1)


def chosen(count: int, logits: torch.Tensor = LOGITS, **settings: Any) -> list[int]:
    sampler = Sampler(Sampling(**settings))
    return [sampler.choose(logits).token for _ in range(count)]


def shares(tokens: list[int]) -> torch.Tensor:
    counts = Counter(tokens)
    return torch.tensor([counts[token] / len(tokens) for token in range(len(LOGITS))])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1e-6}, {"top_p": 0.0}, {"top_p": 0.1}])
def test_cold_or_narrow_is_greedy(settings: dict[str, float]) -> None:
    assert chosen(20, **settings) == [1] * 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_temperature_says(temperature: float) -> None:
    drawn = shares(chosen(4000, temperature=temperature, seed=1))
    assert torch.allclose(drawn, (LOGITS / temperature).softmax(dim=-1), atol=0.03)
    assert not torch.allclose(drawn, (LOGITS / (3 - temperature)).softmax(dim=-1), atol=0.03)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    nucleus = [1, 4]
    assert PROBABILITIES[[1]].sum() < 0.6 < PROBABILITIES[nucleus].sum()
    drawn = shares(chosen(2000, top_p=0.6, seed=2))
    expected = torch.zeros(6)
    expected[nucleus] = PROBABILITIES[nucleus] / PROBABILITIES[nucleus].sum()
    assert set(drawn.nonzero().flatten().tolist()) == set(nucleus)
    assert torch.allclose(drawn, expected, atol=0.04)


def test_a_seed_repeats_an_answer_and_none_does_not() -> None:
    first, second, other = (chosen(50, seed=seed) for seed in (7, 7, 8))
    assert first == second != other
    assert chosen(50) != chosen(50)
    assert chosen(50, seed=2**70) == chosen(50, seed=2**70) and chosen(50, seed=-3) == chosen(50, seed=-3)


def test_a_sampler_does_not_touch_the_random_numbers_of_others() -> None:
    one, state = Sampler(Sampling(seed=7)), torch.random.get_rng_state()
    between = []
    for _ in range(50):
        between.append(one.choose(LOGITS).token)
        Sampler(Sampling()).choose(LOGITS)
    assert between == chosen(50, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_presence_penalty_is_taken_once() -> None:
    # 2.0, 1.5, 1.0, ...: minus 0.8 once each.
    assert chosen(5, temperature=0.0, presence_penalty=0.8) == [1, 4, 1, 1, 1]


def test_the_frequency_penalty_is_taken_as_often_as_a_token_was_said() -> None:
    said: Counter[int] = Counter()
    expected = []
    for _ in range(12):
        expected.append(max(range(6), key=lambda token: float(LOGITS[token]) - 0.3 * said[token]))
        said[expected[-1]] += 1
    assert chosen(12, temperature=0.0, frequency_penalty=0.3) == expected
    assert len(set(expected)) > 2


def test_negative_penalties_repeat() -> None:
    logits = torch.tensor([1.0, 1.1])
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=-0.5))
    assert sampler.choose(logits).token == 1
    assert sampler.choose(torch.tensor([1.4, 1.0])).token == 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.3, "top_p": 0.4, "presence_penalty": 1.0}])
def test_logprobs_are_the_models_own(settings: dict[str, float]) -> None:
    sampler = Sampler(Sampling(logprobs=3, seed=0, **settings))
    for _ in range(5):
        said = sampler.choose(LOGITS)
        assert said.logprob == pytest.approx(float(PROBABILITIES.log()[said.token]), abs=1e-5)
        assert [token for token, _ in said.top] == [1, 4, 0]
        assert [logprob for _, logprob in said.top] == pytest.approx(PROBABILITIES.log()[[1, 4, 0]].tolist(), abs=1e-5)


def test_no_more_tokens_are_reported_than_asked_for_or_there_are() -> None:
    assert Sampler(Sampling()).choose(LOGITS).top == Sampler(Sampling(logprobs=0)).choose(LOGITS).top == ()
    assert len(Sampler(Sampling(logprobs=20)).choose(LOGITS).top) == len(LOGITS)


def test_logits_are_left_as_they_are() -> None:
    logits = LOGITS.clone()
    chosen(5, logits, temperature=0.5, top_p=0.5, frequency_penalty=1.0)
    assert torch.equal(logits, LOGITS)


def test_logits_that_are_no_numbers_are_refused() -> None:
    sampler = Sampler(Sampling(temperature=0.0, presence_penalty=0.8))
    with pytest.raises(BackboneError, match="not numbers"):
        sampler.choose(torch.tensor([1.0, float("nan")]))
    assert sampler.choose(LOGITS).token == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")), ("temperature", float("inf")),
        ("temperature", "1"), ("temperature", True), ("top_p", -0.1), ("top_p", 1.1), ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", True),
        ("seed", 1.5), ("logprobs", -1), ("logprobs", 21), ("stop", ("",)), ("stop", (3,)),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field):
        Sampler(Sampling(**{field: value}))
