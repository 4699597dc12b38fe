"""Stage-2 tasks: the text outside the span determines the answers, and the splits are disjoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from itertools import product
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.measure.questions import normalized
from kveraser.model.backbone import Backbone
from kveraser.training.cases import Case, CaseSizes, tokenize
from kveraser.training.split import Split, split_passages
from kveraser.training.tasks import TASKS, task_cases
from kveraser.training.tasks.passages import Passages
from kveraser.training.tasks.tables import ENTITIES, SCENES, Scene, load_tables

SPLITS: tuple[Split, Split] = ("train", "heldout")
MONTHS = ("January", "March", "June", "October")
NAMES = [
    f"{first}{middle}{last}" for first, middle, last in product(("Ar", "Bel", "Cor", "Dun"), "aeiou", ("mar", "nis"))
]
PASSAGES = [
    f"{name} Voss{number} (born {number % 27 + 1} {MONTHS[number % 4]} {1850 + number}) was a painter of quiet rooms. "
    f"Most pictures of {name} show a table, a jug and a window that is half open. The later years were spent by the "
    f"sea, where a friend kept a small inn. Visitors still ask for room {number}."
    for number, name in enumerate(NAMES * 4)
]
SMALL = CaseSizes(context=(130, 200), span=(8, 120))


def cases(tasks: tuple[str, ...] = tuple(TASKS), count: int = 90, split: Split = "train", seed: int = 3) -> list[Case]:
    return list(task_cases(tasks, PASSAGES, count, seed, SMALL, split))


def parts(case: Case) -> tuple[str, str]:
    """The span, and what remains without it."""
    start, end = case.span
    return case.context[start:end], case.context[:start] + case.context[end:]


def test_a_case_depends_on_seed_and_index_only() -> None:
    several = cases(count=12)
    assert several == cases(count=12)
    assert several[:5] == cases(count=5)
    assert several != cases(count=12, seed=4)
    assert [case.task for case in several] == [*TASKS, *TASKS]
    assert len({case.id for case in several}) == 12


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_asks_all_kinds_of_questions(task: str, split: Split) -> None:
    for case in cases((task,), 30, split):
        kinds = [query.kind for query in case.queries]
        assert 3 <= len(kinds) <= 5
        assert kinds.count("influence") >= 2 and "leak" in kinds and "no_harm" in kinds
        for query in case.queries:
            assert query.question and 1 <= len(query.answer.split()) <= 24
            assert "$" not in query.question + query.answer


@pytest.mark.parametrize("split", SPLITS)
def test_what_remains_gives_the_true_value_and_not_the_wrong_one(split: Split) -> None:
    for case in cases(split=split):
        span, remaining = map(normalized, parts(case))
        contradicted = case.queries[0]
        assert any(normalized(text) in remaining for text in contradicted.accepted)
        assert any(normalized(text) in normalized(contradicted.answer) for text in contradicted.accepted)
        assert any(normalized(text) in span for text in contradicted.wrong)
        for query in case.queries:
            assert not any(normalized(text) in remaining for text in query.wrong)
            if query.kind == "leak":
                assert query.wrong and any(normalized(text) in normalized(query.answer) for text in query.wrong)
            else:
                assert not any(normalized(text) in normalized(query.answer) for text in query.wrong)
            if query.kind == "no_harm":
                assert all(normalized(text) in remaining for text in query.accepted)


def test_later_text_builds_on_the_span() -> None:
    scenes = [scene for task in SCENES for scene in load_tables("train").scenes[task]]
    built = [shape(text) for scene in scenes for text in (*scene.refer, *scene.derive)]
    derived = [shape(text) for scene in scenes for text in scene.derive]
    found = cases(SCENES, 100)
    suffixes = [case.context[case.span[1] :] for case in found]
    counts = [sum(bool(pattern.search(suffix)) for pattern in built) for suffix in suffixes]
    assert min(counts) >= 1 and max(counts) == 4
    # In half of the cases later text only refers to the wrong value.
    assert 30 <= sum(any(pattern.search(suffix) for pattern in derived) for suffix in suffixes) <= 70


def shape(template: str) -> re.Pattern[str]:
    """What a template looks like in a text."""
    return re.compile(re.sub(r"\\\$\w+", ".+?", re.escape(template)), re.IGNORECASE)


@pytest.mark.parametrize("size", [40, 200, 800])
def test_the_span_has_the_length_that_was_asked_for(size: int) -> None:
    settings = CaseSizes(context=(150, 220), span=(size, size))
    for case in task_cases(tuple(TASKS), PASSAGES, 30, 1, settings):
        assert len(parts(case)[0].split()) == pytest.approx(size, rel=0.1)


def test_short_spans_are_as_long_as_their_statement() -> None:
    sizes = [len(parts(case)[0].split()) for case in task_cases(tuple(TASKS), PASSAGES, 60, 1, CaseSizes(span=(4, 24)))]
    assert min(sizes) <= 9 and max(sizes) <= 26


def test_the_context_has_the_asked_length_and_the_span_stands_in_its_midst() -> None:
    for case in cases():
        before, after = (len(text.split()) for text in (case.context[: case.span[0]], case.context[case.span[1] :]))
        assert 130 <= before + after <= 200
        assert 0.15 <= before / (before + after) <= 0.7


def test_without_the_span_the_text_reads_on() -> None:
    for case in cases(("observation", "preference", "injection"), 30):
        span, remaining = parts(case)
        assert span.startswith(("Tool: ", "User: ")) and span.endswith("\n")
        lines = remaining.split("\n")
        assert all(re.match(r"(User|Assistant|Tool|System): ", line) for line in lines)


def strings(tables: Any) -> Iterator[str]:
    if isinstance(tables, str):
        yield tables
    elif isinstance(tables, dict):
        for name, value in tables.items():
            # What a value is, and the slot that holds it, are no phrasings.
            if name not in ("kind", "accepted"):
                yield from strings(value)
    else:
        for value in tables:
            yield from strings(value)


def test_the_splits_share_no_template_and_no_entity() -> None:
    raw = [
        json.loads((resources.files("kveraser.training.tasks") / f"{split}.json").read_text(encoding="utf-8"))
        for split in SPLITS
    ]
    for sort in ENTITIES:
        train, heldout = (
            {name for entry in tables.pop(sort).split(", ") for name in entry.split("/")} for tables in raw
        )
        assert len(train) >= 30 and len(heldout) >= 30 and not train & heldout, sort
    train, heldout = (set(strings(tables)) for tables in raw)
    assert len(train) > 300 and len(heldout) > 300
    assert not train & heldout


@pytest.mark.parametrize("split", SPLITS)
def test_every_task_has_many_phrasings(split: Split) -> None:
    tables = load_tables(split)
    for sort, least in {"first": 40, "last": 40, "town": 30, "org": 30, "product": 30}.items():
        assert len({name for name, _ in tables.entities[sort]}) >= least
    for task in SCENES:
        for scene in tables.scenes[task]:
            assert_rich(scene)
    for relation, bad in tables.facts.bad.items():
        assert min(len(set(bad)), len(set(tables.facts.questions[relation]))) >= 4
        later = {*tables.facts.refer, *tables.facts.derive[relation], *tables.facts.derive_more}
        assert len(later) >= 6


def assert_rich(scene: Scene) -> None:
    assert len(set(scene.bad)) >= 4 and len(set(scene.questions)) >= 4
    assert len({*scene.refer, *scene.derive}) >= 6
    # The value itself is stated by the span and the truth only.
    assert not any("$value" in text for text in (*scene.refer, *scene.derive))
    assert all("$value" in text for text in (*scene.true, *scene.bad, *scene.answers))


def test_cases_use_the_passages_of_their_split_only() -> None:
    for split, other in (SPLITS, SPLITS[::-1]):
        used = " ".join(case.context for case in cases(count=60, split=split))
        assert any(passage[:30] in used for passage in split_passages(PASSAGES, split))
        assert not any(passage[:30] in used for passage in split_passages(PASSAGES, other))


def test_facts_are_read_from_passages() -> None:
    texts = [
        "Mara Quill (3 May 1880 \u2013 9 June 1931) was a baker. Mara Quill was born in Ulm, Germany, and left it.",
        "Ida Renn( born 4 July 1950) is a judge.",
        "The Long Pier is a 1952 drama film directed by Otto K. Lund. The score is lost.",
        "Night Ferry is a 1960 film, written by Jan van der Meer and directed by Eva Roth, about a storm.",
        "Nothing can be learned here. It was born in silence.",
    ]
    found = Passages(texts).facts
    assert {(fact.name, fact.value) for fact in found["born"]} == {
        ("Mara Quill", "3 May 1880"),
        ("Ida Renn", "4 July 1950"),
    }
    assert {fact.value for fact in found["director"]} == {"Otto K. Lund", "Eva Roth"}
    assert found["director"][0].text == "The Long Pier is a 1952 drama film directed by Otto K. Lund."
    # One value can't be swapped with another.
    assert set(found) == {"born", "director"}


def test_cases_become_tokens(backbone: Backbone, plain_backbone: Backbone) -> None:
    for model in (backbone, plain_backbone):
        for case in cases(count=6):
            cut = tokenize(model.tokenizer, case)
            assert parts(case)[0].strip() in model.tokenizer.decode(cut.span)
            assert len(cut.queries) == len(cut.kinds) == len(case.queries)


@pytest.mark.parametrize(
    ("tasks", "passages", "sizes", "said"),
    [
        (("needle", "nedle"), PASSAGES, SMALL, "no task .nedle."),
        ((), PASSAGES, SMALL, "no task is named"),
        (("needle",), PASSAGES[:6], SMALL, "passages in the train split"),
        (("needle",), PASSAGES[:30], CaseSizes(span=(8, 9000)), "takes up to 9360"),
        (("needle",), PASSAGES, CaseSizes(context=(40, 60)), "context is 40 to 60"),
        (("needle",), PASSAGES, CaseSizes(span=(90, 30)), "span is 90 to 30"),
        (("facts",), [text.replace("born", "famous") for text in PASSAGES], SMALL, "facts of one kind"),
    ],
)
def test_invalid_tasks_sizes_and_corpora_are_refused(
    tasks: tuple[str, ...], passages: list[str], sizes: CaseSizes, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        list(task_cases(tasks, passages, 2, 0, sizes))
