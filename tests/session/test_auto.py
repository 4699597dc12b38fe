"""method="auto": the cheapest method that meets a budget, in the end recompute; the others leave no trace."""

from __future__ import annotations

from typing import Any

import pytest

from kveraser.errors import InputError, KVEraserError, MethodError, SpanError
from kveraser.measure.audit import References
from kveraser.measure.probes import Probe
from kveraser.methods import METHODS, make_method
from kveraser.methods.apply import EXACT_SHARE
from kveraser.model.backbone import Backbone
from kveraser.session import erase as erasing
from kveraser.session.session import Session
from kveraser.text.spans import Characters
from tests.sessions import EXACT, TEXT, consistent, far, same, state
from tests.tiny import attach_random_eraser, tiny_backbone

SPAN = "She keeps the log 🙂 in the cabin."
PROBES = ["Who keeps the log?"]


@pytest.fixture
def session(backbone: Backbone) -> Session:
    return Session(backbone, text=TEXT)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that a session runs, as it runs them."""
    names: list[str] = []
    inside = erasing.edit

    def record(state: Any, changes: Any, method: Any) -> Any:
        names.append(method.name)
        return inside(state, changes, method)

    monkeypatch.setattr(erasing, "edit", record)
    return names


def kl_of_each(backbone: Backbone, probes: Any = PROBES) -> dict[str, float]:
    """KL of every method on its own, in the order of their cost."""
    session, costs = Session(backbone, text=TEXT), {}
    ((span, _),) = session.find(SPAN)
    for name, kind in METHODS.items():
        if kind.removes_text and (not kind.needs_eraser or backbone.eraser is not None):
            method = make_method(name).resolve(backbone)
            suffix = len(session.transcript.tokens) - span.end
            cost = method.estimate(span.start, len(span), suffix)
            if session.erase(SPAN, method).method != name:
                assert cost >= EXACT_SHARE * suffix
                session.undo()
                continue
            costs[name] = (cost, method.is_reference, session.audit(probes).kl)
            session.undo()
    ordered = sorted(costs, key=lambda name: costs[name][:2])
    return {name: costs[name][2] for name in ordered}


@pytest.mark.parametrize("eraser", [False, True])
def test_the_cheapest_method_within_the_budget_is_taken(tried: list[str], eraser: bool) -> None:
    backbone = tiny_backbone()
    if eraser:
        attach_random_eraser(backbone, scale=0.02)
    kls = kl_of_each(backbone)
    tried.clear()
    names = list(kls)
    assert ("kveraser" in names) is eraser and "erratum" not in names and names[-1] == "recompute"
    lowest = [name for place, name in enumerate(names) if all(kls[name] < kls[other] for other in names[:place])]
    # Budgets that the first, a middle and only the last of them meet.
    assert len(lowest) > 2
    for name in lowest:
        session = Session(backbone, text=TEXT)
        receipt = session.erase(SPAN, "auto", max_kl=max(0.0, kls[name]) * 1.0001 + 1e-12, probes=PROBES)
        assert receipt.method == name and tried == names[: names.index(name) + 1]
        assert session.receipts == [receipt] and consistent(session)
        if name == "recompute":
            assert receipt.exact and receipt.audit is None
        else:
            assert receipt.audit is not None and receipt.audit.kl == pytest.approx(kls[name])
        tried.clear()


def test_a_method_that_the_loaded_eraser_cannot_serve_is_no_candidate(tried: list[str]) -> None:
    backbone = tiny_backbone()
    receipt = Session(backbone, text=TEXT).erase(SPAN, "auto", max_kl=0, probes=PROBES)
    assert receipt.exact and tried and not {"kveraser", "kveraser+repair"} & set(tried)


def test_what_failed_the_budget_leaves_no_trace(session: Session) -> None:
    session.erase("noon", "mask")
    before = state(session)
    direct = session.fork()
    receipt = session.erase(SPAN, "auto", max_kl=0, probes=PROBES)
    assert receipt.method == "recompute" and receipt.exact and receipt.audit is None
    direct.erase(SPAN, "recompute")
    assert session.exact and far(session) < EXACT and session.live_tokens == direct.live_tokens
    assert len(session.receipts) == 2
    session.undo()
    assert same(before, state(session))


def test_a_budget_of_zero_is_met_by_exactness_alone(session: Session, tried: list[str], monkeypatch: Any) -> None:
    # At the very end of the text exact costs nothing.
    at_end = session.erase("the ship is old.", "auto", max_kl=0)
    assert at_end.exact and at_end.recomputed == 0 and tried == ["recompute"] and far(session) < EXACT
    session.undo()

    def measured(*arguments: Any) -> None:
        raise AssertionError("no measurement could show exactness")

    monkeypatch.setattr(erasing, "audit", measured)
    assert session.erase("noon", "auto", max_kl=0, probes=["Who?"]).method == "recompute"


def test_the_default_budget_and_probes_serve(session: Session) -> None:
    receipt = session.erase(SPAN, "auto")
    assert receipt.exact or (receipt.audit is not None and receipt.audit.kl <= 0.02)
    generous = Session(session.backbone, text=TEXT).erase(SPAN, "auto", max_kl=1e9)
    assert generous.method == "mask" and generous.audit is not None
    assert {probe.kind for probe in generous.audit.probes} == {"influence", "leak", "no_harm"}


def test_several_spans_are_weighed_together(session: Session) -> None:
    receipt = session.erase(["noon", SPAN], "auto", max_kl=0)
    assert len(receipt.spans) == 2 and receipt.exact and far(session) < EXACT


def test_methods_that_a_model_can_not_take_are_passed_over(backbones: dict[str, Backbone], tried: list[str]) -> None:
    session = Session(backbones["gpt2"], text=TEXT)
    kept = session.erase(SPAN, "auto", max_kl=1e9)
    assert kept.method == "mask" and session.receipts == [kept]
    session.undo()
    tried.clear()
    receipt = session.erase(SPAN, "auto", max_kl=0)
    assert set(tried) == {"mask", "zero_value", "blank", "recompute"}
    assert receipt.method == "recompute" and session.receipts == [receipt] and far(session) < EXACT


def test_methods_that_fail_on_the_way_are_passed_over(tried: list[str]) -> None:
    session = Session(tiny_backbone(num_hidden_layers=1), text=TEXT)
    before = state(session)
    with pytest.raises(MethodError, match="selective needs at least 2 layers"):
        session.erase("noon", "selective")
    assert same(before, state(session))
    receipt = session.erase("noon", "auto", max_kl=0)
    assert "selective" in tried[1:] and receipt.exact and session.receipts == [receipt]


def test_without_undo_only_the_chosen_state_is_left(session: Session) -> None:
    session.erase("noon", "mask")
    receipt = session.erase(SPAN, "auto", max_kl=1e9, undoable=False)
    assert receipt.undo_bytes == 0 and session.receipts[-1] == receipt and session.state.history == []
    assert receipt.audit is not None


def test_what_can_not_be_measured_is_recomputed(backbone: Backbone) -> None:
    session = Session(backbone, text="the ship " * 150)
    session.erase(Characters(100, 800), "recompute")
    session.append(" It left for Lisbon." * 20)
    # The unerased reference would no longer fit the positions.
    assert len(session.transcript.tokens) > 1024 > len(session.live_tokens)
    receipt = session.erase(Characters(0, 8), "auto", max_kl=1e9)
    assert receipt.method == "recompute" and receipt.exact and len(session.receipts) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError])
def test_a_failing_audit_takes_the_erase_back(session: Session, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> References:
        raise error("in the middle")

    before = state(session)
    monkeypatch.setattr(erasing, "audit", fail)
    with pytest.raises(error, match="in the middle"):
        session.erase(SPAN, "auto", max_kl=0.5)
    assert same(before, state(session))


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"max_kl": -0.1}, MethodError, "max_kl is -0.1: give a budget of at least 0"),
        ({"max_kl": float("nan")}, MethodError, "max_kl is nan"),
        ({"window": 3}, MethodError, r"auto chooses the parameters itself: leave out \['window'\]"),
        ({"probes": []}, InputError, r"probes is \[\]: give a list of questions, at least one"),
        ({"probes": "Who?"}, InputError, r"probes is 'Who\?': give a list"),
        ({"probes": [3]}, InputError, "3 is not a probe"),
        ({"probes": [Probe("Who?", "leak", "Ada")]}, MethodError, "there is none: add a question"),
        ({"probes": [""]}, InputError, "a probe's question is ''"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_erased(
    session: Session, tried: list[str], arguments: dict[str, Any], error: type[KVEraserError], said: str
) -> None:
    before = state(session)
    with pytest.raises(error, match=said):
        session.erase(SPAN, "auto", **arguments)
    with pytest.raises(SpanError):
        session.erase("submarine", "auto")
    assert same(before, state(session)) and tried == []
