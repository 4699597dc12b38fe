"""The objective: answer from the edited cache as from the exact one, with gradients that reach the eraser alone.

Each case is prefilled once: the prefix serves the exact reference, the contaminated suffix and the steering states. All
its queries are packed into one forward pass, each seeing the context and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kveraser.backbone import Backbone
from kveraser.cache import KeyValue
from kveraser.eraser import EraserSettings
from kveraser.methods.kveraser import steering_positions, steering_states
from kveraser.packed import Pair, pack
from kveraser.scratch_cache import splice
from kveraser.train.cases import TokenizedCase

Objective = Literal["kl", "ce", "both"]


@dataclass(frozen=True)
class PreparedCase:
    """All of a case that does not depend on the eraser: computed once, without gradients.

    Attributes:
        prefix: the prefix's states, a pair a layer, `[1, kv_heads, prefix, head_dim]`.
        suffix: the contaminated suffix's states, at its old positions.
        teacher: log-probabilities of the exact reference at every answer token, float32 `[answers, vocabulary]`.
        unerased: KL(exact || unerased) summed over the answer tokens, in nats; None where it was not asked for.
    """

    case: TokenizedCase
    prefix: list[KeyValue]
    suffix: list[KeyValue]
    teacher: torch.Tensor
    unerased: float | None = None


def prepare(backbone: Backbone, case: TokenizedCase, measure_unerased: bool = False) -> PreparedCase:
    """Prefill a case and let the exact reference answer its queries.

    Args:
        measure_unerased: answer them from the unerased cache as well, for fidelity.
    """
    p, m, s = len(case.prefix), len(case.span), len(case.suffix)
    n = p + m + s
    cache = backbone.prefill([*case.prefix, *case.span, *case.suffix])
    prefix = _clone(cache.read(0, p))
    suffix = _clone(cache.read(p + m, p + m + s))
    unerased = None
    with torch.no_grad():
        if measure_unerased:
            unerased = answer_log_probabilities(backbone, splice(cache.read(0, n)), n, n, case.queries)
        cache.truncate(p)
        backbone.extend(cache, case.suffix)
        teacher = answer_log_probabilities(backbone, splice(cache.read(0, p + s)), p + s, p + s, case.queries)
    distance = None if unerased is None else float(token_kl(teacher, unerased).sum())
    return PreparedCase(case, prefix, suffix, teacher, distance)


def edited_log_probabilities(backbone: Backbone, prepared: PreparedCase, settings: EraserSettings) -> torch.Tensor:
    """Log-probabilities of the edited cache at every answer token, float32 `[answers, vocabulary]`, differentiable.

    The same arithmetic as the in-place methods `kveraser` and `kveraser+repair`, out of place (a test compares them).
    """
    case = prepared.case
    p, m, s = len(case.prefix), len(case.span), len(case.suffix)
    closed = settings.layout == "closed"
    positions = steering_positions(torch.arange(p, p + m, dtype=torch.float64), settings.layout)
    steering = steering_states(backbone, prepared.prefix, case.span, positions)
    suffix, start = prepared.suffix, p + m
    if closed:
        keys = backbone.rotation.rotate([keys for keys, _ in suffix], -m)
        suffix, start = [(key, value) for key, (_, value) in zip(keys, suffix, strict=True)], p
    parts = [prepared.prefix, steering]
    window = min(settings.repair, s)
    if window:
        repaired = splice(*parts)
        _forward(backbone, case.suffix[:window], torch.arange(start, start + window), repaired, None)
        parts = [[(layer.keys, layer.values) for layer in repaired.layers]]  # type: ignore[misc, union-attr]
        suffix = [(keys[:, :, window:], values[:, :, window:]) for keys, values in suffix]
    return answer_log_probabilities(backbone, splice(*parts, suffix), p + m + s, start + s, case.queries)


def answer_log_probabilities(
    backbone: Backbone, cache: Any, slots: int, position: int, queries: Sequence[Pair]
) -> torch.Tensor:
    """Answer all queries in one pass over a cache, each blind to the others.

    Args:
        cache: a cache of `slots` slots; it is written to.
        position: where every query starts.

    Returns:
        float32 `[answer tokens of all queries, vocabulary]`.
    """
    packed = pack(queries, slots, position)
    mask = backbone.attention_mask(packed.visible)
    hidden = _forward(backbone, packed.tokens, packed.positions, cache, mask)
    # Only the places that are compared pay for the vocabulary.
    logits: torch.Tensor = backbone.model.get_output_embeddings()(hidden[packed.kept])
    return logits.float().log_softmax(dim=-1)


def case_loss(
    backbone: Backbone, prepared: PreparedCase, settings: EraserSettings, objective: Objective, no_harm_weight: float
) -> torch.Tensor:
    """The loss of one case, a scalar in nats per answer token.

    `kl` is KL(exact || edited) at every answer token; `ce` the cross-entropy of the answers, as in the paper; `both`
    their sum. Cross-entropy rewards an answer for being likely even where the exact reference finds it unlikely, so it
    is not the default.
    """
    edited = edited_log_probabilities(backbone, prepared, settings)
    answers = torch.tensor([token for _, answer in prepared.case.queries for token in answer], device=edited.device)
    weights = torch.tensor(
        [
            no_harm_weight if kind == "no_harm" else 1.0
            for kind, (_, answer) in zip(prepared.case.kinds, prepared.case.queries, strict=True)
            for _ in answer
        ],
        device=edited.device,
    )
    losses = torch.zeros_like(weights)
    if objective in ("kl", "both"):
        losses = losses + token_kl(prepared.teacher, edited)
    if objective in ("ce", "both"):
        losses = losses - edited.gather(1, answers[:, None])[:, 0]
    return (losses * weights).sum() / weights.sum()


def token_kl(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) at every place, `[answers]`, in nats, from log-probabilities `[answers, vocabulary]`."""
    return (exact.exp() * (exact - other)).sum(dim=-1)


def _forward(
    backbone: Backbone,
    tokens: Sequence[int],
    positions: torch.Tensor,
    cache: Any,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """The decoder with the adapter off, last hidden states `[tokens, hidden]`; gradients flow through the cache."""
    output = backbone.model.base_model(
        input_ids=torch.tensor([list(tokens)], device=backbone.device),
        position_ids=backbone.position_ids(positions),
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def _clone(states: Sequence[KeyValue]) -> list[KeyValue]:
    return [(keys.clone(), values.clone()) for keys, values in states]
