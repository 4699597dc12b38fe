"""The training objective: answers from the edited cache should match those from the exact reference.

Gradients reach the eraser only. Cases of one shape (equal lengths of prefix, span and suffix) form a batch without
padding of contexts. Each context is prefilled once; exact reference, contaminated suffix and steering states share the
prefix. All queries of a case run in one forward pass, each attending to the context and itself.
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
"""Nats: well above 16-bit rounding, well below the effect of a different scale of the logits."""

Shape = tuple[int, int, int]
"""Number of tokens of prefix, span and suffix."""

Prefills = dict[tuple[int, ...], list[KeyValue]]
"""States of unerased contexts by their tokens: `(keys, values)` per layer, `[1, kv_heads, tokens, head_dim]`."""


def shape(case: TokenizedCase) -> Shape:
    """Return the shape of a case; cases of one batch have equal shapes."""
    return len(case.prefix), len(case.span), len(case.suffix)


def context(case: TokenizedCase) -> tuple[int, ...]:
    """Return the tokens of the unerased context."""
    return (*case.prefix, *case.span, *case.suffix)


@dataclass(frozen=True)
class PreparedBatch:
    """The part of a batch that does not depend on the eraser, computed once without gradients.

    Attributes:
        cases: cases of one shape.
        states: unerased contexts, `(keys, values)` per layer, `[batch, kv_heads, tokens, head_dim]`.
        hidden: last hidden states of the exact reference at every answer token, `[answers, hidden]`, ordered by case
            and query.
        teacher: log-probabilities of the same, float32 `[answers, vocabulary]`.
        unerased: KL(exact || unerased) at every answer token, float32 `[answers]`, in nats; None if not measured.
    """

    cases: tuple[TokenizedCase, ...]
    states: list[KeyValue]
    hidden: torch.Tensor
    teacher: torch.Tensor
    unerased: torch.Tensor | None = None

    @property
    def prefix(self) -> list[KeyValue]:
        """States of the prefixes, as views."""
        return self._slots(0, shape(self.cases[0])[0])

    @property
    def before(self) -> list[KeyValue]:
        """States of prefixes and spans, as views."""
        return self._slots(0, sum(shape(self.cases[0])[:2]))

    @property
    def suffix(self) -> list[KeyValue]:
        """States of the contaminated suffixes at their old positions, as views."""
        return self._slots(sum(shape(self.cases[0])[:2]), None)

    def _slots(self, start: int, end: int | None) -> list[KeyValue]:
        return [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in self.states]

    @property
    def answers(self) -> list[int]:
        """Number of answer tokens of every case."""
        return [sum(len(answer) for _, answer in case.queries) for case in self.cases]

    @property
    def no_harm(self) -> torch.Tensor:
        """Whether each answer token belongs to a query that does not depend on the span, bool `[answers]`."""
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
        return sum(tensor.nbytes for tensor in (self.teacher, *(one for pair in self.states for one in pair)))


def prepare(
    backbone: Backbone,
    cases: Sequence[TokenizedCase],
    measure_unerased: bool = False,
    prefills: Prefills | None = None,
    reference: torch.Tensor | None = None,
) -> PreparedBatch:
    """Prefill cases of one shape and compute the exact reference of their queries.

    Args:
        measure_unerased: compare with the unerased cache as well, for fidelity.
        prefills: states of contexts that several cases share, from `shared_prefills`.
        reference: last hidden states of the exact reference, if known (see `exact_reference`).
    """
    p, m, s = shape(cases[0])
    n = p + m + s
    queries = [case.queries for case in cases]
    with torch.no_grad():
        states = _prefilled(backbone, [context(case) for case in cases], prefills or {})
        if reference is None:
            cache = concat_kv([(keys[:, :, :p], values[:, :, :p]) for keys, values in states])
            if s:
                _forward(backbone, [case.suffix for case in cases], torch.arange(p, p + s), cache)
            reference = answer_hidden(backbone, cache, p + s, p + s, queries)
        teacher = log_probabilities(backbone, reference)
        unerased = None
        if measure_unerased:
            unerased = token_kl(teacher, answer_log_probabilities(backbone, concat_kv(states), n, n, queries))
    return PreparedBatch(tuple(cases), states, reference, teacher, unerased)


def exact_reference(backbone: Backbone, cases: Sequence[TokenizedCase]) -> torch.Tensor:
    """Compute `PreparedBatch.hidden` from a separate prefill of prefix and suffix."""
    exact = [(*case.prefix, *case.suffix) for case in cases]
    with torch.no_grad():
        cache = concat_kv(_prefilled(backbone, exact, {}))
        return answer_hidden(backbone, cache, len(exact[0]), len(exact[0]), [case.queries for case in cases])


def shared_prefills(backbone: Backbone, cases: Sequence[TokenizedCase]) -> Prefills:
    """Prefill each context that several of `cases` share, as for several spans of one text."""
    contexts = [context(case) for case in cases]
    repeated = {tokens for tokens in contexts if contexts.count(tokens) > 1} if len(set(contexts)) < len(cases) else ()
    with torch.no_grad():
        return {tokens: _prefilled(backbone, [tokens], {}) for tokens in repeated}


def _prefilled(backbone: Backbone, contexts: Sequence[tuple[int, ...]], prefills: Prefills) -> list[KeyValue]:
    """States of contexts of one length, `(keys, values)` per layer, `[batch, kv_heads, tokens, head_dim]`."""
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

    The layout runs the same code as in `kveraser` and `kveraser+repair`, on concatenated states.
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
    """A `kveraser.steering.layouts.Store` of a prepared batch, out of place, so that gradients flow through all parts.

    Attributes:
        steering: steering states, `(keys, values)` per layer.
        suffix: states of the suffix, `(keys, values)` per layer.
        start: position of the first suffix token.
    """

    def __init__(self, backbone: Backbone, prepared: PreparedBatch) -> None:
        p, m, _ = shape(prepared.cases[0])
        self.backbone, self.prepared = backbone, prepared
        self.span_positions = torch.arange(p, p + m, dtype=torch.float64)
        self.steering, self.suffix, self.start = list[KeyValue](), prepared.suffix, p + m

    def run_span(self, positions: torch.Tensor) -> None:
        """Compute the steering states of the span's tokens, which attend to the prefix."""
        spans = [case.span for case in self.prepared.cases]
        self.steering = run_eraser(self.backbone, concat_kv(self.prepared.prefix), positions, tokens=spans)

    def run_slots(self, embeddings: torch.Tensor, positions: torch.Tensor) -> None:
        """Compute the steering states of embeddings, which attend to prefix and span."""
        before = concat_kv(self.prepared.before)
        self.steering = run_eraser(self.backbone, before, positions, embeddings=embeddings)

    def close_gap(self) -> None:
        """Re-rotate the suffix keys by minus the span's length."""
        m = len(self.span_positions)
        keys = self.backbone.rotation.rotate([keys for keys, _ in self.suffix], -m)
        self.suffix = [(key, value) for key, (_, value) in zip(keys, self.suffix, strict=True)]
        self.start -= m


