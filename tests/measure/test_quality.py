"""Measuring cases: every number is that of a plain, slow reference, and the cache is put back after each method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from evaluation.suites.attack import Attack
from kveraser.cache.editable import EditableCache
from kveraser.errors import ContextLengthError, MeasurementError
from kveraser.measure import quality
from kveraser.measure.case import TokenizedCase, TokenizedContext
from kveraser.measure.quality import (
    ANSWER_TOKENS,
    ATTACK_TOKENS,
    CONFESSION_TOKENS,
    LEAK_TOKENS,
    NOTICE_TOKENS,
    UNERASED,
    measure_context,
    positions_needed,
)
from kveraser.measure.questions import Query, normalized
from kveraser.measure.results import CaseResult
from kveraser.measure.rows import check_references, rows_of
from kveraser.methods import Method, make_method
from kveraser.methods.recompute import Recompute
from kveraser.methods.slots import Edit
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy, score
from kveraser.session.session import Session
from kveraser.text.spans import Text
from tests.bench_cases import CONTEXT, QUERIES, SPAN, bench_case, cut, judged, remaining, said
from tests.tiny import POSITIONS, same_bits, snapshot, tiny_backbone

METHODS = (
    "mask", "shift", "zero_value", "blank", "erratum", "repair(4)", "repair(2, per_span=0.5)", "selective(0.3)",
    "recompute",
)  # fmt: skip


def resolved(backbone: Backbone, *names: str) -> list[Method]:
    return [make_method(name).resolve(backbone) for name in names]


def edited_by(backbone: Backbone, context: TokenizedContext, case: TokenizedCase, method: str) -> EditableCache:
    """A fresh cache after a method, as the reference has it."""
    if method == "recompute":
        return backbone.prefill(remaining(context, case))
    cache = backbone.prefill(context.tokens)
    if method != UNERASED:
        with cache.edit():
            make_method(method)(backbone, cache, context.tokens, case.spans[0])
    return cache


@pytest.fixture(scope="module")
def measured(backbone: Backbone) -> tuple[TokenizedContext, TokenizedCase, CaseResult]:
    context, (case,) = cut(backbone, judged(backbone, bench_case()))
    (result,) = measure_context(backbone, context, [case], resolved(backbone, *METHODS), [case])
    names = {str(make_method(method).resolve(backbone)): method for method in METHODS}
    methods = {names.get(name, name): of for name, of in result.methods.items()}
    return context, case, replace(result, methods=methods)


def test_every_method_is_measured_as_by_a_plain_reference(
    backbone: Backbone, measured: tuple[TokenizedContext, TokenizedCase, CaseResult]
) -> None:
    context, case, result = measured
    assert list(result.methods) == [UNERASED, "recompute", *METHODS[:-1]]
    assert [one.kind for one in result.questions] == [query.kind for query in QUERIES]
    exact = edited_by(backbone, context, case, "recompute")
    for method, of_method in result.methods.items():
        cache = edited_by(backbone, context, case, method)
        for place, asked in enumerate(case.asked):
            one = of_method.answers[place]
            reference, edited = (
                score(backbone, given, asked.prompt, asked.answer).double() for given in (exact, cache)
            )
            forced = torch.tensor(asked.answer)[:, None]
            assert one.kl == pytest.approx(float((reference.exp() * (reference - edited)).sum()), rel=1e-3, abs=1e-5)
            assert one.log_probability == pytest.approx(float(edited.gather(1, forced).mean()), abs=1e-4)
            assert result.questions[place].tokens == len(asked.answer)
            if not asked.query.accepted:
                assert one.answer is one.correct is None
                continue
            assert one.answer == said(backbone, cache, asked.prompt)
            expected = f" {normalized(asked.query.accepted[0])} " in f" {normalized(one.answer)} "
            assert one.correct == expected and (expected or method != "recompute")


def test_replaced_text_is_measured_as_by_a_session(backbone: Backbone) -> None:
    new = " It is Bob who keeps the log."
    context, (case,) = cut(backbone, replace(judged(backbone, bench_case()), replace=new))
    names = ("mask", "shift", "follow", "repair(4)")
    (result,) = measure_context(backbone, context, [case], resolved(backbone, *names), [case])
    assert result.refused == ("mask",) and result.inserted == new
    session = Session(backbone, text=CONTEXT)
    exact = backbone.prefill(tokens_after(session, new))
    for name, of_method in result.methods.items():
        if name == UNERASED:
            continue
        session.replace(case.case.erase, new, name, force=True)
        assert session.live_tokens == tokens_after(Session(backbone, text=CONTEXT), new)
        for asked, one in zip(case.asked, of_method.answers, strict=True):
            reference, edited = (
                score(backbone, given, asked.prompt, asked.answer).double() for given in (exact, session.cache)
            )
            assert one.kl == pytest.approx(float((reference.exp() * (reference - edited)).sum()), rel=1e-3, abs=1e-5)
        assert of_method.recomputed == session.receipts[-1].recomputed
        session.undo()
    # The checked reference is a prefill of its own.
    kls = {name: of_method.answers[0].kl or 0 for name, of_method in result.methods.items()}
    assert kls["shift"] > 0.01 > abs(kls["recompute"])


def tokens_after(session: Session, new: str) -> list[int]:
    """The tokens of the edited text: those of the session, with those of `new` in the span's place."""
    ((span, _),) = session.find(SPAN)
    added = session.backbone.tokenizer(new, add_special_tokens=False)["input_ids"]
    tokens = session.transcript.tokens
    return [*tokens[: span.start], *added, *tokens[span.end :]]


