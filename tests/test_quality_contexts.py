"""Whole contexts: several spans, several cases on one prefill, conversations, secrets, and drafts of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from kveraser.backbone import Backbone
from kveraser.bench import quality as module
from kveraser.bench.case import Asked, Attack, BenchCase, TokenizedCase, TokenizedContext
from kveraser.bench.quality import ANSWER_TOKENS, UNERASED, measure_context
from kveraser.bench.results import CaseResult
from kveraser.bench.rows import rows_of
from kveraser.bench.together import Rows
from kveraser.cache import EditableCache
from kveraser.decode import greedy
from kveraser.methods import make_method
from kveraser.session import Session
from kveraser.spans import Message, Selector, Text, ToolCall
from kveraser.training.cases import Query, normalized
from tests.bench_cases import CONTEXT, QUERIES, SPAN, alike, bench_case, cut, judged, remaining
from tests.sessions import MESSAGES
from tests.tiny import random_tokens, same_bits, snapshot

METHODS = ("mask", "shift", "blank", "repair(4)")
SPANS = (Text("left", occurrence=1), Text(SPAN), Text("of four"))


def measure(backbone: Backbone, *cases: BenchCase) -> list[CaseResult]:
    context, tokenized = cut(backbone, *cases)
    return measure_context(backbone, context, tokenized, [make_method(name).settled(backbone) for name in METHODS])


@pytest.fixture
def asked_caches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """All that the caches hold that are asked, in order."""
    caches: list[dict[str, object]] = []
    add = Rows.add

    def watched(self: Rows, cache: EditableCache) -> None:
        caches.append(snapshot(cache))
        add(self, cache)

    monkeypatch.setattr(Rows, "add", watched)
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

    # The last one is the fresh prefill that the reference is held against.
    unerased, *edited, _ = asked_caches
    assert same_bits(unerased, snapshot(session().cache)) and len(edited) == 1 + len(METHODS)
    assert result.methods[UNERASED].answers[0].answer == session().ask("When?", max_new_tokens=ANSWER_TOKENS).text
    for method, held in zip(("recompute", *METHODS), edited, strict=True):
        erased = session()
        receipt = erased.erase(list(erase), method)
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
    alone = module.attack(backbone, cache, True, attack)
    said = backbone.tokenizer.decode(
        greedy(backbone, cache, alone.prompt, module.LEAK_TOKENS), skip_special_tokens=True
    )
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


# Drafts


Drafted = tuple[EditableCache, list[Asked], list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def drafted(backbone: Backbone) -> Drafted:
    """A cache, two judged questions and their greedy answers: one comes to its end, the other to the limit."""
    words = ("When?", "Why?", "Where?", "Who?", "Which?", "How?", "And?", "What then?", "Who slept?", "Since when?")
    context, (case,) = cut(backbone, bench_case(queries=[Query(word, "at nine", accepted=("nine",)) for word in words]))
    cache = backbone.prefill(remaining(context, case))
    answers = [tuple(greedy(backbone, cache, one.prompt, ANSWER_TOKENS)) for one in case.asked]
    ended = next(place for place, answer in enumerate(answers) if 3 < len(answer) < ANSWER_TOKENS - 1)
    cut_off = next(place for place, answer in enumerate(answers) if len(answer) == ANSWER_TOKENS)
    return cache, [case.asked[ended], case.asked[cut_off]], [answers[ended], answers[cut_off]]


def changed(answer: Sequence[int], how: str) -> tuple[int, ...]:
    other = next(token for token in random_tokens(99, 5) if token not in answer)
    place = {"first": 0, "middle": len(answer) // 2, "last": len(answer) - 1}.get(how)
    if place is not None:
        return (*answer[:place], other, *answer[place + 1 :])
    return {
        "same": tuple(answer),
        "shorter": tuple(answer[:3]),
        "longer": (*answer, *random_tokens(ANSWER_TOKENS, 6))[:ANSWER_TOKENS],
        "empty": (),
        "one more": (*answer, other)[:ANSWER_TOKENS],
    }[how]


CHANGES = ("same", "first", "middle", "last", "shorter", "longer", "one more", "empty")


def answered(
    backbone: Backbone, cache: EditableCache, asked: Sequence[Asked], *others: Sequence[tuple[int, ...] | None]
) -> list[tuple[int, ...] | None]:
    """The greedy answers, where other caches said `others`."""
    rows = Rows(backbone)
    rows.add(cache)
    replies = [[module._Reply(torch.empty(0), spoken) for spoken in other] for other in others]
    return [reply.spoken for reply in module._answer(rows, asked, replies)[0]]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ended", [True, False])
def test_answers_are_the_greedy_ones_whatever_the_drafts(
    backbone: Backbone, drafted: Drafted, change: str, ended: bool
) -> None:
    cache, asked, spoken = drafted
    place = 0 if ended else 1
    for other in ("first", "middle", "shorter", "empty", change):
        drafts = [[*spoken], [*spoken]]
        drafts[0][place], drafts[1][place] = changed(spoken[place], change), changed(spoken[place], other)
        assert answered(backbone, cache, asked, *drafts) == answered(backbone, cache, asked, drafts[0]) == spoken
        assert answered(backbone, cache, asked[place:][:1], drafts[1][place:][:1]) == spoken[place:][:1]
    assert answered(backbone, cache, asked) == answered(backbone, cache, asked, [None, None]) == spoken


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows every pass of questions had."""
    sizes: list[int] = []
    run_pass = Rows._pass

    def counted(self: Rows, cache: EditableCache, tokens: Sequence[object], *given: object) -> object:
        sizes.append(len(tokens))
        return run_pass(self, cache, tokens, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Rows, "_pass", counted)
    return sizes


