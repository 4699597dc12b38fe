"""Measuring one case: every number is that of a plain, slow reference, and the cache is put back after each method."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kveraser.backbone import Backbone
from kveraser.bench.quality import ANSWER_TOKENS, NOTICE_TOKENS, UNERASED, CaseResult, _greedy_like, measure_case, room
from kveraser.cache import EditableCache
from kveraser.decode import greedy, score
from kveraser.errors import ContextLengthError
from kveraser.methods import make_method
from kveraser.spans import Span
from kveraser.training.cases import TokenizedCase, normalized
from tests.tiny import POSITIONS, random_tokens, same_bits, snapshot, tiny_backbone

METHODS = (
    "mask", "shift", "zero_value", "blank", "erratum", "repair(4)", "repair(2, per_span=0.5)", "selective(0.3)",
    "recompute",
)  # fmt: skip
P, M, S = 24, 12, 30
TOKENS = random_tokens(P + M + S, 1)
SPAN = Span(P, P + M)


def case_of(backbone: Backbone) -> TokenizedCase:
    """A case whose accepted answers are the greedy ones of the exact reference: the reference is always right."""
    exact = backbone.prefill([*TOKENS[:P], *TOKENS[P + M :]])
    prompts = [tuple(random_tokens(size, 10 + size)) for size in (7, 4, 6)]
    right = [said(backbone, exact, prompt) for prompt in prompts[:2]]
    return TokenizedCase(
        id="test/0",
        task="test",
        prefix=tuple(TOKENS[:P]),
        span=tuple(TOKENS[P : P + M]),
        suffix=tuple(TOKENS[P + M :]),
        queries=tuple(
            (prompt, tuple(random_tokens(size, 20))) for prompt, size in zip(prompts, (5, 3, 9), strict=True)
        ),
        kinds=("influence", "no_harm", "leak"),
        accepted=((right[0],), (right[1],), ()),
        wrong=((), (), ()),
    )


def said(backbone: Backbone, cache: EditableCache, prompt: tuple[int, ...]) -> str:
    text: str = backbone.tokenizer.decode(greedy(backbone, cache, prompt, ANSWER_TOKENS), skip_special_tokens=True)
    return text


def edited_by(backbone: Backbone, method: str) -> EditableCache:
    """A fresh cache after a method, as the reference has it."""
    if method == "recompute":
        return backbone.prefill([*TOKENS[:P], *TOKENS[P + M :]])
    cache = backbone.prefill(TOKENS)
    if method != UNERASED:
        with cache.edit():
            make_method(method)(backbone, cache, TOKENS, SPAN)
    return cache


def measured(backbone: Backbone, case: TokenizedCase) -> dict[str, CaseResult]:
    chosen = [make_method(method).settled(backbone) for method in METHODS]
    results = {result.method: result for result in measure_case(backbone, case, chosen, 64, 12)}
    names = {str(method): name for method, name in zip(chosen, METHODS, strict=True)}
    return {names.get(name, name): result for name, result in results.items()}


@pytest.fixture(scope="module")
def results(backbone: Backbone) -> dict[str, CaseResult]:
    return measured(backbone, case_of(backbone))


def test_every_method_is_measured_as_by_a_plain_reference(backbone: Backbone, results: dict[str, CaseResult]) -> None:
    case = case_of(backbone)
    assert list(results) == [UNERASED, "recompute", *METHODS[:-1]]
    exact, unerased = edited_by(backbone, "recompute"), edited_by(backbone, UNERASED)
    for method, result in results.items():
        cache = edited_by(backbone, method)
        for place, (prompt, answer) in enumerate(case.queries):
            one = result.questions[place]
            reference, edited = (score(backbone, given, prompt, answer).double() for given in (exact, cache))
            kl = float((reference.exp() * (reference - edited)).sum())
            forced = torch.tensor(answer)[:, None]
            assert one.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
            before = score(backbone, unerased, prompt, answer).double()
            assert one.kl_unerased == pytest.approx(float((reference.exp() * (reference - before)).sum()), rel=1e-3)
            assert one.log_probability == pytest.approx(float(edited.gather(1, forced).mean()), abs=1e-4)
            assert one.log_probability_exact == pytest.approx(float(reference.gather(1, forced).mean()), abs=1e-4)
            assert (one.kind, one.tokens) == (case.kinds[place], len(answer))
            if not case.accepted[place]:
                assert one.answer is one.answer_exact is one.correct is one.correct_exact is None
                continue
            assert one.answer == said(backbone, cache, prompt) and one.answer_exact == said(backbone, exact, prompt)
            assert one.correct_exact is True
            expected = f" {normalized(case.accepted[place][0])} " in f" {normalized(one.answer)} "
            assert one.correct == expected


def test_methods_differ_and_cost_what_they_ran(results: dict[str, CaseResult]) -> None:
    influence = {method: result.questions[0].kl for method, result in results.items()}
    assert abs(influence.pop("recompute")) < 1e-5 < 0.01 < min(influence.values())
    assert len({round(kl, 4) for kl in influence.values()}) == len(influence)
    assert influence[UNERASED] == results[UNERASED].questions[0].kl_unerased
    ran = {method: result.recomputed for method, result in results.items()}
    assert (ran[UNERASED], ran["mask"], ran["blank"], ran["recompute"]) == (0, 0, M, S)
    assert (ran["repair(4)"], ran["repair(2, per_span=0.5)"]) == (4, 2 + M // 2)
    judged = [one for result in results.values() for one in result.questions if one.correct is not None]
    assert {one.correct for one in judged} == {True, False}


def test_a_wrong_answer_beside_the_right_one_is_no_match(backbone: Backbone) -> None:
    case = case_of(backbone)
    both = replace(case, wrong=(case.accepted[0], (), ()))
    for one, right in ((case, True), (both, False)):
        reference = measure_case(backbone, one, [], 64, 12)[1]
        assert [question.correct for question in reference.questions] == [right, True, None]


def test_every_method_is_undone_to_the_bit(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[bool] = []
    prefill = Backbone.prefill

    def watched(self: Backbone, *arguments: list[int]) -> EditableCache:
        cache = prefill(self, *arguments)
        before, revert = snapshot(cache), cache.revert

        def checked(journal: object) -> None:
            changed.append(not same_bits(snapshot(cache), before))
            revert(journal)  # type: ignore[arg-type]
            assert same_bits(snapshot(cache), before)

        monkeypatch.setattr(cache, "revert", checked)
        return cache

    case = case_of(backbone)
    monkeypatch.setattr(Backbone, "prefill", watched)
    measured(backbone, case)
    assert changed == [True] * len(METHODS)


def test_a_case_without_judged_questions_has_no_answers(backbone: Backbone) -> None:
    silent = replace(case_of(backbone), accepted=(), wrong=())
    questions = [one for result in measure_case(backbone, silent, [], 64, 12) for one in result.questions]
    assert {one.answer for one in questions} == {None} and max(one.kl for one in questions) > 0.01


@pytest.mark.parametrize("change", ["none", "first", "middle", "last", "shorter", "longer", "empty"])
@pytest.mark.parametrize("ended", [True, False])
def test_confirmed_answers_are_the_greedy_ones(backbone: Backbone, change: str, ended: bool) -> None:
    case, cache = case_of(backbone), edited_by(backbone, "mask")
    spoken = {place: greedy(backbone, cache, case.queries[place][0], ANSWER_TOKENS) for place in (0, 1)}
    # One answer comes to its end, one to the limit.
    assert 3 < len(spoken[0]) < len(spoken[1]) == ANSWER_TOKENS
    place = 0 if ended else 1
    answer = list(spoken[place])
    if change in ("first", "middle", "last"):
        wrong = {"first": 0, "middle": len(answer) // 2, "last": -1}[change]
        answer[wrong] = next(token for token in random_tokens(99, 5) if token not in answer)
    elif change == "longer":
        answer = [*answer, *spoken[1]][:ANSWER_TOKENS]
    elif change != "none":
        answer = answer[: 3 if change == "shorter" else 0]
    assert _greedy_like(backbone, cache, case, spoken | {place: answer}) == spoken


def test_a_confirmed_answer_is_not_decoded_again(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    case, cache = case_of(backbone), edited_by(backbone, "mask")
    spoken = {place: greedy(backbone, cache, case.queries[place][0], ANSWER_TOKENS) for place in (0, 1)}
    passes: list[int] = []
    logits = Backbone.logits

    def counted(self: Backbone, cache: EditableCache, tokens: list[int], *given: object, **named: object) -> object:
        passes.append(len(tokens))
        return logits(self, cache, tokens, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Backbone, "logits", counted)
    assert _greedy_like(backbone, cache, case, spoken) == spoken and len(passes) == 1
    assert _greedy_like(backbone, cache, case, spoken | {0: spoken[0][:-1]}) == spoken and len(passes) > 2


def test_a_case_that_leaves_no_room_is_refused_before_it_is_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(tiny_backbone())
    assert room(case) == P + M + S + NOTICE_TOKENS + 7 + ANSWER_TOKENS < POSITIONS
    short = tiny_backbone(max_position_embeddings=room(case) - 1)
    monkeypatch.setattr(Backbone, "prefill", None)
    with pytest.raises(ContextLengthError, match=str(room(case))):
        measure_case(short, case, [], 64, 12)


def test_a_result_is_read_back_as_it_was(results: dict[str, CaseResult]) -> None:
    result = results["shift"]
    assert CaseResult.from_json(result.to_json()) == result
