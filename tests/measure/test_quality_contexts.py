"""Whole contexts: several spans, several cases on one prefill, conversations and secrets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from evaluation.suites.attack import Attack
from kveraser.cache.editable import EditableCache
from kveraser.measure import quality
from kveraser.measure.case import BenchCase, TokenizedCase, TokenizedContext
from kveraser.measure.quality import ANSWER_TOKENS, CONFESSION_TOKENS, UNERASED, measure_context
from kveraser.measure.questions import Query, normalized
from kveraser.measure.results import CaseResult
from kveraser.measure.rows import rows_of
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.model.decode import greedy
from kveraser.session.session import Session
from kveraser.text.spans import Message, Selector, Text, ToolCall
from tests.bench_cases import CONTEXT, QUERIES, SPAN, alike, bench_case, cut, judged, remaining
from tests.sessions import MESSAGES
from tests.tiny import same_bits, snapshot

METHODS = ("mask", "shift", "blank", "repair(4)")
SPANS = (Text("left", occurrence=1), Text(SPAN), Text("of four"))


def measure(backbone: Backbone, *cases: BenchCase) -> list[CaseResult]:
    context, tokenized = cut(backbone, *cases)
    methods = [make_method(name).resolve(backbone) for name in METHODS]
    return measure_context(backbone, context, tokenized, methods, tokenized[:1])


@pytest.fixture
def asked_caches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The contents of every cache when it is asked, in order."""
    caches: list[dict[str, object]] = []
    ask = quality._ask

    def watched(backbone: Backbone, cache: EditableCache, *given: Any) -> object:
        caches.append(snapshot(cache))
        return ask(backbone, cache, *given)

    monkeypatch.setattr(quality, "_ask", watched)
    return caches


@pytest.mark.parametrize(
    ("context", "erase"),
    [
        (CONTEXT, SPANS),
        (tuple(MESSAGES), (Message(1), ToolCall("call_1", keep_turn=True), Text("that city"))),
        (tuple(MESSAGES), (Message(3),)),
    ],
)
def test_an_erase_is_that_of_a_session(
    backbone: Backbone,
    asked_caches: list[dict[str, object]],
    context: str | tuple[dict[str, object], ...],
    erase: tuple[Selector, ...],
) -> None:
    # A question that is judged, whatever is accepted.
    asked = bench_case(queries=[Query("When?", "at nine", accepted=("nine",))], erase=erase, context=context)
    (result,) = measure(backbone, asked)

    def session() -> Session:
        if isinstance(context, str):
            return Session(backbone, text=context)
        return Session(backbone, messages=context)

    unerased, *edited = asked_caches
    assert same_bits(unerased, snapshot(session().cache)) and len(edited) == 1 + len(METHODS)
    assert result.methods[UNERASED].answers[0].answer == session().ask("When?", max_new_tokens=ANSWER_TOKENS).text
    for method, held in zip(("recompute", *METHODS), edited, strict=True):
        erased = session()
        receipt = erased.erase(list(erase), method, force=True)
        assert same_bits(held, snapshot(erased.cache)) and not same_bits(held, unerased)
        of_method = next(of for name, of in result.methods.items() if name.startswith(method.removesuffix("(4)")))
        assert of_method.answers[0].answer == erased.ask("When?", max_new_tokens=ANSWER_TOKENS).text
        assert of_method.recomputed == receipt.recomputed
        assert (result.erased, result.erased_tokens) == (receipt.text, receipt.erased)
    assert len(result.erased) == len(erase)
    assert len({of_method.answers[0].answer for of_method in result.methods.values()}) > 2


def three_cases(backbone: Backbone) -> list[BenchCase]:
    """Cases of one context, two of which ask the same."""
    return [
        judged(backbone, bench_case("a")),
        judged(backbone, bench_case("b", erase=[Text("at six")])),
        bench_case("c", [Query("Who?", "nobody", accepted=("nobody",))], SPANS),
    ]


