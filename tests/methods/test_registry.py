"""Methods by name: the registry, its parser, its refusals, and the default."""

from __future__ import annotations

from typing import Any

import pytest

from kveraser.errors import MethodError
from kveraser.methods import METHODS, default_method, make_method
from tests.tiny import attach_random_eraser, tiny_backbone


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_does_what_it_costs_and_where_it_is_from(name: str) -> None:
    kind = METHODS[name]
    method = kind()
    assert kind.name == name and all(text.strip() for text in (kind.summary, kind.cost, kind.source))
    assert str(make_method(str(method))) == str(method) and make_method(method) is method
    sizes = [method.estimate(10, count, count) for count in (1, 10, 100, 1000)]
    assert sizes == sorted(sizes) and sizes[0] >= 0
    assert kind.is_reference == (name == "recompute") and kind.needs_eraser == name.startswith("kveraser")


@pytest.mark.parametrize(
    ("text", "named", "parameters"),
    [
        ("repair(16)", {}, {"window": 16, "per_span": 0.0}),
        (" repair ( window = 16 ) ", {}, {"window": 16, "per_span": 0.0}),
        ("repair", {"window": 7}, {"window": 7, "per_span": 0.0}),
        ("repair()", {}, {"window": 32, "per_span": 0.0}),
        ("repair(8, per_span=1)", {}, {"window": 8, "per_span": 1}),
        ("selective(0.5)", {}, {"ratio": 0.5}),
        ("kveraser+repair(8, layout='closed')", {}, {"window": 8, "layout": "closed", "per_span": None}),
        ("kveraser('closed')", {}, {"layout": "closed"}),
        ("follow", {}, {"window": 32, "per_span": 0.25, "overlap": 0.75}),
        ("blank('a, (b)')", {}, {"filler": "a, (b)"}),
    ],
)
def test_methods_are_read_from_text(text: str, named: dict[str, Any], parameters: dict[str, Any]) -> None:
    assert make_method(text, **named).parameters == parameters


@pytest.mark.parametrize(
    ("text", "named", "message"),
    [
        ("repiar(32)", {}, "no method 'repiar': did you mean repair"),
        ("frobnicate", {}, "there are recompute, mask"),
        ("", {}, "no method"),
        ("repair(", {}, "no method"),
        ("repair(0)", {}, "window is 0"),
        ("repair(-3)", {}, "window is -3"),
        ("repair('a')", {}, "window"),
        ("repair(2.5)", {}, "window"),
        ("repair(True)", {}, "window"),
        ("repair(1, 2, 3)", {}, "gives 3 parameters, repair takes 2: window, per_span"),
        ("repair(1, -0.5)", {}, "per_span is -0.5"),
        ("repair(1, 1e999)", {}, "per_span is inf"),
        ("repair(1, True)", {}, "per_span is True"),
        ("repair(1, 'a')", {}, "per_span is 'a'"),
        ("repair(width=3)", {}, "takes no parameter 'width': it takes window, per_span"),
        ("mask(3)", {}, "gives 1 parameters, mask takes 0"),
        ("repair(open('x'))", {}, "can't be read"),
        ("repair(*[3])", {}, "can't be read"),
        ("repair", {"width": 3}, "takes no parameter 'width'"),
        ("repair(3)", {"window": 4}, "twice"),
        ("selective(0)", {}, "ratio is 0"),
        ("selective(1.5)", {}, "ratio is 1.5"),
        ("selective('a')", {}, "ratio"),
        ("kveraser('sideways')", {}, "layout is 'sideways'"),
        ("kveraser+repair(0)", {}, "window is 0"),
        ("kveraser('suffix')", {}, "layout suffix was removed"),
        ("follow(0)", {}, "window is 0"),
        ("follow(8, overlap='a')", {}, "overlap is 'a'"),
        ("kveraser+repair(3, per_span=1e999)", {}, "per_span is inf"),
        ("blank('')", {}, "filler"),
        ("blank(3)", {}, "filler"),
        ("erratum(3)", {}, "wording"),
    ],
)
def test_what_can_not_be_read_as_a_method_is_refused(text: str, named: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        make_method(text, **named)


def test_a_ready_made_method_takes_no_further_parameters() -> None:
    with pytest.raises(MethodError, match="beside a ready-made"):
        make_method(make_method("repair"), window=3)


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "follow"), ("gpt_neox", "follow"), ("gpt2", "recompute")],
)
def test_the_default_method_is_follow_where_keys_can_be_moved(family: str, method: str) -> None:
    backbone = tiny_backbone(family)
    assert default_method(backbone) == make_method(method)
    # An eraser does not change what an erase without a method does.
    attach_random_eraser(backbone)
    assert default_method(backbone) == make_method(method)


def test_the_default_method_is_exact_where_attention_takes_no_mask() -> None:
    backbone = tiny_backbone()
    backbone.model.config._attn_implementation = "flash_attention_2"
    assert default_method(backbone) == make_method("recompute")
