"""The objective: answer from the edited cache as from the exact one, with gradients that reach the eraser alone.

Cases of one shape (as many tokens of prefix, span and suffix) run together, without padding their contexts. Each is
prefilled once: the prefix serves the exact reference, the contaminated suffix and the steering states. All queries of a
case are packed into one forward pass, each seeing the context and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import DynamicCache

from kveraser.cache.editable import KeyValue
from kveraser.cache.probe import concat_kv
from kveraser.measure.packing import Pair, pack
from kveraser.methods.kveraser import run_eraser
from kveraser.model.backbone import Backbone
from kveraser.steering.eraser import EraserSettings
from kveraser.steering.layouts import LAYOUTS
from kveraser.training.cases import TokenizedCase
from kveraser.training.checkpoint import TrainingError

Objective = Literal["kl", "ce", "both"]

HEAD_TOLERANCE = 0.05
"""Nats: far above rounding in 16 bits, far below what another scale of the logits makes."""

Shape = tuple[int, int, int]
"""Tokens of prefix, span and suffix."""

Prefills = dict[tuple[int, ...], list[KeyValue]]
"""States of unerased contexts, by their tokens: a pair a layer, `[1, kv_heads, tokens, head_dim]`."""


def shape(case: TokenizedCase) -> Shape:
    """What cases must agree in to run together."""
    return len(case.prefix), len(case.span), len(case.suffix)


def context(case: TokenizedCase) -> tuple[int, ...]:
    """The tokens of the unerased context."""
    return (*case.prefix, *case.span, *case.suffix)


@dataclass(frozen=True)
class PreparedBatch:
    """All of a batch that does not depend on the eraser: computed once, without gradients.

    Attributes:
        cases: of one shape.
        prefix: the prefixes' states, a pair a layer, `[batch, kv_heads, prefix, head_dim]`.
        before: the same with the spans' old states behind them.
        suffix: the contaminated suffixes' states, at their old positions.
        teacher: log-probabilities of the exact reference at every answer token, float32 `[answers, vocabulary]`, case
            after case, query after query.
        unerased: KL(exact || unerased) at every answer token, float32 `[answers]`, in nats; None where it was not asked
            for.
    """

    cases: tuple[TokenizedCase, ...]
    prefix: list[KeyValue]
    before: list[KeyValue]
    suffix: list[KeyValue]
    teacher: torch.Tensor
    hidden: torch.Tensor
    unerased: torch.Tensor | None = None

    @property
    def answers(self) -> list[int]:
        """Answer tokens of every case."""
        return [sum(len(answer) for _, answer in case.queries) for case in self.cases]

    @property
    def no_harm(self) -> torch.Tensor:
        """Which answer tokens belong to queries that the span never touched, bool `[answers]`."""
        return torch.tensor(
            [
                kind == "no_harm"
                for case in self.cases
                for kind, (_, answer) in zip(case.kinds, case.queries, strict=True)
                for _ in answer
            ],
            device=self.teacher.device,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the states and the reference."""
        tensors = [self.teacher, *(states for pair in (*self.before, *self.suffix) for states in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def prepare(
    backbone: Backbone,
    cases: Sequence[TokenizedCase],
    measure_unerased: bool = False,
    prefills: Prefills | None = None,
    reference: torch.Tensor | None = None,
) -> PreparedBatch:
    """Prefill cases of one shape and let the exact reference answer their queries.

    Args:
        measure_unerased: answer them from the unerased cache as well, for fidelity.
        prefills: of contexts that other cases share, from `shared_prefills`.
        reference: last hidden states of the exact reference (see `exact_reference`), where they are known.
    """
    p, m, s = shape(cases[0])
    n = p + m + s
    queries = [case.queries for case in cases]
    with torch.no_grad():
        states = _prefilled(backbone, [context(case) for case in cases], prefills or {})
        prefix, before, suffix = split_states(states, cases[0])
        if reference is None:
            cache = concat_kv(prefix)
            if s:
                _forward(backbone, [case.suffix for case in cases], torch.arange(p, p + s), cache)
            reference = answer_hidden(backbone, cache, p + s, p + s, queries)
        teacher = log_probabilities(backbone, reference)
        unerased = None
        if measure_unerased:
            unerased = token_kl(teacher, answer_log_probabilities(backbone, concat_kv(states), n, n, queries))
    return PreparedBatch(tuple(cases), prefix, before, suffix, teacher, reference, unerased)


def split_states(
    states: Sequence[KeyValue], case: TokenizedCase
) -> tuple[list[KeyValue], list[KeyValue], list[KeyValue]]:
    """States of contexts of this case's shape, as views: of the prefix, of prefix and span, of the suffix."""
    p, m, _ = shape(case)
    return (
        [(keys[:, :, :p], values[:, :, :p]) for keys, values in states],
        [(keys[:, :, : p + m], values[:, :, : p + m]) for keys, values in states],
        [(keys[:, :, p + m :], values[:, :, p + m :]) for keys, values in states],
    )


def exact_reference(backbone: Backbone, cases: Sequence[TokenizedCase]) -> torch.Tensor:
    """The exact reference's last hidden states from a fresh prefill of its own, as `PreparedBatch.hidden`."""
    exact = [(*case.prefix, *case.suffix) for case in cases]
    with torch.no_grad():
        cache = concat_kv(_prefilled(backbone, exact, {}))
        return answer_hidden(backbone, cache, len(exact[0]), len(exact[0]), [case.queries for case in cases])


def shared_prefills(backbone: Backbone, cases: Sequence[TokenizedCase]) -> Prefills:
    """Prefill the contexts that several of `cases` have in common (several spans of one text), each once."""
    contexts = [context(case) for case in cases]
    repeated = {tokens for tokens in contexts if contexts.count(tokens) > 1} if len(set(contexts)) < len(cases) else ()
    with torch.no_grad():
        return {tokens: _prefilled(backbone, [tokens], {}) for tokens in repeated}


def _prefilled(backbone: Backbone, contexts: Sequence[tuple[int, ...]], prefills: Prefills) -> list[KeyValue]:
    """States of contexts of one length, a pair a layer, `[batch, kv_heads, tokens, head_dim]`."""
    if any(tokens in prefills for tokens in contexts):
        rows = [prefills[tokens] if tokens in prefills else _prefilled(backbone, [tokens], {}) for tokens in contexts]
        return [
            (torch.cat([keys for keys, _ in layer]), torch.cat([values for _, values in layer]))
            for layer in zip(*rows, strict=True)
        ]
    cache = DynamicCache()
    _forward(backbone, contexts, torch.arange(len(contexts[0])), cache)
    return _states(cache)


def edited_log_probabilities(backbone: Backbone, prepared: PreparedBatch, settings: EraserSettings) -> torch.Tensor:
    """Log-probabilities of the edited caches at every answer token, float32 `[answers, vocabulary]`, differentiable.

    The layout runs as in `kveraser` and `kveraser+repair`, on spliced states.
    """
    cases, store = prepared.cases, SplicedStore(backbone, prepared)
    LAYOUTS[settings.layout].write(store, backbone.require_eraser().extras)
    _, m, s = shape(cases[0])
    window = min(settings.window(m), s)
    parts = [prepared.prefix, store.steering]
    if window:
        repaired = concat_kv(*parts)
        rerun = [case.suffix[:window] for case in cases]
        _forward(backbone, rerun, torch.arange(store.start, store.start + window), repaired)
        parts = [_states(repaired)]
    parts.append([(keys[:, :, window:], values[:, :, window:]) for keys, values in store.suffix])
    slots = sum(part[0][0].shape[2] for part in parts)
    queries = [case.queries for case in cases]
    return answer_log_probabilities(backbone, concat_kv(*parts), slots, store.start + s, queries)


class SplicedStore:
    """States of a prepared batch as a layout's store, out of place: gradients flow through all parts.

    See `kveraser.steering.layouts.Store`, whose methods these are.

    Attributes:
        steering: the steering states, a pair a layer.
        suffix: the suffix's states, a pair a layer.
        start: position of the suffix's first token.
    """

    def __init__(self, backbone: Backbone, prepared: PreparedBatch) -> None:
        p, m, _ = shape(prepared.cases[0])
        self.backbone, self.prepared = backbone, prepared
        self.span_positions = torch.arange(p, p + m, dtype=torch.float64)
        self.steering, self.suffix, self.start = list[KeyValue](), prepared.suffix, p + m

    def run_span(self, positions: torch.Tensor) -> None:
        """Attends to the prefix."""
        spans = [case.span for case in self.prepared.cases]
        self.steering = run_eraser(self.backbone, concat_kv(self.prepared.prefix), positions, tokens=spans)

    def run_slots(self, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
        """Attends to prefix and span."""
        before = concat_kv(self.prepared.before)
        self.steering = run_eraser(self.backbone, before, positions, embeddings=embeddings)

    def close_gap(self) -> None:
        """Re-rotates the suffix keys by minus the span's length."""
        m = len(self.span_positions)
        keys = self.backbone.rotation.rotate([keys for keys, _ in self.suffix], -m)
        self.suffix = [(key, value) for key, (_, value) in zip(keys, self.suffix, strict=True)]
        self.start -= m


def answer_log_probabilities(
    backbone: Backbone, cache: Any, slots: int, position: int, queries: Sequence[Sequence[Pair]]
) -> torch.Tensor:
    """Log-probabilities of `answer_hidden`, float32 `[answer tokens of all queries of all cases, vocabulary]`."""
    return log_probabilities(backbone, answer_hidden(backbone, cache, slots, position, queries))


def log_probabilities(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of last hidden states `[tokens, hidden]`, float32 `[tokens, vocabulary]`.

    Logits are scaled and capped as in the model's own forward: Granite divides by `logits_scaling`, Cohere multiplies
    by `logit_scale`, Gemma 2 and later cap at `final_logit_softcapping`. `check_head` compares the two.
    """
    logits: torch.Tensor = backbone.model.get_output_embeddings()(hidden)
    config = backbone.model.config.get_text_config(decoder=True)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    if scale != 1:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.float().log_softmax(dim=-1)


def check_head(backbone: Backbone) -> None:
    """Refuse a backbone whose own logits are others than those that training would compute from its hidden states.

    Raises:
        TrainingError: naming the difference.
    """
    tokens = torch.arange(4, device=backbone.device)[None]
    with torch.no_grad():
        own = backbone.model(input_ids=tokens).logits[0].float().log_softmax(dim=-1)
        ours = log_probabilities(backbone, backbone.model.base_model(input_ids=tokens).last_hidden_state[0])
    difference = float((own - ours).abs().max())
    if difference > HEAD_TOLERANCE:
        raise TrainingError(
            f"{backbone.name} computes its logits in a way that training does not know: log-probabilities differ by up "
            f"to {difference:.2g}: train an eraser for another backbone"
        )


def answer_hidden(
    backbone: Backbone, cache: Any, slots: int, position: int, queries: Sequence[Sequence[Pair]]
) -> torch.Tensor:
    """Answer all queries of every case in one pass over a cache, each blind to the others.

    Args:
        cache: a cache of `slots` slots, a row a case; it is written to.
        position: where every query starts.
        queries: of every case.

    Returns:
        Last hidden states where answer tokens are predicted, `[answer tokens of all queries of all cases, hidden]`.
    """
    packs = [pack(pairs, slots, position, shared=True) for pairs in queries]
    longest = max(len(packed.tokens) for packed in packs)
    tokens = torch.zeros(len(packs), longest, dtype=torch.long)
    positions = torch.full((len(packs), longest), position, dtype=torch.long)
    visible = torch.zeros(len(packs), longest, slots + longest, dtype=torch.bool)
    # Padding comes last, where no query sees it; it sees the context, since a place must see something.
    visible[:, :, :slots] = True
    kept = []
    for row, packed in enumerate(packs):
        length = len(packed.tokens)
        tokens[row, :length] = torch.tensor(packed.tokens)
        positions[row, :length] = packed.positions
        visible[row, :length, : slots + length] = packed.visible
        kept.append(row * longest + packed.kept)
    hidden = _forward(backbone, tokens, positions, cache, backbone.attention_mask(visible))
    # Only the places that are compared pay for the vocabulary.
    return hidden.flatten(0, 1)[torch.cat(kept).to(hidden.device)]


def case_losses(
    backbone: Backbone, prepared: PreparedBatch, settings: EraserSettings, objective: Objective, no_harm_weight: float
) -> torch.Tensor:
    """The loss of every case, float32 `[batch]`, in nats per answer token of the case.

    `kl` is KL(exact || edited) at every answer token; `ce` the cross-entropy of the answers, as in the paper; `both`
    their sum. Cross-entropy rewards an answer for being likely even where the exact reference finds it unlikely, so it
    is not the default.
    """
    edited = edited_log_probabilities(backbone, prepared, settings)
    weights = torch.where(prepared.no_harm, no_harm_weight, 1.0)
    losses = torch.zeros_like(weights)
    if objective in ("kl", "both"):
        losses = losses + token_kl(prepared.teacher, edited)
    if objective in ("ce", "both"):
        answers = [token for case in prepared.cases for _, answer in case.queries for token in answer]
        losses = losses - edited.gather(1, torch.tensor(answers, device=edited.device)[:, None])[:, 0]
    parts = zip((losses * weights).split(prepared.answers), weights.split(prepared.answers), strict=True)
    # A case whose queries all weigh nothing has no loss, rather than none that is a number.
    return torch.stack([loss.sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny) for loss, weight in parts])


def token_kl(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) at every place, `[answers]`, in nats, from log-probabilities `[answers, vocabulary]`."""
    return (exact.exp() * (exact - other)).sum(dim=-1)


def _forward(
    backbone: Backbone,
    tokens: Sequence[Sequence[int]] | torch.Tensor,
    positions: torch.Tensor,
    cache: Any,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The decoder with the adapter off, last hidden states `[batch, tokens, hidden]`; gradients flow through the cache.

    `positions` are whole numbers, `[tokens]` for all rows or `[batch, tokens]`.
    """
    output = backbone.model.base_model(
        input_ids=torch.as_tensor(tokens, device=backbone.device),
        position_ids=torch.atleast_2d(positions).to(device=backbone.device, dtype=torch.long),
        attention_mask=attention_mask,
        past_key_values=cache,
        use_cache=True,
    )
    hidden: torch.Tensor = output.last_hidden_state
    return hidden


def _states(cache: DynamicCache) -> list[KeyValue]:
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[misc, union-attr]
