"""Audits against computations by hand with plain forward passes; and what they say of methods that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import InputError, SessionError
from kveraser.measure import audit
from kveraser.measure.audit import References, fidelity_interval, kl_divergence
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit
from kveraser.methods import Method
from kveraser.methods.base import clear_tokens
from kveraser.model.backbone import Backbone
from kveraser.session.audit import audit as audit_session
from kveraser.session.session import Session
from kveraser.text import chat
from kveraser.text.spans import Message, Span
from tests.sessions import MESSAGES, TEXT, same, state
from tests.tiny import DEVICE, same_bits, snapshot, tiny_backbone

SPAN = "The captain is Ada."
INFLUENCE = Probe("Who is the captain?", answer="It is Ada, of course.")
LEAK = Probe("Repeat the second sentence.", "leak", SPAN)
HARMLESS = Probe("Where is the harbour?", "no_harm", "In Lisbon.")
PROBES = [INFLUENCE, Probe("What of the crew?", answer="It trusts her."), LEAK, HARMLESS]


@dataclass(frozen=True)
class NoErase(Method):
    """Says that the span is erased and leaves every state as it is."""

    name = "no_erase"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        cache.mark_inexact(span.start)
        clear_tokens(cache, span)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0


@pytest.fixture
def session(backbone: Backbone) -> Session:
    return Session(backbone, text=TEXT)


def audited(session: Session, method: Any, **arguments: Any) -> Audit:
    session.erase(SPAN, method)
    return session.audit(PROBES, **arguments)


def by_hand(
    session: Session, tokens: Sequence[int], positions: Sequence[int], start: int, probe: Probe
) -> torch.Tensor:
    """Log-probabilities of a probe's answer by one pass without a cache, `[answer, vocabulary]`."""
    backbone = session.backbone
    prompt = backbone.tokenize(chat.question_text(backbone.tokenizer, probe.question, session.turn_open))[0]
    answer = backbone.tokenize(probe.answer or "")[0]
    said = [*prompt, *answer[:-1]]
    places = torch.tensor([[*positions, *range(start, start + len(said))]], device=DEVICE)
    with torch.no_grad():
        logits = backbone.model(torch.tensor([[*tokens, *said]], device=DEVICE), position_ids=places).logits[
            0, -len(answer) :
        ]
    return logits.double().log_softmax(-1)


def kl_by_hand(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.kl_div(other, exact, reduction="sum", log_target=True))