def answer_log_probabilities(
    backbone: Backbone, cache: Any, slots: int, position: int, queries: Sequence[Sequence[Pair]]
) -> torch.Tensor:
    """Log-probabilities at the positions of `answer_hidden`, float32 `[answers, vocabulary]`."""
    return log_probabilities(backbone, answer_hidden(backbone, cache, slots, position, queries))


def log_probabilities(backbone: Backbone, hidden: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of last hidden states `[tokens, hidden]`, float32 `[tokens, vocabulary]`.

    Logits are scaled and capped as in the model's forward pass: Granite divides by `logits_scaling`, Cohere multiplies
    by `logit_scale`, Gemma 2 and later cap at `final_logit_softcapping`.
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
    """Check that `log_probabilities` gives the logits of the model's own forward pass.

    Raises:
        TrainingError: they differ; the message gives the difference.
    """
    tokens = torch.arange(4, device=backbone.device)[None]
    with torch.no_grad():
        own = backbone.model(input_ids=tokens).logits[0].float().log_softmax(dim=-1)
        ours = log_probabilities(backbone, backbone.model.base_model(input_ids=tokens).last_hidden_state[0])
    difference = float((own - ours).abs().max())
    if difference > HEAD_TOLERANCE:
        raise TrainingError(
            f"{backbone.name} computes its logits in a way that training does not support: log-probabilities differ by "
            f"up to {difference:.2g}: train an eraser for another backbone"
        )


def answer_hidden(
    backbone: Backbone, cache: Any, slots: int, position: int, queries: Sequence[Sequence[Pair]]
) -> torch.Tensor:
    """Run all queries of every case in one pass over a cache; queries do not attend to each other.

    Args:
        cache: a cache of `slots` slots, one row per case; the pass appends to it.
        position: first position of every query.
        queries: queries of every case.

    Returns:
        Last hidden states that predict the answer tokens, `[answers, hidden]`, ordered by case and query.
    """
    packs = [pack(pairs, slots, position, shared=True) for pairs in queries]
    longest = max(len(packed.tokens) for packed in packs)
    tokens = torch.zeros(len(packs), longest, dtype=torch.long)
    positions = torch.full((len(packs), longest), position, dtype=torch.long)
    visible = torch.zeros(len(packs), longest, slots + longest, dtype=torch.bool)
    # Padding is last, so no query attends to it; it attends to the context, because an empty row would be NaN.
    visible[:, :, :slots] = True
    kept = []
    for row, packed in enumerate(packs):
        length = len(packed.tokens)
        tokens[row, :length] = torch.tensor(packed.tokens)
        positions[row, :length] = packed.positions
        visible[row, :length, : slots + length] = packed.visible
        kept.append(row * longest + packed.kept)
    hidden = _forward(backbone, tokens, positions, cache, backbone.attention_mask(visible))
    # The vocabulary projection runs at compared tokens only.
    return hidden.flatten(0, 1)[torch.cat(kept).to(hidden.device)]


def case_losses(
    backbone: Backbone, prepared: PreparedBatch, settings: EraserSettings, objective: Objective, no_harm_weight: float
) -> torch.Tensor:
    """The loss of every case, float32 `[batch]`, in nats per answer token of the case.

    `kl` is KL(exact || edited) at every answer token, `ce` the cross-entropy of the answers as in the paper, and `both`
    their sum. Cross-entropy rewards likely answers even if the exact reference finds them unlikely, so it is not the
    default.
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
    # If all weights of a case are zero, its loss is zero instead of NaN.
    return torch.stack([loss.sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny) for loss, weight in parts])


def token_kl(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) in nats, `[answers]`, from log-probabilities `[answers, vocabulary]`."""
    return (exact.exp() * (exact - other)).sum(dim=-1)


def _forward(
    backbone: Backbone,
    tokens: Sequence[Sequence[int]] | torch.Tensor,
    positions: torch.Tensor,
    cache: Any,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the decoder with the adapter off; gradients flow through the cache.

    `positions` are integers, `[tokens]` for all rows or `[batch, tokens]`. Returns the last hidden states, `[batch,
    tokens, hidden]`.
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
