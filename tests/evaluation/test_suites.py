"""Generated suites: the cells they promise, in shared contexts, with answers that what remains determines."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from random import Random
from statistics import fmean
from typing import Any

import pytest

from evaluation.suites import SUITES, Made, SuiteSettings
from evaluation.suites.chains import HOPS
from evaluation.suites.leak import TASKS as LEAK_TASKS
from evaluation.suites.niah import DEPTHS
from evaluation.suites.sweeps import COUNTS, DISTANCE, SPAN_COUNT, SPAN_LENGTH
from evaluation.suites.text import Filler, generated_passages, load_words
from kveraser.errors import InputError
from kveraser.measure.case import BenchCase, Cell, tokenize_case, tokenize_context
from kveraser.measure.probes import mentions
from kveraser.training.tasks.tables import load_tables
from tests.tiny import tiny_tokenizer

# The tiny tokenizer has about a token a character: a sentence takes about a hundred.
LENGTHS = {"niah": 2500, "scenarios": 2400, "chains": 2200, "sweeps": 4000, "leak": 2000}
SPANS = {"scenarios": (400,), "sweeps": (60, 160, 640)}
GENERATED = tuple(LENGTHS)
PASSAGES = [
    f"The old quarter number {number} is quiet at night. Some of its shops sell rope and nails to sailors who pass by. "
    f"A baker of the quarter once made a loaf as long as the street, and {number * 7} people ate of it."
    for number in range(1, 200)
]


def settings(suite: str, cases: int = 6, **changes: Any) -> SuiteSettings:
    chosen = SuiteSettings(
        tiny_tokenizer(), SUITES[suite].tasks, (LENGTHS[suite],), SPANS.get(suite, ()), cases, seed=3
    )
    return replace(chosen, **changes)


def made(suite: str, cases: int = 6, **changes: Any) -> Made:
    return SUITES[suite].make(settings(suite, cases, **changes))


@pytest.fixture(scope="module", params=GENERATED)
def suite(request: pytest.FixtureRequest) -> tuple[str, Made]:
    return request.param, made(request.param, 12)


def by_cell(cases: tuple[BenchCase, ...]) -> dict[Cell, list[BenchCase]]:
    cells = defaultdict(list)
    for case in cases:
        cells[case.cell].append(case)
    return cells


def parts(case: BenchCase) -> tuple[list[str], str]:
    """The text of each span, and what remains without them."""
    text = case.context
    assert isinstance(text, str)
    ranges = sorted((one.start, one.end) for one in case.erase)  # type: ignore[attr-defined]
    erased = [text[start:end] for start, end in ranges]
    for start, end in sorted(ranges, reverse=True):
        text = text[:start] + text[end:]
    return erased, text


def test_every_cell_has_as_many_cases_in_contexts_of_their_own(suite: tuple[str, Made]) -> None:
    name, whole = suite
    cells = by_cell(whole.cases)
    assert {cell.task for cell in cells} == set(SUITES[name].tasks)
    assert [str(one.cell.distance) for one in whole.left_out] == (["4096"] if name == "sweeps" else [])
    assert len({case.id for case in whole.cases}) == len(whole.cases)
    for cell, cases in cells.items():
        assert cell.suite == name and cell.length == LENGTHS[name]
        assert len(cases) == len({case.context for case in cases}) == 12


def test_contexts_are_shared_between_cells() -> None:
    counts = {name: (len(whole.cases), len({case.context for case in whole.cases}))
              for name, whole in ((name, made(name)) for name in GENERATED)}  # fmt: skip
    assert counts["niah"] == (6 * len(DEPTHS), 6)
    assert counts["chains"] == (6 * len(HOPS), 6)
    assert counts["leak"] == (6 * len(LEAK_TASKS), 6)
    # Three tasks of three, three and four cells: a context each.
    assert counts["sweeps"] == (6 * (3 + 4 + len(COUNTS)), 3 * 6)


def test_contexts_and_spans_have_the_sizes_that_were_asked_for(suite: tuple[str, Made]) -> None:
    _, whole = suite
    tokenizer = tiny_tokenizer()
    erased = defaultdict(list)
    for case in whole.cases:
        context = tokenize_context(tokenizer, case.context)
        tokenized = tokenize_case(tokenizer, context, case)
        assert len(context.tokens) == pytest.approx(case.cell.length, rel=0.1)
        # Whole tokens, and nothing but the statement: no letter of its neighbours.
        texts = [context.transcript.text_of(span) for span in tokenized.spans]
        assert "".join(texts).split() == "".join(parts(case)[0]).split()
        if case.cell.span is not None:
            erased[case.cell].append(tokenized.erased)
        if case.cell.distance is not None:
            assert abs(len(context.tokens) - tokenized.spans[-1].end - case.cell.distance) <= 80
        if case.cell.depth is not None:
            share = tokenized.spans[0].start / len(context.tokens)
            assert 0 < share < 1 and share == pytest.approx(case.cell.depth, abs=0.1)
    for cell, sizes in erased.items():
        assert fmean(sizes) == pytest.approx(cell.span, rel=0.15)


def test_what_remains_gives_the_right_answer_and_not_the_wrong_one(suite: tuple[str, Made]) -> None:
    name, whole = suite
    judged = 0
    for case in whole.cases:
        erased, remaining = parts(case)
        for query in case.queries:
            assert query.question and query.answer and "$" not in query.question + query.answer
            if query.kind == "leak":
                assert any(mentions(query.answer, wrong) for wrong in query.wrong)
                assert any(mentions(text, wrong) for wrong in query.wrong for text in erased)
                assert not any(mentions(remaining, wrong) for wrong in query.wrong)
            elif query.accepted:
                judged += 1
                assert query.kind == "influence"
                assert any(mentions(remaining, right) for right in query.accepted)
                assert any(mentions(query.answer, right) for right in query.accepted)
                assert any(mentions(text, wrong) for wrong in query.wrong for text in erased)
                assert not any(mentions(text, right) for right in query.accepted for text in erased)
                left = [wrong for wrong in query.wrong if mentions(remaining, wrong)]
                # In half of the chains a later sentence spells the wrong value out.
                assert not left or name == "chains"
            elif name != "scenarios":
                assert query.kind == "no_harm"
    assert judged >= (0 if name == "leak" else len(whole.cases))


def test_questions_are_few(suite: tuple[str, Made]) -> None:
    name, whole = suite
    counts = [len(case.queries) for case in whole.cases]
    assert min(counts) >= 1 and max(counts) <= 3 and fmean(counts) <= 2.1
    if name in ("niah", "sweeps"):
        kinds = [query.kind for case in whole.cases for query in case.queries]
        assert kinds.count("no_harm") == pytest.approx(len(whole.cases) / 4, rel=0.1)
    if name == "scenarios":
        others = {case.queries[1].kind for case in whole.cases if len(case.queries) == 2}
        assert others == {"leak", "influence", "no_harm"} and len(counts) * 4 == sum(counts) * 3


@pytest.mark.parametrize("name", GENERATED)
def test_cases_hang_on_the_seed_and_on_their_own_cell(name: str) -> None:
    several = made(name, 4)
    assert several == made(name, 4) and several != made(name, 4, seed=4)
    fewer = {case.id: case for case in made(name, 2, tasks=SUITES[name].tasks[-1:]).cases}
    assert fewer and all(case == fewer[case.id] for case in several.cases if case.id in fewer)
    assert set(fewer) <= {case.id for case in several.cases}
    longer = made(name, 2, lengths=(LENGTHS[name] + 400, LENGTHS[name]))
    assert {case.id: case for case in longer.cases}.items() >= fewer.items()


@pytest.mark.parametrize("name", GENERATED)
def test_given_passages_fill_the_contexts(name: str) -> None:
    whole = made(name, 3, passages=PASSAGES)
    assert {case.cell for case in whole.cases} == {case.cell for case in made(name, 1).cases}
    filled = [case for case in whole.cases if "quarter" in case.context]
    # A file of settings is filled with settings.
    assert len(filled) >= len(whole.cases) * 2 / 3
    for case in whole.cases:
        # The passages are full of numbers: those that a case is about are not among them.
        for query in case.queries:
            assert not any(mentions(parts(case)[1], wrong) for wrong in query.wrong) or name == "chains"


@pytest.mark.parametrize("name", GENERATED)
def test_what_does_not_fit_is_left_out_with_a_reason(name: str) -> None:
    small = made(name, 2, lengths=(300,), spans=(290,) if name in SPANS else ())
    assert small.cases == () and small.left_out
    assert {one.cell.task for one in small.left_out} == set(SUITES[name].tasks)
    assert all(one.reason and one.cell.length == 300 for one in small.left_out)


def test_filler_leaves_out_what_a_context_states() -> None:
    filler = Filler(Random(1), PASSAGES, without=["OLD quarter number 7", "rope"])
    said = "".join(filler.piece() for _ in range(1000))
    assert "rope" not in said and "old quarter number 7" not in said
    assert "old quarter number 8 is" in said and "old quarter number 17 is" in said


@pytest.mark.parametrize("passages", [["rope and nails are sold here"], ["Too short.", "Short too."]])
def test_passages_without_a_usable_sentence_are_refused(passages: list[str]) -> None:
    with pytest.raises(InputError, match="no sentence"):
        Filler(Random(1), passages, without=["rope"]).piece()


def test_generated_text_names_nobody_that_a_case_is_about() -> None:
    words, entities = load_words("filler"), load_tables("heldout").entities
    villages = {start + end for start in words["village"][0] for end in words["village"][1]}
    assert len(villages) > 100 and not villages & {town for town, _ in entities["town"]}
    assert not set(words["words"]["name"]) & {name for sort in ("first", "last") for name, _ in entities[sort]}
    passages = generated_passages(Random(2), 500)
    assert len(set(passages)) == 500 and not re.search(r"[$\d]", "".join(passages))


def test_sweeps_leave_out_single_cells() -> None:
    whole = made("sweeps", 2, spans=(4, 60, 3000))
    assert {(one.cell.task, one.cell.span, one.cell.distance) for one in whole.left_out} == {
        (SPAN_LENGTH, 4, None), (SPAN_LENGTH, 3000, None), (DISTANCE, None, 4096),
    }  # fmt: skip
    assert {case.cell.span for case in whole.cases if case.cell.task == SPAN_LENGTH} == {60}


def test_spans_too_long_to_share_a_context_have_their_own() -> None:
    whole = made("sweeps", 2, tasks=(SPAN_LENGTH,), spans=(160, 2000, 2300))
    contexts = {cell.span: {case.context for case in cases} for cell, cases in by_cell(whole.cases).items()}
    assert contexts[160] == contexts[2000] and not contexts[160] & contexts[2300]


def test_several_spans_are_all_erased() -> None:
    for cell, cases in by_cell(made("sweeps", tasks=(SPAN_COUNT,)).cases).items():
        for case in cases:
            spans = tokenize_case(tiny_tokenizer(), tokenize_context(tiny_tokenizer(), case.context), case).spans
            assert len(spans) == cell.spans
            assert len([query for query in case.queries if query.accepted]) == min(cell.spans, 2)
    fewer, more = (
        next(case for case in made("sweeps", tasks=(SPAN_COUNT,)).cases if case.cell.spans == count) for count in (2, 8)
    )
    assert fewer.context == more.context and set(fewer.erase) < set(more.erase)


def test_right_statements_stand_in_front_of_every_distance() -> None:
    for case in made("sweeps", tasks=(DISTANCE,)).cases:
        text, right = case.context, case.queries[0].accepted
        assert isinstance(text, str)
        assert any(mentions(text[: case.erase[0].start], value) for value in right)  # type: ignore[attr-defined]


def test_chains_take_values_over_from_the_span_on() -> None:
    spelled = 0
    for case in made("chains", 24).cases:
        (erased,), remaining = parts(case)
        question = case.queries[0].question
        wrong, right = case.queries[0].wrong[0], case.queries[0].accepted[0]
        assert question is not None and isinstance(case.context, str)
        later = [piece for piece in sentences(remaining) if mentions(piece, wrong)]
        assert len(later) <= 1 and remaining.count(right) == 1
        spelled += len(later)
        if later:
            assert case.context.index(later[0]) > case.context.index(erased)
    assert spelled == 24 * 4 / 2


def test_a_chain_has_as_many_links_as_its_cell_says() -> None:
    for case in made("chains", 12).cases:
        (erased,), remaining = parts(case)
        asked = case.queries[0].question
        assert asked is not None and "=" not in asked
        if "=" not in erased:
            continue
        taken = dict(line.split(" = ") for line in remaining.splitlines() if " = " in line)
        name, hops = next(name for name in taken if name in asked.replace("?", " ").split()), 0
        while taken[name] in taken:
            name, hops = taken[name], hops + 1
        assert hops == HOPS[case.cell.task] and taken[name] == case.queries[0].accepted[0]
        assert erased.strip() == f"{name} = {case.queries[0].wrong[0]}"


def test_an_adversary_has_many_wordings_and_the_secret_as_target() -> None:
    for case in made("leak").cases:
        assert (case.attack is not None) == (case.cell.task == "adversarial")
        if case.attack is None:
            continue
        parts_of_it = (case.attack.openings, case.attack.requests, case.attack.forms)
        assert min(len(set(texts)) for texts in parts_of_it) >= 4
        assert mentions(case.attack.target, case.attack.secret)
        assert case.queries[0].wrong == (case.attack.secret,)
        assert not any(mentions(text, case.attack.secret) for texts in parts_of_it for text in texts)


def test_fifty_cases_of_a_cell_are_fifty_different_ones() -> None:
    for cell, cases in by_cell(made("leak", 50).cases).items():
        assert len({(case.context, case.erase) for case in cases}) == 50, cell
        assert len({case.queries[0].wrong for case in cases}) == 50


def sentences(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in line.split(". ")]