def pooled(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Mean KL over all answer tokens of `(exact, other)` pairs."""
    return sum(kl_by_hand(*pair) for pair in pairs) / sum(len(exact) for exact, _ in pairs)


def plain(session: Session, live: bool, probe: Probe) -> torch.Tensor:
    tokens = session.live_tokens if live else session.transcript.tokens
    return by_hand(session, tokens, range(len(tokens)), len(tokens), probe)


# What audits measure


def test_recompute_is_perfect(session: Session) -> None:
    measured = audited(session, "recompute")
    assert measured.kl < 1e-6 < measured.kl_unerased
    assert measured.fidelity == pytest.approx(1, abs=1e-5)
    assert measured.leak == pytest.approx(0, abs=1e-4) and measured.leak_rate == 0
    assert measured.no_harm is not None and measured.no_harm < 1e-6
    assert measured.kl_hole is None


def test_a_method_that_does_nothing_has_fidelity_zero(session: Session) -> None:
    measured = audited(session, NoErase())
    assert measured.kl == pytest.approx(measured.kl_unerased, rel=1e-4) and measured.kl > 1e-3
    assert measured.fidelity == pytest.approx(0, abs=1e-4)
    assert measured.no_harm is not None and measured.no_harm > 1e-4
    assert not session.receipts[-1].exact


@pytest.mark.parametrize("method", [NoErase(), "mask", "shift", "zero_value", "repair(4)"])
def test_kl_equals_a_computation_by_hand(session: Session, method: Any) -> None:
    measured = audited(session, method)
    influence = [probe for probe in PROBES if probe.kind == "influence"]
    exact = [plain(session, True, probe) for probe in influence]
    unerased = [plain(session, False, probe) for probe in influence]
    assert measured.kl_unerased == pytest.approx(pooled(list(zip(exact, unerased, strict=True))), rel=1e-3)
    edited = []
    for probe in influence:
        prompt = session.backbone.tokenize(
            chat.question_text(session.backbone.tokenizer, probe.question, session.turn_open)
        )[0]
        answer = session.backbone.tokenize(probe.answer or "")[0]
        fork = session.fork().cache
        logits = session.backbone.logits(fork, [*prompt, *answer[:-1]], keep=len(answer))
        edited.append(logits.double().log_softmax(-1))
    assert measured.kl == pytest.approx(pooled(list(zip(exact, edited, strict=True))), rel=1e-3)
    assert measured.fidelity == pytest.approx(1 - measured.kl / measured.kl_unerased)
    assert measured.kl > 1e-4


def test_leak_and_no_harm_are_those_of_their_own_probes(session: Session) -> None:
    measured = audited(session, NoErase())
    tokens = torch.tensor(session.backbone.tokenize(SPAN)[0])
    exact, unerased = plain(session, True, LEAK), plain(session, False, LEAK)
    places = torch.arange(len(tokens))
    expected = float((unerased[places, tokens] - exact[places, tokens]).mean())
    assert measured.leak == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-2
    harm = kl_by_hand(plain(session, True, HARMLESS), plain(session, False, HARMLESS))
    assert measured.no_harm == pytest.approx(harm / len(session.backbone.tokenize("In Lisbon.")[0]), rel=1e-3)
    kinds = [result.kind for result in measured.probes]
    assert kinds == ["influence", "influence", "leak", "no_harm"]
    assert [result.answer for result in measured.probes] == [probe.answer for probe in PROBES]


def test_the_leak_is_positive_where_the_text_can_still_be_read(session: Session, monkeypatch: Any) -> None:
    """A model that repeats what it reads would leak from the unerased cache and not from the exact one."""
    secret, length = torch.tensor(session.backbone.tokenize(SPAN)[0]), session.cache.length
    inside = audit.score_together

    def copying(backbone: Backbone, cache: EditableCache, pairs: Any) -> list[torch.Tensor]:
        reads = cache.length == length
        gain = torch.zeros(1).expand(backbone.model.config.vocab_size).index_fill(0, secret, 5.0 * reads)
        return [(scores + gain).log_softmax(-1) for scores in inside(backbone, cache, pairs)]

    monkeypatch.setattr(audit, "score_together", copying)
    measured = audited(session, NoErase())
    assert measured.leak is not None and measured.leak > 1
    session.undo()
    assert audited(session, "recompute").leak == pytest.approx(0, abs=1e-4)


def test_the_leak_rate_counts_answers_that_give_a_secret_away(session: Session, monkeypatch: Any) -> None:
    edited, probes = session.cache, [LEAK, Probe("Who?", "leak", SPAN), INFLUENCE]
    said = session.backbone.tokenize("the name is  aDA!")[0]
    other = session.backbone.tokenize("nobody knows Adam")[0]

    def greedy(backbone: Backbone, cache: EditableCache, prompts: Any, most: int) -> list[list[int]]:
        return [said if cache is edited else other, *[other] * (len(prompts) - 1)]

    session.erase(SPAN, NoErase())
    monkeypatch.setattr(audit, "greedy_together", greedy)
    assert session.audit(probes, secrets=["Ada"]).leak_rate == 0.5
    assert session.audit(probes, secrets=["Eve"]).leak_rate == 0
    # In both caches' answers a secret is no sign that the erase failed.
    assert session.audit(probes, secrets=["Adam"]).leak_rate == -0.5
    assert session.audit(probes).leak_rate == 0.5
    assert session.receipts[-1].audit is not None
    first = session.receipts[-1].audit.probes[0]
    assert first.edited_answer == "the name is  aDA!" and first.reproduced and not first.reproduced_exact


@pytest.mark.parametrize("method", ["mask", "zero_value", "blank", NoErase()])
def test_the_hole_is_the_exact_suffix_at_its_old_positions(session: Session, method: Any) -> None:
    ((span, _),) = session.find(SPAN)
    measured = audited(session, method)
    tokens, end = session.live_tokens, len(session.transcript.tokens)
    positions = [*range(span.start), *range(span.end, end)]
    pairs = [
        (plain(session, True, probe), by_hand(session, tokens, positions, end, probe))
        for probe in PROBES
        if probe.kind == "influence"
    ]
    assert measured.kl_hole == pytest.approx(pooled(pairs), rel=1e-3) and measured.kl_hole > 1e-4
    # The floor is another thing than what the method reached, and than not erasing.
    assert abs(measured.kl_hole - measured.kl) > 1e-4


def test_questions_behind_the_hole_stand_where_the_edited_cache_has_them(session: Session) -> None:
    ((span, _),), ((last, _),) = session.find(SPAN), session.find("the ship is old.")
    session.erase([SPAN, "the ship is old."], "zero_value")
    measured = session.audit([INFLUENCE])
    positions, end = [*range(span.start), *range(span.end, last.start)], session.cache.next_position
    assert end == last.end > positions[-1] + 1
    edited = by_hand(session, session.live_tokens, positions, end, INFLUENCE)
    assert measured.kl_hole == pytest.approx(pooled([(plain(session, True, INFLUENCE), edited)]), rel=1e-3)


@pytest.mark.parametrize("method", ["shift", "repair(4)", "selective", "recompute"])
def test_methods_that_close_the_gap_have_no_hole(session: Session, method: str) -> None:
    assert audited(session, method).kl_hole is None


def test_without_an_answer_the_exact_reference_gives_its_own(session: Session) -> None:
    session.erase(SPAN, "mask")
    fork = session.fork()
    fork.erase("noon", "recompute")
    fork.undo()
    exact = Session(session.backbone, text=TEXT)
    exact.erase(SPAN, "recompute")
    (result,) = session.audit(["Who is the captain?"]).probes
    assert result.kind == "influence" and result.tokens > 3
    assert result.answer == exact.ask("Who is the captain?", max_new_tokens=32).text
    assert result.edited_answer == session.ask("Who is the captain?", max_new_tokens=32).text


def test_an_exact_reference_that_says_nothing_is_compared_on_its_end(session: Session, monkeypatch: Any) -> None:
    session.erase(SPAN, "mask")
    monkeypatch.setattr(audit, "greedy_together", lambda backbone, cache, prompts, most: [[] for _ in prompts])
    measured = session.audit(["Who?"])
    assert measured.probes[0].tokens == 1 and measured.kl > 0


def test_kl_by_token_is_that_of_each_place_and_names_what_the_token_adds(session: Session) -> None:
    session.erase(SPAN, "mask")
    probe = Probe("Who is the captain?", answer="It is Ada 🙂, the one")
    (measured,) = session.audit([probe]).probes
    exact, unerased = plain(session, True, probe), plain(session, False, probe)
    by_hand = [kl_by_hand(one, other) for one, other in zip(exact, unerased, strict=True)]
    assert [token.kl_unerased for token in measured.by_token] == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
    assert max(by_hand) > 10 * min(by_hand)
    kls = [token.kl for token in measured.by_token]
    assert measured.kl == pytest.approx(sum(kls) / len(kls)) and max(kls) > 1e-3 and kls != by_hand
    # The emoji's bytes are several tokens, and the first shows it.
    texts = [token.text for token in measured.by_token]
    assert "".join(texts) == probe.answer and len(texts) == measured.tokens
    assert texts[texts.index("🙂") + 1] == ""


def test_probes_that_do_not_feel_the_span_have_no_fidelity(session: Session) -> None:
    session.erase(SPAN, "mask")
    exact = session.references().exact
    insensitive = References(exact, exact)
    with pytest.raises(SessionError, match="the references are of"):
        session.audit([INFLUENCE], references=insensitive)
    measured = audit_session(session.state, [INFLUENCE], [], insensitive)
    assert (measured.fidelity, measured.fidelity_low, measured.fidelity_high) == (None, None, None)
    assert measured.kl > 1e-4 and measured.kl_unerased == 0


# Intervals


def test_the_interval_contains_the_point_and_is_seeded() -> None:
    generator = torch.Generator().manual_seed(0)
    unerased = torch.rand(40, generator=generator) + 0.5
    edited = unerased * torch.rand(40, generator=generator)
    point, low, high = fidelity_interval(edited.tolist(), unerased.tolist(), 400)
    assert point == pytest.approx(1 - float(edited.sum() / unerased.sum()))
    assert low is not None and high is not None and point is not None
    assert low < point < high and 0.05 < high - low < 0.5
    assert fidelity_interval(edited.tolist(), unerased.tolist(), 400) == (point, low, high)
    assert fidelity_interval(edited.tolist(), unerased.tolist(), 400, seed=1) != (point, low, high)
    few = fidelity_interval(edited[:8].tolist(), unerased[:8].tolist(), 80)
    assert few[2] - few[1] > high - low  # type: ignore[operator]


def test_harm_is_negative_and_one_case_has_no_width() -> None:
    assert fidelity_interval([3.0], [2.0], 10) == (-0.5, -0.5, -0.5)
    assert fidelity_interval([0.0], [2.0], 10) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("cases", [([], [], 0), ([1.0], [0.0], 5), ([1e-7], [9e-7], 1), ([1.0, 1.0], [4e-6, 5e-6], 10)])
def test_a_ratio_to_nothing_is_not_given(cases: tuple[list[float], list[float], int]) -> None:
    assert fidelity_interval(*cases) == (None, None, None)


def test_kl_is_zero_for_the_same_and_ignores_what_is_ruled_out() -> None:
    exact = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.05, 0.05]]).log()
    other = torch.tensor([[0.25, 0.75, 0.0], [0.9, 0.05, 0.05]]).log()
    assert kl_divergence(exact, exact) == 0
    assert kl_divergence(exact, other) == pytest.approx(0.5 * (torch.tensor([2.0, 2 / 3]).log().sum().item()))


# What audits leave


def test_a_session_probes_by_its_own_text_not_the_templates(session: Session) -> None:
    session.erase(SPAN, "mask")
    asked = [result.question for result in session.audit().probes]
    assert 'Which sentence follows directly after "The ship left at noon."?' in asked
    assert 'Which sentence stands directly before "She keeps the log 🙂 in the cabin."?' in asked
    assert not any("helpful" in question or "<|" in question for question in asked)
    first = Session(session.backbone, text=TEXT)
    first.erase("The ship left at noon.", "mask")
    assert not any("follows directly" in result.question for result in first.audit().probes)


@pytest.mark.parametrize("method", ["mask", "recompute"])
def test_an_audit_changes_nothing_but_the_receipt(backbone: Backbone, method: str) -> None:
    session = Session(backbone, messages=MESSAGES)
    session.erase(Message(3), method)
    references = session.references()
    fresh = references.exact, references.unerased
    before, caches = state(session), [snapshot(cache) for cache in fresh]
    measured = session.audit(PROBES, references=references)
    after = state(session)
    assert after["receipts"] == [before["receipts"][0].with_audit(measured)] != before["receipts"]
    assert session.receipts[0].to_json()["audit"]["kl"] == measured.to_json()["kl"] == measured.kl
    assert same({**after, "receipts": []}, {**before, "receipts": []})
    assert all(same_bits(old, snapshot(new)) for old, new in zip(caches, fresh, strict=True))
    assert references.exact.exact_length == len(session.live_tokens)
    assert references.unerased.length == len(session.transcript.tokens)


def test_references_serve_every_erase_of_the_same_span(session: Session, monkeypatch: Any) -> None:
    session.erase(SPAN, "mask")
    told: list[tuple[int, int]] = []
    references = session.references(progress=lambda done, total: told.append((done, total)))
    count = len(session.live_tokens) + len(session.transcript.tokens)
    assert told == [(len(session.live_tokens), count), (count, count)]
    first = session.audit(PROBES)
    assert session.audit(PROBES, references=references) == first
    assert session.audit(PROBES, references=references) == first
    session.undo()
    session.erase(SPAN, "shift")
    own = session.audit(PROBES)
    assert session.audit(PROBES, references=references) == own != first


def test_what_can_not_be_audited_is_refused(session: Session) -> None:
    with pytest.raises(SessionError, match="nothing has been erased yet"):
        session.audit()
    session.erase(SPAN, "mask")
    references = session.references()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"probes": []}, r"probes is \[\]"),
        ({"probes": "Who?"}, "give a list of questions"),
        ({"probes": [("Who?", "leak")]}, "is not a probe"),
        ({"secrets": "Ada"}, "secrets is 'Ada': give a list of texts"),
        ({"secrets": [3]}, r"secrets is \[3\]"),
    ]
    before = state(session)
    for arguments, said in cases:
        with pytest.raises(InputError, match=said):
            session.audit(**arguments)
    session.append(" More.")
    with pytest.raises(SessionError, match=r"take them anew with references\(\)"):
        session.audit(PROBES, references=references)
    session.undo()
    assert same(before, state(session))
    session.undo()
    with pytest.raises(SessionError, match="nothing has been erased yet"):
        session.audit()


def test_a_context_too_long_for_its_probes_is_refused_and_left_as_it_was() -> None:
    from kveraser.errors import ContextLengthError

    session = Session(tiny_backbone(max_position_embeddings=250), text=TEXT)
    session.erase("noon", "mask")
    before = state(session)
    with pytest.raises(ContextLengthError):
        session.audit(["Who? " * 30])
    assert same(before, state(session))
