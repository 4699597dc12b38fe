"""Training data: corpora, span-neighbor cases, case files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kveraser.errors import InputError, SpanError
from kveraser.measure.questions import CONTINUED_TOKENS, Query, normalized
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Characters
from kveraser.training.cases import Case, CaseSizes, read_cases, tokenize
from kveraser.training.corpus import read_passages
from kveraser.training.span_neighbor import FOLLOWS, PRECEDES, span_neighbor_cases
from kveraser.training.split import split_passages
from tests.training.case_files import write_cases

PASSAGES = [" ".join(f"{name}{index}" for index in range(90)) for name in ("elm", "fir", "larch", "oak", "pine")]
"""All in the train split."""
HELD_OUT = [" ".join(f"{name}{index}" for index in range(90)) for name in ("ash", "birch", "cedar")]
"""All held out."""
SMALL = CaseSizes(context=(60, 90), span=(4, 40))


def test_the_same_seed_gives_the_same_cases_and_another_one_others() -> None:
    first = list(span_neighbor_cases(PASSAGES, 6, seed=1, sizes=SMALL))
    assert first == list(span_neighbor_cases(PASSAGES, 6, seed=1, sizes=SMALL))
    assert first[:3] == list(span_neighbor_cases(PASSAGES, 3, seed=1, sizes=SMALL))
    assert first != list(span_neighbor_cases(PASSAGES, 6, seed=2, sizes=SMALL))


def test_the_targets_are_the_words_next_to_the_span() -> None:
    for case in span_neighbor_cases(PASSAGES, 20, seed=3, sizes=SMALL):
        start, end = case.span
        before, span, after = case.context[:start], case.context[start:end].strip(), case.context[end:].strip()
        follows, precedes, inside, continuation = case.queries
        assert after.startswith(follows.answer) and before.endswith(precedes.answer)
        assert follows.question is not None and before.split()[-1] in follows.question
        assert precedes.question is not None and after.split()[0] in precedes.question
        assert inside.answer in after and continuation.question is None
        assert 4 <= len(span.split()) <= 40
        exact = before + " " + after
        assert " ".join([*before.split()[-2:], *after.split()[:2]]) in exact


def test_span_lengths_spread_over_their_whole_range() -> None:
    sizes = [len(case.context[slice(*case.span)].split()) for case in span_neighbor_cases(PASSAGES, 200, 5, SMALL)]
    # Log-uniform: as many below the geometric mean of the bounds as above it.
    assert 70 < sum(size < (4 * 40) ** 0.5 for size in sizes) < 130


def test_the_splits_share_no_passage_and_no_phrasing() -> None:
    both = [*PASSAGES, *HELD_OUT]
    assert (split_passages(both, "train"), split_passages(both, "heldout")) == (PASSAGES, HELD_OUT)
    train = list(span_neighbor_cases(both, 20, 1, SMALL))
    heldout = list(span_neighbor_cases(both, 20, 1, SMALL, split="heldout"))
    assert train == list(span_neighbor_cases(PASSAGES, 20, 1, SMALL))
    assert heldout == list(span_neighbor_cases(HELD_OUT, 20, 1, SMALL, split="heldout"))
    assert not {word for case in train for word in case.context.split()} & {
        word for case in heldout for word in case.context.split()
    }
    for phrasings in (FOLLOWS, PRECEDES):
        assert not set(phrasings["train"]) & set(phrasings["heldout"])


def test_a_corpus_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="1 passages"):
        next(iter(span_neighbor_cases(PASSAGES[:1], 1, 0, SMALL)))
    with pytest.raises(InputError, match="180 words"):
        next(iter(span_neighbor_cases(PASSAGES[:2], 1, 0, CaseSizes(span=(8, 500)))))


def test_cases_are_tokenized_as_in_a_session(backbone: Backbone, plain_backbone: Backbone) -> None:
    queries = (Query("Who?", "on the ship", "no_harm"), Query("Why?", "no wind", "leak", ("wind",), ("sea", "tide")))
    case = Case("c", "t", "The ship sails on and on until noon.", (6, 13), queries)
    for model in (backbone, plain_backbone):
        session = Session(model, text=case.context)
        span = session.find(Characters(*case.span))[0][0]
        cut = tokenize(model.tokenizer, case)
        assert [*cut.prefix, *cut.span, *cut.suffix] == session.transcript.tokens
        assert (len(cut.prefix), len(cut.prefix) + len(cut.span)) == (span.start, span.end)
        assert cut.tokens == len(session.transcript.tokens)
        assert model.tokenizer.decode(cut.queries[0][1]) == "on the ship"
        assert "Who?" in model.tokenizer.decode(cut.queries[0][0])
        assert cut.kinds == ("no_harm", "leak")


def test_a_continuation_has_its_first_tokens_as_prompt(backbone: Backbone) -> None:
    case = Case("c", "t", "The ship sails on.", (4, 8), (Query(None, " and the crew sings"),))
    prompt, answer = tokenize(backbone.tokenizer, case).queries[0]
    assert len(prompt) == CONTINUED_TOKENS
    assert backbone.tokenizer.decode([*prompt, *answer]) == " and the crew sings"


def test_an_answer_without_tokens_or_a_span_outside_is_refused(backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no tokens"):
        tokenize(backbone.tokenizer, Case("c", "t", "The ship sails on.", (4, 8), (Query("Who?", ""),)))
    with pytest.raises(SpanError, match="outside"):
        tokenize(backbone.tokenizer, Case("c", "t", "The ship sails on.", (4, 80), (Query("Who?", "x"),)))


def test_case_files_round_trip(tmp_path: Path) -> None:
    cases = list(span_neighbor_cases(PASSAGES, 5, seed=1, sizes=SMALL))
    path = tmp_path / "cases.jsonl"
    scored = Case("c", "t", "The ship sails on.", (4, 8), (Query("Who?", "she", "leak", ("she", "a"), ("he",)),))
    write_cases(path, [*cases, scored])
    assert list(read_cases(path)) == [*cases, scored]


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("  The depot, in an Old-Town: A.") == "depot in oldtown"
    assert normalized("Anna's theatre") == "annas theatre"


@pytest.mark.parametrize(
    "line",
    [
        "{not json",
        "[]",
        '{"id": "x"}',
        json.dumps({"id": "x", "task": "t", "context": "ab", "span": [1, 9], "queries": []}),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "cases.jsonl"
    write_cases(path, span_neighbor_cases(PASSAGES, 2, seed=1, sizes=SMALL))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 3"):
        list(read_cases(path))
    with pytest.raises(InputError, match="no case file"):
        list(read_cases(tmp_path / "missing.jsonl"))


def test_passages_come_from_jsonl_and_from_text(tmp_path: Path) -> None:
    long = "A passage that is long enough to be asked about, certainly."
    jsonl, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    jsonl.write_text("".join(json.dumps({"text": value}) + "\n" for value in (long, "short", long.upper())))
    text.write_text(f"{long}\nand on\n\nshort\n\n{long.upper()}\n")
    assert read_passages(str(jsonl)) == [long, long.upper()]
    assert read_passages(str(text)) == [f"{long} and on", long.upper()]
    assert read_passages(str(jsonl), limit=1) == [long]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x"}\n{oops', "line 2"),
        ("a.jsonl", b'{"title": "x"}', "'text'"),
        ("a.jsonl", b'{"text": 3}', "int"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"short", "no passage"),
    ],
)
def test_a_corpus_that_is_not_text_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_passages(str(path))


def test_a_hub_dataset_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"kveraser\[train\]"):
        read_passages("owner/name")
