"""The objective: it compares what erasing in place gives with the exact reference; gradients reach the eraser alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kveraser.backbone import Backbone
from kveraser.decode import score
from kveraser.eraser import EraserSettings
from kveraser.methods.kveraser import KVEraser, KVEraserRepair
from kveraser.spans import Span
from kveraser.train.cases import TokenizedCase
from kveraser.train.distill import case_loss, edited_log_probabilities, prepare, token_kl
from tests.tiny import attach_random_eraser, random_tokens, tiny_backbone

P, M, S = 20, 9, 25
CASE = TokenizedCase(
    id="case",
    task="test",
    prefix=tuple(random_tokens(P, 1)),
    span=tuple(random_tokens(M, 2)),
    suffix=tuple(random_tokens(S, 3)),
    queries=(
        (tuple(random_tokens(6, 4)), tuple(random_tokens(4, 5))),
        (tuple(random_tokens(3, 6)), tuple(random_tokens(7, 7))),
    ),
    kinds=("influence", "no_harm"),
)
VARIANTS = [EraserSettings("keep"), EraserSettings("keep", 6), EraserSettings("closed"), EraserSettings("closed", 6)]


@pytest.fixture(scope="module")
def erasing() -> Backbone:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    return backbone


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def test_the_teacher_is_the_exact_reference_on_each_query_alone(erasing: Backbone) -> None:
    prepared = prepare(erasing, CASE, measure_unerased=True)
    exact, unerased = (
        erasing.prefill(tokens) for tokens in ([*CASE.prefix, *CASE.suffix], [*CASE.prefix, *CASE.span, *CASE.suffix])
    )
    alone = torch.cat([score(erasing, exact, prompt, answer) for prompt, answer in CASE.queries])
    with_span = torch.cat([score(erasing, unerased, prompt, answer) for prompt, answer in CASE.queries])
    assert difference(prepared.teacher, alone) < 1e-4 < 0.1 < difference(prepared.teacher, with_span)
    assert prepared.unerased == pytest.approx(float(token_kl(alone, with_span).sum()), rel=1e-3)
    assert prepare(erasing, CASE).unerased is None


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_trained_cache_is_the_one_that_erasing_makes(erasing: Backbone, settings: EraserSettings) -> None:
    with torch.no_grad():
        trained = edited_log_probabilities(erasing, prepare(erasing, CASE), settings)
    tokens = [*CASE.prefix, *CASE.span, *CASE.suffix]
    cache = erasing.prefill(tokens)
    unerased = torch.cat([score(erasing, cache, prompt, answer) for prompt, answer in CASE.queries])
    method = KVEraserRepair(settings.repair, settings.layout) if settings.repair else KVEraser(settings.layout)
    with cache.edit():
        method(erasing, cache, tokens, Span(P, P + M))
    erased = torch.cat([score(erasing, cache, prompt, answer) for prompt, answer in CASE.queries])
    assert difference(trained, erased) < 1e-4 < 0.1 < difference(trained, unerased)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_reach_every_matrix_of_the_eraser_and_nothing_else(settings: EraserSettings) -> None:
    backbone = tiny_backbone()
    parameters = attach_random_eraser(backbone).parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    case_loss(backbone, prepare(backbone, CASE), settings, "kl", 1.0).backward()
    silent = [
        name for name, parameter in parameters.items() if parameter.grad is None or not bool(parameter.grad.any())
    ]
    # The last layer's steering states end at its keys and values: what comes after them serves no one.
    last = f"layers.{backbone.layers - 1}."
    assert all(last in name and not ("k_proj" in name or "v_proj" in name) for name in silent)
    assert len(silent) < len(parameters) / backbone.layers
    others = [
        name for name, value in backbone.model.named_parameters() if name not in parameters and value.grad is not None
    ]
    assert others == []


def test_losses_are_what_they_are_called(erasing: Backbone) -> None:
    settings, prepared = EraserSettings("keep"), prepare(erasing, CASE)
    with torch.no_grad():
        edited = edited_log_probabilities(erasing, prepared, settings)
        kl, ce, both = (
            float(case_loss(erasing, prepared, settings, objective, 1.0)) for objective in ("kl", "ce", "both")
        )
        influence_only = float(case_loss(erasing, prepared, settings, "kl", 0.0))
    answers = torch.tensor([token for _, answer in CASE.queries for token in answer])
    assert kl == pytest.approx(float(token_kl(prepared.teacher, edited).mean()), rel=1e-5) and kl > 0.05
    assert ce == pytest.approx(float(-edited[torch.arange(len(answers)), answers].mean()), rel=1e-5)
    assert both == pytest.approx(kl + ce, rel=1e-5)
    first = len(CASE.queries[0][1])
    assert influence_only == pytest.approx(float(token_kl(prepared.teacher, edited)[:first].mean()), rel=1e-5)
    assert influence_only != pytest.approx(kl, rel=1e-2)


def test_a_cache_that_equals_the_reference_loses_nothing(erasing: Backbone) -> None:
    # With the whole suffix recomputed and a span at the end of the reach, only the steering states could differ.
    prepared = prepare(erasing, CASE)
    assert float(token_kl(prepared.teacher, prepared.teacher).abs().max()) == 0
    shifted = replace(prepared, teacher=prepared.teacher.roll(1, dims=1))
    assert float(token_kl(prepared.teacher, shifted.teacher).min()) > 0
