"""Rotations whose frequencies depend on the length of the text are served up to where they begin to, and no further."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kveraser.cache.rotation import fixed_frequencies_end
from kveraser.errors import ContextLengthError
from kveraser.model import backbone as backbone_module
from kveraser.model.backbone import Backbone
from kveraser.serve.embedded import TransformersEngine
from kveraser.session.session import Session
from kveraser.text.spans import Tokens
from tests.tiny import distance, random_tokens, tiny_backbone

END, POSITIONS = 200, 800
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
    "original_max_position_embeddings": END, "factor": 4.0,
}  # fmt: skip


def longrope() -> Backbone:
    return tiny_backbone(
        "phi3", max_position_embeddings=POSITIONS, original_max_position_embeddings=END, rope_parameters=LONGROPE
    )


def states(backbone: Backbone, tokens: list[int]) -> list[torch.Tensor]:
    return [state for pair in backbone.prefill(tokens).read(0, len(tokens)) for state in pair]


def text(backbone: Backbone, tokens: int) -> str:
    """Text of about so many tokens of the tiny tokenizer."""
    return str(backbone.tokenizer.decode(random_tokens(tokens)))


def test_up_to_the_border_chunks_are_one_pass_and_beyond_it_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = longrope()
    whole = states(backbone, random_tokens(END))
    monkeypatch.setattr(backbone_module, "PREFILL_CHUNK", 32)
    assert distance(states(backbone, random_tokens(END)), whole) < 1e-4
    # Without the limit: the reason for it.
    backbone.max_positions = POSITIONS
    parted = states(backbone, random_tokens(END + 20))
    monkeypatch.setattr(backbone_module, "PREFILL_CHUNK", 512)
    assert distance(parted, states(backbone, random_tokens(END + 20))) > 0.1


def test_no_token_is_computed_beyond_the_border() -> None:
    backbone = longrope()
    assert backbone.max_positions == END
    with pytest.raises(ContextLengthError, match=f"beyond the {END} positions .*frequencies change with the length"):
        backbone.prefill(random_tokens(END + 1))
    session = Session(backbone, text=text(backbone, 40))
    held = len(session.transcript.tokens)
    with pytest.raises(ContextLengthError, match="frequencies change"):
        session.append(text(backbone, 120))
    assert len(session.transcript.tokens) == held == session.cache.length


def test_decoding_ends_at_the_border_and_what_says_exact_is() -> None:
    backbone = longrope()
    session = Session(backbone, text=text(backbone, 40))
    receipt = session.erase(Tokens(8, 12), "recompute")
    session.ask("a?", keep=True, max_new_tokens=POSITIONS)
    assert receipt.exact and session.exact and session.cache.length <= END
    kept = [state for pair in session.cache.read(0, session.cache.length) for state in pair]
    assert distance(kept, states(backbone, session.live_tokens)) < 1e-4


def test_a_server_offers_the_positions_before_the_border() -> None:
    assert TransformersEngine(longrope()).max_positions == END


@pytest.mark.parametrize(
    ("config", "end"),
    [
        ({"rope_parameters": {"rope_type": "default"}, "max_position_embeddings": 64}, None),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, None),
        ({"max_position_embeddings": 64}, None),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64}, 64),
        ({"rope_parameters": LONGROPE, "max_position_embeddings": POSITIONS}, END),
        (
            {
                "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}},
                "max_position_embeddings": POSITIONS,
            },
            END,
        ),
    ],
)
def test_where_frequencies_begin_to_depend_on_the_length(config: dict[str, Any], end: int | None) -> None:
    assert fixed_frequencies_end(SimpleNamespace(**config)) == end


def test_dynamic_rotation_is_served_up_to_its_own_positions() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    backbone = tiny_backbone("llama", max_position_embeddings=END, rope_parameters=rope)
    with pytest.raises(ContextLengthError, match="frequencies change"):
        backbone.prefill(random_tokens(END + 1))
    assert backbone.prefill(random_tokens(END)).length == END