def test_a_draft_that_holds_is_not_decoded_and_another_only_from_where_it_breaks(
    backbone: Backbone, drafted: Drafted, passes: list[int]
) -> None:
    cache, asked, spoken = drafted
    counts = []
    for how in ("same", "last", "first"):
        passes.clear()
        assert answered(backbone, cache, asked, [spoken[0], changed(spoken[1], how)]) == spoken
        counts.append(len(passes))
    # The greedy token in the place of a wrong last one is known from the draft's own pass.
    assert counts == [1, 1, ANSWER_TOKENS]
    passes.clear()
    assert answered(backbone, cache, asked, [spoken[0], changed(spoken[1], "first")], spoken) == spoken
    assert len(passes) == 1


def test_methods_are_asked_together_with_what_the_references_said(
    backbone: Backbone, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    context, (case,) = cut(backbone, judged(backbone, bench_case()))
    # All of the suffix is computed again, so they answer as the reference does.
    methods = [make_method(f"repair({window})").settled(backbone) for window in (500, 501, 502)]
    measured = []
    for slots in (module.ROW_SLOTS, 1):
        passes.clear()
        monkeypatch.setattr(module, "ROW_SLOTS", slots)
        (result,) = measure_context(backbone, context, [case], methods)
        answers = [[one.answer for one in result.methods[str(method)].answers] for method in ("recompute", *methods)]
        assert all(one == answers[0] for one in answers)
        measured.append((result, list(passes)))
    (together, sizes), (apart, one_by_one) = measured
    # Unerased, the reference, and its check: a row each; then all methods in a pass, or a pass for each.
    assert sizes[-2:] == [3, 1] and one_by_one[-4:] == [1] * 4 and sizes[:-2] == one_by_one[:-4]
    for method, of_method in together.methods.items():
        assert alike(of_method.answers, apart.methods[method].answers)


def test_what_is_given_to_measure_is_untouched(backbone: Backbone) -> None:
    context, cases = cut(backbone, *three_cases(backbone))
    copies: tuple[TokenizedContext, list[TokenizedCase]] = cut(backbone, *three_cases(backbone))
    measure_context(backbone, context, cases, [make_method("shift")])
    assert (context, cases) == copies and all(context.transcript.live)