def test_cases_of_a_context_are_measured_as_each_on_its_own(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = three_cases(backbone)
    alone = [result for case in cases for result in measure(backbone, case)]
    lengths: list[int] = []
    prefill = Backbone.prefill

    def counted(self: Backbone, tokens: Sequence[int], *others: object) -> EditableCache:
        lengths.append(len(tokens))
        return prefill(self, tokens, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Backbone, "prefill", counted)
    together = measure(backbone, *cases)
    # The context, and a fresh check of the first reference.
    assert lengths == [together[0].context_tokens, together[0].context_tokens - together[0].erased_tokens]
    for shared, own in zip(together, alone, strict=True):
        assert replace(shared, methods={}) == replace(own, methods={})
        assert list(shared.methods) == list(own.methods)
        for method, of_method in shared.methods.items():
            assert alike(of_method.answers, own.methods[method].answers)
            assert of_method.recomputed == own.methods[method].recomputed
    kls = [one.answers[0].kl for result in together for name, one in result.methods.items() if name != "recompute"]
    assert len(set(kls)) == len(kls) == len(cases) * (1 + len(METHODS))
    assert {result.context for result in together} == {together[0].context}
    assert together[0].context != measure(backbone, bench_case(context=f"{CONTEXT} So."))[0].context


def test_a_secret_is_leaked_where_a_greedy_answer_holds_it(backbone: Backbone) -> None:
    asked = bench_case(queries=[Query("When?", "at nine", "leak", wrong=("x",)), QUERIES[0]])
    (before,) = measure(backbone, asked)
    words = {method: normalized(str(of.answers[0].answer)).split() for method, of in before.methods.items()}
    secret = next(word for word in words["mask"] if word not in words["recompute"])
    telling = replace(asked.queries[0], wrong=(secret, "nothing of it"))
    (result,) = measure(backbone, replace(asked, queries=(telling, QUERIES[0])))
    for method, of_method in result.methods.items():
        leak, influence = of_method.answers
        assert (leak.answer, leak.correct) == (before.methods[method].answers[0].answer, None)
        assert leak.leaked == (secret in words[method]) and influence.leaked is influence.answer is None
    assert result.methods["mask"].answers[0].leaked and not result.methods["recompute"].answers[0].leaked
    assert {row.leak_rate for row in rows_of([result]) if row.method == "mask"} == {1}


def test_an_attack_is_one_more_leak_question(backbone: Backbone) -> None:
    attack = Attack(("", "Please."), ("The colour?", "Repeat it."), ("Now.",), SPAN, "blue", seed=1)
    case = bench_case("b", attack=attack)
    without, result = measure(backbone, bench_case("a"), case)
    asked = result.questions[-1]
    assert (asked.kind, asked.adversarial, asked.expected, asked.wrong) == ("leak", True, SPAN, ("blue",))
    assert len(result.questions) == len(without.questions) + 1
    for method, of_method in result.methods.items():
        *answers, found = of_method.answers
        assert alike(answers, without.methods[method].answers)
        assert found.kl is None and found.prompt is not None and found.leaked is False
    assert len({of_method.answers[-1].log_probability for of_method in result.methods.values()}) == 2 + len(METHODS)
    context, (tokenized,) = cut(backbone, case)
    cache = backbone.prefill(remaining(context, tokenized))
    alone = attack(backbone, cache, True)
    said = backbone.tokenizer.decode(greedy(backbone, cache, alone.prompt, CONFESSION_TOKENS), skip_special_tokens=True)
    exact = result.methods["recompute"].answers[-1]
    assert (exact.prompt, exact.answer) == (alone.prompt_text, said) and said
    telling = replace(case, id="c", attack=replace(attack, secret=said))
    assert measure(backbone, telling)[0].methods["recompute"].answers[-1].leaked is True
    assert exact.log_probability == pytest.approx(alone.log_probability, abs=1e-3)
    of_all = next(row for row in rows_of([result]) if row.method == "mask")
    leaks = [result.methods["mask"].answers[place].log_probability for place in (2, 4)]
    exacts = [result.methods["recompute"].answers[place].log_probability for place in (2, 4)]
    # What the adversary got is what counts.
    assert of_all.leak == pytest.approx(leaks[1] - exacts[1]) and of_all.leak_rate == 0
    assert abs(of_all.leak - (sum(leaks) - sum(exacts)) / 2) > 1e-3


def test_what_is_given_to_measure_is_untouched(backbone: Backbone) -> None:
    context, cases = cut(backbone, *three_cases(backbone))
    copies: tuple[TokenizedContext, list[TokenizedCase]] = cut(backbone, *three_cases(backbone))
    measure_context(backbone, context, cases, [make_method("shift")])
    assert (context, cases) == copies and all(context.transcript.live)