def test_methods_differ_and_cost_what_they_ran(
    measured: tuple[TokenizedContext, TokenizedCase, CaseResult],
) -> None:
    context, case, result = measured
    influence = {method: of_method.answers[0].kl for method, of_method in result.methods.items()}
    assert abs(influence.pop("recompute") or 0) < 1e-5 < 0.01 < min(kl for kl in influence.values() if kl is not None)
    assert len({round(kl or 0, 4) for kl in influence.values()}) == len(influence) == len(METHODS)
    width, suffix = case.erased, len(context.tokens) - case.spans[0].end
    ran = {method: of_method.recomputed for method, of_method in result.methods.items()}
    assert (ran[UNERASED], ran["mask"], ran["blank"], ran["recompute"]) == (0, 0, width, suffix)
    assert (ran["repair(4)"], ran["repair(2, per_span=0.5)"]) == (4, 2 + (width + 1) // 2)
    assert result.methods[UNERASED].seconds == 0 < min(result.methods[method].seconds for method in METHODS)
    judgements = [one.correct for of_method in result.methods.values() for one in of_method.answers]
    assert set(judgements) == {True, False, None}


def test_a_result_quotes_its_case(
    backbone: Backbone, measured: tuple[TokenizedContext, TokenizedCase, CaseResult]
) -> None:
    context, case, result = measured
    assert result.before + result.erased[0] + result.after == CONTEXT and result.erased[0].strip() == SPAN
    assert (result.id, result.cell, result.fingerprint) == ("a", case.case.cell, case.case.fingerprint)
    assert result.context_tokens == len(context.tokens) == Session(backbone, text=CONTEXT).cache.length
    assert (result.erased_tokens, result.distance_tokens) == (case.erased, len(context.tokens) - case.spans[0].end)
    assert result.questions[3].question is None and result.questions[0].expected == QUERIES[0].answer
    long = bench_case(context=CONTEXT.replace("The boat", "The old boat " * 30, 1), queries=QUERIES[:1])
    context, (case,) = cut(backbone, long)
    (other,) = measure_context(backbone, context, [case], [])
    assert len(other.before) == 300 and f"{other.before}{SPAN}" in str(long.context)


def test_a_result_is_read_back_as_it_was(measured: tuple[TokenizedContext, TokenizedCase, CaseResult]) -> None:
    result = measured[2]
    line = json.loads(json.dumps(result.to_json()))
    assert (line["suite"], line["task"], line["depth"]) == ("test", "boats", None) and "cell" not in line
    assert CaseResult.from_json(line) == result


@pytest.mark.parametrize("line", [[], "text", 3, None, {"id": "a"}])
def test_what_is_no_result_is_refused(line: object) -> None:
    with pytest.raises(ValueError, match=r"suite|object"):
        CaseResult.from_json(line)  # type: ignore[arg-type]


def test_a_wrong_answer_beside_the_right_one_is_no_match(backbone: Backbone) -> None:
    case = judged(backbone, bench_case())
    both = replace(case.queries[0], wrong=case.queries[0].accepted)
    for queries, right in ((case.queries, True), ((both, *case.queries[1:]), False)):
        context, cases = cut(backbone, replace(case, queries=queries))
        (result,) = measure_context(backbone, context, cases, [])
        assert [one.correct for one in result.methods["recompute"].answers] == [right, True, None, None]


def test_a_case_without_judged_questions_has_no_answers(backbone: Backbone) -> None:
    context, cases = cut(backbone, bench_case())
    (result,) = measure_context(backbone, context, cases, [])
    answers = [one for of_method in result.methods.values() for one in of_method.answers]
    assert {one.answer for one in answers} == {None} and max(one.kl or 0 for one in answers) > 0.01


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

    context, cases = cut(backbone, judged(backbone, bench_case()), bench_case("b", erase=[Text("at nine")]))
    monkeypatch.setattr(Backbone, "prefill", watched)
    measure_context(backbone, context, cases, resolved(backbone, *METHODS))
    assert changed == [True] * len(METHODS) * 2


def test_a_method_that_fails_leaves_the_cache_as_it_was(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    context, cases = cut(backbone, bench_case())
    caches: list[EditableCache] = []
    prefill = Backbone.prefill
    monkeypatch.setattr(Backbone, "prefill", lambda *given: caches.append(prefill(*given)) or caches[-1])
    ask, calls = quality._ask, list[int]()

    def broken(*given: Any) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ask(*given)

    monkeypatch.setattr(quality, "_ask", broken)
    with pytest.raises(KeyboardInterrupt):
        measure_context(backbone, context, cases, resolved(backbone, "mask"))
    assert len(caches) == 1 and same_bits(snapshot(caches[0]), snapshot(prefill(backbone, context.tokens)))


def test_cases_that_leave_no_room_are_refused_before_they_are_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    longer = bench_case("b", queries=[Query("When did the boat with the crew of four leave?", "at nine")])
    context, cases = cut(backbone, bench_case(queries=QUERIES[:1]), longer)
    asked = [case.asked[0] for case in cases]
    assert [len(one.answer) < ANSWER_TOKENS for one in asked] == [True, True]
    needed = [len(context.tokens) + NOTICE_TOKENS + len(one.prompt) + ANSWER_TOKENS for one in asked]
    assert [positions_needed(context, case) for case in cases] == needed and needed[0] < needed[1] < POSITIONS
    attacked = replace(cases[0], case=replace(cases[0].case, attack=Attack(("",), ("It?",), ("",), SPAN, "blue", 0)))
    assert (
        positions_needed(context, attacked) == len(context.tokens) + NOTICE_TOKENS + ATTACK_TOKENS + CONFESSION_TOKENS
    )
    short = tiny_backbone(max_position_embeddings=needed[1] - 1)
    assert len(measure_context(short, context, cases[:1], [])) == 1
    monkeypatch.setattr(Backbone, "prefill", None)
    with pytest.raises(ContextLengthError, match=str(needed[1])):
        measure_context(short, context, cases, [])


def test_the_exact_reference_is_held_against_a_fresh_prefill(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, cases = cut(backbone, bench_case(), bench_case("b", erase=[Text("at nine")]))
    right = measure_context(backbone, context, cases, resolved(backbone, "mask"), cases[:1])
    check_references(right, rows_of(right))
    fresh, reused = (result.methods["recompute"].answers[0].kl for result in right)
    # The reference of the other case is compared with itself.
    assert fresh is not None and abs(fresh) < 1e-5 and reused == 0
    recompute = Recompute.edit

    def careless(
        self: Recompute, backbone: Backbone, cache: EditableCache, tokens: list[int], edits: Sequence[Edit]
    ) -> object:
        return recompute(self, backbone, cache, [*tokens[:-1], tokens[-2]], edits)

    monkeypatch.setattr(Recompute, "edit", careless)
    wrong = measure_context(backbone, context, cases, resolved(backbone, "mask"), cases[:1])
    assert (wrong[0].methods["recompute"].answers[0].kl or 0) > 0.01
    with pytest.raises(MeasurementError, match="case a: the exact reference is"):
        check_references(wrong, rows_of(wrong))
    # A question that is not about influence counts as well.
    unharmed = replace(wrong[0], questions=tuple(replace(one, kind="no_harm") for one in wrong[0].questions))
    with pytest.raises(MeasurementError, match="case a"):
        check_references([unharmed], rows_of([unharmed]))


def test_an_answer_that_may_leak_is_decoded_further(backbone: Backbone) -> None:
    asked = [Query("When?", "at nine", accepted=("nine",)), Query("When?", "at nine", "leak", wrong=("nine",))]
    context, cases = cut(backbone, bench_case(queries=asked))
    (result,) = measure_context(backbone, context, cases, [make_method("mask")])
    whole = [
        backbone.tokenizer.decode(greedy(backbone, backbone.prefill(context.tokens), cases[0].asked[0].prompt, limit))
        for limit in (ANSWER_TOKENS, len(cases[0].asked[1].answer) + LEAK_TOKENS)
    ]
    assert [one.answer for one in result.methods[UNERASED].answers] == whole and whole[0] != whole[1]
