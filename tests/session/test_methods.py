"""Methods as a session runs them: which one, with which parameters; and whatever goes wrong, every bit comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kveraser.cache.editable import EditableCache
from kveraser.errors import EraserError, KVEraserError, MethodError, RotationError, SpanError
from kveraser.methods import Method, make_method
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.steering.eraser import EraserSettings
from kveraser.text.spans import Characters, Message, Span, Tokens
from tests.sessions import EXACT, TEXT, far, same, state
from tests.tiny import attach_random_eraser, tiny_backbone

NEW = {"max_new_tokens": 6}
SPAN = "She keeps the log 🙂 in the cabin."


@pytest.fixture
def session(backbone: Backbone) -> Session:
    return Session(backbone, text=TEXT)


def test_without_a_method_keys_are_moved_where_they_can_be_and_else_all_is_recomputed() -> None:
    for family, method in (("llama", "follow"), ("gpt2", "recompute")):
        backbone = tiny_backbone(family)
        receipt = Session(backbone, text=TEXT).erase("noon")
        assert (receipt.method, receipt.exact) == (method, method == "recompute")
        attach_random_eraser(backbone)
        assert Session(backbone, text=TEXT).erase("noon").method == method


def test_the_eraser_serves_as_it_was_trained() -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone, settings=EraserSettings(layout="closed", repair=5))
    erased = Session(backbone, text=TEXT).erase(SPAN, "kveraser")
    assert (erased.method, erased.parameters) == ("kveraser", {"layout": "closed"})
    repaired = Session(backbone, text=TEXT).erase(SPAN, "kveraser+repair")
    assert repaired.parameters == {"window": 5, "layout": "closed", "per_span": 0.0}
    assert not erased.exact and not repaired.exact and repaired.recomputed == erased.recomputed + 5


def test_parameters_reach_the_method_however_they_are_given(session: Session) -> None:
    given: list[tuple[Any, dict[str, Any]]] = [
        ("repair(5)", {}), ("repair", {"window": 5}), ("repair(window=5)", {}), (make_method("repair", window=5), {}),
    ]  # fmt: skip
    for method, parameters in given:
        receipt = session.erase(SPAN, method, **parameters)
        assert (receipt.method, receipt.parameters, receipt.recomputed) == ("repair", {"window": 5, "per_span": 0.0}, 5)
        session.undo()


@pytest.mark.parametrize(
    ("what", "arguments", "error", "said"),
    [
        (SPAN, {"method": "magic"}, MethodError, "no method 'magic'"),
        (SPAN, {"method": "repair(0)"}, MethodError, "window is 0"),
        (SPAN, {"method": "repair", "size": 3}, MethodError, "no parameter 'size'"),
        (SPAN, {"window": 3}, MethodError, r"parameters \['window'\] without a method"),
        (SPAN, {"method": "kveraser"}, EraserError, "no eraser is loaded for tiny-llama"),
        (SPAN, {"method": "kveraser+repair(3)"}, EraserError, "no eraser is loaded"),
        (SPAN, {"method": "mask", "max_kl": 0.1}, MethodError, "belong to method='auto'"),
        (SPAN, {"probes": ["Who?"]}, MethodError, "belong to method='auto'"),
        ("submarine", {}, SpanError, "not in the context"),
        ([], {}, SpanError, "no span given"),
        (Message(0), {}, SpanError, "no message 0"),
        (TEXT, {}, SpanError, "the whole context"),
        (["Ada", "submarine"], {"method": "mask"}, SpanError, "submarine"),
    ],
)
def test_an_erase_that_can_not_be_done_leaves_the_session_as_it_was(
    session: Session, what: Any, arguments: dict[str, Any], error: type[KVEraserError], said: str
) -> None:
    before = state(session)
    with pytest.raises(error, match=said):
        session.erase(what, **arguments)
    assert same(before, state(session))


def test_what_was_erased_can_not_be_erased_again(session: Session) -> None:
    session.erase("Ada", "shift")
    before = state(session)
    for what in ("Ada", Characters(TEXT.index("Ada"), TEXT.index("Ada") + 3)):
        with pytest.raises(SpanError, match="'Ada' is erased already"):
            session.erase(what, "shift")
    assert same(before, state(session))
    session.erase("The captain is Ada.", "recompute") if "Ada" in session.text else session.erase(
        "captain", "recompute"
    )
    assert far(session) < EXACT


@pytest.mark.parametrize("method", ["shift", "repair(4)", "selective"])
def test_models_without_rotary_positions_refuse_what_moves_keys(backbones: dict[str, Backbone], method: str) -> None:
    session = Session(backbones["gpt2"], text=TEXT)
    before = state(session)
    with pytest.raises(RotationError, match="GPT2"):
        session.erase(SPAN, method)
    assert same(before, state(session))
    session.erase(SPAN, "recompute")
    assert session.exact and far(session) < EXACT


@dataclass(frozen=True)
class Failing(Method):
    """Does the work of another method, one or more times, and then fails."""

    error: type[BaseException] = RuntimeError
    calls: int = 1
    done: list[int] | None = None

    name = "failing"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        assert self.done is not None
        erased = make_method("repair(4)")(backbone, cache, tokens, span)
        self.done.append(1)
        if len(self.done) == self.calls:
            raise self.error("in the middle")
        return erased

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MethodError])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_failure_in_the_middle_of_an_erase_restores_every_bit(session: Session, error: Any, calls: int) -> None:
    session.erase("noon", "mask")
    session.ask("Who?", keep=True, **NEW)
    before = state(session)
    with pytest.raises(error, match="in the middle"):
        session.erase(["captain", SPAN], Failing(error, calls, []))
    assert same(before, state(session))
    session.undo(2)
    assert far(session) < EXACT


@pytest.mark.parametrize("method", ["recompute", "repair(4)", "blank", "selective", "erratum", "kveraser"])
def test_an_interrupted_pass_restores_every_bit(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    attach_random_eraser(backbone)
    session = Session(backbone, text=TEXT)
    before = state(session)
    layer = backbone.model.model.layers[2].mlp
    inside = layer.forward

    def interrupt(states: torch.Tensor) -> torch.Tensor:
        inside(states)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            session.erase(SPAN, method)
    assert same(before, state(session))
    assert session.erase(SPAN, method).recomputed > 0


def test_an_interruption_after_the_last_pass_restores_every_bit(session: Session, monkeypatch: Any) -> None:
    def interrupt(**fields: Any) -> None:
        assert not all(session.transcript.live)
        raise KeyboardInterrupt

    before = state(session)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kveraser.session.erase.Receipt", interrupt)
        session.erase(SPAN, "repair(4)")
    assert same(before, state(session))


@dataclass(frozen=True)
class Careless(Method):
    """Leaves the span in the cache."""

    name = "careless"

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        cache.zero_values(span.start, span.end)
        return 0

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return 0


def test_a_method_that_leaves_the_span_in_the_cache_is_refused(session: Session) -> None:
    before = state(session)
    with pytest.raises(MethodError, match=r"careless left tokens of the span .* choose another method"):
        session.erase(SPAN, Careless())
    assert same(before, state(session))


@pytest.mark.parametrize("method", ["repair(900)", "follow(window=900)", "selective(0.9)", "blank", None])
def test_what_costs_as_much_as_exact_recomputation_becomes_it(session: Session, method: str | None) -> None:
    ((span, _),) = session.find(SPAN)
    left = len(session.live_tokens) - span.end
    before = state(session)
    receipt = session.erase(SPAN if method != "blank" else Tokens(10, len(session.live_tokens) - 20), method)
    assert (receipt.method, receipt.exact) == ("recompute", True) and far(session) < EXACT
    assert receipt.requested is not None and receipt.reason is not None
    assert (method or "follow").partition("(")[0] in receipt.requested and str(receipt.recomputed) in receipt.reason
    assert receipt.recomputed == (20 if method == "blank" else left)
    session.undo()
    assert same(before, state(session))


@pytest.mark.parametrize("method", ["repair(8)", "shift", "zero_value", "mask", "blank"])
def test_a_short_suffix_is_recomputed_whatever_is_named(session: Session, method: str) -> None:
    end = len(session.live_tokens)
    ((span, _),) = session.find(Tokens(60, end - 4 if method in ("repair(8)", "blank") else end))
    receipt = session.erase(Tokens(span.start, span.end), method)
    assert receipt.method == "recompute" and receipt.exact and receipt.recomputed == end - span.end
    session.undo()
    forced = session.erase(Tokens(span.start, span.end), method, force=True)
    assert forced.method == method.partition("(")[0] and forced.requested is forced.reason is None


def test_cheap_methods_stay_and_many_spans_are_counted_together(session: Session) -> None:
    end = len(session.live_tokens)
    assert session.erase(Tokens(5, 9), "repair(8)").requested is None
    session.undo()
    # Each alone is cheap; all together run as much as the rest of the text.
    spans = [Tokens(start, start + 2) for start in range(5, end - 20, 10)]
    receipt = session.erase(spans, "repair(8)")
    assert receipt.exact and receipt.requested == "repair(window=8, per_span=0.0)"


def test_traces_of_earlier_erases_count_as_left_to_recompute(session: Session) -> None:
    session.erase(Tokens(5, 9), "shift")
    end = len(session.transcript.tokens)
    # Exact recomputation would start at the first erase, so that a short suffix alone does not make it cheap.
    receipt = session.erase(Tokens(end - 10, end - 4), "repair(8)")
    assert receipt.method == "repair" and not receipt.exact
