"""The training objective: in-place and training edits agree, and gradients reach the eraser only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.model.decode import score
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Span
from kveraser.training.cases import TokenizedCase
from kveraser.training.checkpoint import TrainingError
from kveraser.training.distill import (
    case_losses,
    check_head,
    edited_log_probabilities,
    prepare,
    shared_prefills,
    token_kl,
)
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
# Another context of the same shape, with other queries, so that the packed queries differ in length.
OTHER = replace(
    CASE,
    id="other",
    prefix=tuple(random_tokens(P, 11)),
    span=tuple(random_tokens(M, 12)),
    suffix=tuple(random_tokens(S, 13)),
    queries=((tuple(random_tokens(4, 14)), tuple(random_tokens(3, 15))),),
    kinds=("influence",),
)
VARIANTS = [
    EraserSettings("keep"),
    EraserSettings("keep", 6),
    EraserSettings("closed"),
    EraserSettings("closed", 6, 0.5),
    EraserSettings("compact", slots=4),
    EraserSettings("compact", 6, slots=M + 1),
]


@pytest.fixture(scope="module")
def erasing() -> Backbone:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    return backbone


def armed(settings: EraserSettings) -> Backbone:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=settings)
    return backbone


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def test_the_teacher_is_the_exact_reference_on_each_query_alone(erasing: Backbone) -> None:
    prepared = prepare(erasing, [CASE], measure_unerased=True)
    exact, unerased = (
        erasing.prefill(tokens) for tokens in ([*CASE.prefix, *CASE.suffix], [*CASE.prefix, *CASE.span, *CASE.suffix])
    )
    alone = torch.cat([score(erasing, exact, prompt, answer) for prompt, answer in CASE.queries])
    with_span = torch.cat([score(erasing, unerased, prompt, answer) for prompt, answer in CASE.queries])
    assert difference(prepared.teacher, alone) < 1e-4 < 0.1 < difference(prepared.teacher, with_span)
    assert prepared.unerased is not None
    assert float(prepared.unerased.sum()) == pytest.approx(float(token_kl(alone, with_span).sum()), rel=1e-3)
    assert prepare(erasing, [CASE]).unerased is None


@pytest.mark.parametrize(
    ("family", "changes", "plain"),
    [
        ("granite", {"logits_scaling": 4.0}, {"logits_scaling": 1.0}),
        ("cohere", {"logit_scale": 0.25}, {"logit_scale": 1.0}),
        ("llama", {}, None),
    ],
)
def test_logits_are_scaled_as_in_the_model(family: str, changes: dict[str, Any], plain: dict[str, Any] | None) -> None:
    backbone = tiny_backbone(family, **changes)
    prepared = prepare(backbone, [CASE])
    cache = backbone.prefill([*CASE.prefix, *CASE.suffix])
    alone = torch.cat([score(backbone, cache, prompt, answer) for prompt, answer in CASE.queries])
    assert difference(prepared.teacher, alone) < 1e-4
    if plain is not None:
        for name, value in plain.items():
            setattr(backbone.model.config, name, value)
        assert difference(prepare(backbone, [CASE]).teacher, alone) > 0.05


def test_a_model_with_other_logits_is_refused_before_training() -> None:
    backbone = tiny_backbone()
    check_head(backbone)
    head = backbone.model.get_output_embeddings()
    backbone.model.get_output_embeddings = lambda: lambda hidden: 2 * head(hidden)
    with pytest.raises(TrainingError, match="tiny-llama computes its logits in a way that training does not support"):
        check_head(backbone)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_training_and_erasing_edit_the_cache_alike(settings: EraserSettings) -> None:
    backbone = armed(settings)
    with torch.no_grad():
        trained = edited_log_probabilities(backbone, prepare(backbone, [CASE, OTHER]), settings)
    unerased, erased = [], []
    for case in (CASE, OTHER):
        tokens = [*case.prefix, *case.span, *case.suffix]
        cache = backbone.prefill(tokens)
        unerased += [score(backbone, cache, prompt, answer) for prompt, answer in case.queries]
        with cache.edit():
            make_method("kveraser+repair" if settings.repair else "kveraser")(backbone, cache, tokens, Span(P, P + M))
        erased += [score(backbone, cache, prompt, answer) for prompt, answer in case.queries]
    assert difference(trained, torch.cat(erased)) < 1e-4 < 0.1 < difference(trained, torch.cat(unerased))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_gradients_reach_every_matrix_of_the_eraser_and_nothing_else(settings: EraserSettings) -> None:
    backbone = armed(settings)
    parameters = backbone.require_eraser().parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    case_losses(backbone, prepare(backbone, [CASE]), settings, "kl", 1.0).sum().backward()
    silent = [
        name for name, parameter in parameters.items() if parameter.grad is None or not bool(parameter.grad.any())
    ]
    # In the last layer, only the keys and values of the steering pass are used.
    last = f"layers.{backbone.layers - 1}."
    assert all(last in name and not ("k_proj" in name or "v_proj" in name) for name in silent)
    assert len(silent) < len(parameters) / backbone.layers
    others = [
        name for name, value in backbone.model.named_parameters() if name not in parameters and value.grad is not None
    ]
    assert others == []


def test_losses_match_their_definitions(erasing: Backbone) -> None:
    settings, prepared = EraserSettings("keep"), prepare(erasing, [CASE])
    with torch.no_grad():
        edited = edited_log_probabilities(erasing, prepared, settings)
        kl, ce, both = (
            float(case_losses(erasing, prepared, settings, objective, 1.0)) for objective in ("kl", "ce", "both")
        )
        influence_only = float(case_losses(erasing, prepared, settings, "kl", 0.0))
    answers = torch.tensor([token for _, answer in CASE.queries for token in answer])
    assert kl == pytest.approx(float(token_kl(prepared.teacher, edited).mean()), rel=1e-5) and kl > 0.05
    assert ce == pytest.approx(float(-edited[torch.arange(len(answers)), answers].mean()), rel=1e-5)
    assert both == pytest.approx(kl + ce, rel=1e-5)
    first = len(CASE.queries[0][1])
    assert influence_only == pytest.approx(float(token_kl(prepared.teacher, edited)[:first].mean()), rel=1e-5)
    assert influence_only != pytest.approx(kl, rel=1e-2)


def test_kl_to_the_reference_itself_is_zero(erasing: Backbone) -> None:
    # With the whole suffix recomputed and a span at the end of the reach, only the steering states could differ.
    prepared = prepare(erasing, [CASE])
    assert float(token_kl(prepared.teacher, prepared.teacher).abs().max()) == 0
    shifted = replace(prepared, teacher=prepared.teacher.roll(1, dims=1))
    assert float(token_kl(prepared.teacher, shifted.teacher).min()) > 0


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_a_batch_has_the_losses_and_gradients_of_its_cases_alone(settings: EraserSettings) -> None:
    backbone = armed(settings)
    parameters = backbone.require_eraser().parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)

    def run(batches: list[list[TokenizedCase]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        losses = []
        for batch in batches:
            losses.append(case_losses(backbone, prepare(backbone, batch), settings, "kl", 0.5))
            losses[-1].sum().backward()
        gradients = {name: value.grad for name, value in parameters.items() if value.grad is not None}
        for parameter in parameters.values():
            parameter.grad = None
        return torch.cat(losses).detach(), gradients

    together, summed = run([[OTHER, CASE]])
    alone, added = run([[OTHER], [CASE]])
    assert difference(together, alone) < 1e-5 < 0.01 < difference(alone, alone.flip(0))
    assert summed.keys() == added.keys()
    assert max(difference(summed[name], added[name]) for name in summed) < 1e-5
    assert max(float(value.abs().max()) for value in added.values()) > 1e-3


def test_a_batch_of_gpt2_takes_positions_for_every_row(backbones: dict[str, Backbone]) -> None:
    # Learned positions are looked up, so they must be given for every row.
    both, one = (prepare(backbones["gpt2"], cases, measure_unerased=True) for cases in ([CASE, OTHER], [OTHER]))
    assert difference(both.teacher[-len(one.teacher) :], one.teacher) < 1e-4
    assert both.unerased is not None and one.unerased is not None
    assert difference(both.unerased[-len(one.teacher) :], one.unerased) < 1e-4 < 0.01 < float(one.unerased.max())


def test_several_spans_of_one_context_share_its_prefill(erasing: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = (*CASE.prefix, *CASE.span, *CASE.suffix)
    moved = replace(CASE, prefix=tokens[: P + 5], span=tokens[P + 5 : P + 5 + M], suffix=tokens[P + 5 + M :])
    prefills = shared_prefills(erasing, [CASE, OTHER, moved])
    assert list(prefills) == [tokens]
    run: list[int] = []
    forward = erasing.model.base_model.forward
    monkeypatch.setattr(
        erasing.model.base_model,
        "forward",
        lambda *arguments, **named: run.append(named["input_ids"].numel()) or forward(*arguments, **named),
    )
    for case in (CASE, moved, OTHER):
        alone = prepare(erasing, [case], measure_unerased=True)
        longest = max(run)
        run.clear()
        shared = prepare(erasing, [case], measure_unerased=True, prefills=prefills)
        assert longest == len(tokens) and (max(run) < longest) == (case is not OTHER)
        run.clear()
        assert shared.unerased is not None and alone.unerased is not None
        assert difference(shared.teacher, alone.teacher) < 1e-5
        assert difference(shared.unerased, alone.unerased) < 1e-5
        assert difference(shared.suffix[1][0], alone.suffix[1][0]) < 1e-5


def test_common_first_tokens_of_queries_run_once(erasing: Backbone) -> None:
    (prompt, answer), second = CASE.queries
    alike = replace(CASE, queries=((prompt, answer), ((*prompt, 9), second[1])))
    run: list[int] = []
    forward = erasing.model.base_model.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            erasing.model.base_model,
            "forward",
            lambda *arguments, **named: run.append(named["input_ids"].numel()) or forward(*arguments, **named),
        )
        prepared = prepare(erasing, [alike])
    assert run[-1] == len(prompt) + len(answer) - 1 + 1 + len(second[1]) - 1
    exact = erasing.prefill([*CASE.prefix, *CASE.suffix])
    alone = torch.cat([score(erasing, exact, prompt, answer) for prompt, answer in alike.queries])
    assert difference(prepared.teacher, alone) < 1e-5


def test_a_case_with_zero_weights_has_zero_loss(erasing: Backbone) -> None:
    harmless = replace(OTHER, kinds=("no_harm",))
    losses = case_losses(erasing, prepare(erasing, [CASE, harmless]), EraserSettings(), "kl", 0.0)
    assert losses[0] > 0.01 and losses[1] == 0
