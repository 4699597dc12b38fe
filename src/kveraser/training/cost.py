"""Computation and memory of a case, from the sizes of model and case."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from kveraser.model.support import check_model
from kveraser.steering.eraser import Eraser, EraserSettings
from kveraser.steering.layouts import LAYOUTS
from kveraser.training.cases import TokenizedCase
from kveraser.training.recipe import Recipe

ADAPTER_BYTES = 16
"""Bytes per trainable parameter: float32 value, gradient, and two averages of AdamW."""
LOGIT_COPIES = 6
"""Float32 values per logit: the teacher's, the edited cache's logits, float32 copy and log-probabilities, and two terms
of the divergence."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that determine the cost.

    Attributes:
        parameters: parameters of the backbone, tied ones once.
        linear: weights of the decoder's linear layers, without embeddings and output head.
        trainable: parameters of the eraser.
        adapter: parameters of the LoRA matrices.
    """

    parameters: int
    linear: int
    trainable: int
    adapter: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocabulary: int
    positions: int | None

    def kv_bytes(self, tokens: float, width: int) -> float:
        """Bytes of keys and values of `tokens` slots in all layers, `width` bytes per value."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width * tokens

    def forward_flops(self, tokens: float, context: float) -> float:
        """FLOPs of a pass of `tokens` over a cache of `context` slots.

        Two per weight and token, and two matrix products of attention per layer. Masked positions are counted.
        """
        return 2 * self.linear * tokens + self.attention_flops(tokens, context)

    def attention_flops(self, tokens: float, context: float) -> float:
        """The part of `forward_flops` that depends on the context."""
        return 4 * self.layers * self.heads * self.head_dim * tokens * (context + tokens)

    def backward_flops(self, tokens: float, context: float) -> float:
        """FLOPs of the backward pass with frozen weights: as the forward pass, with the attention twice."""
        return self.forward_flops(tokens, context) + self.attention_flops(tokens, context)

    def head_flops(self, answers: float) -> float:
        """FLOPs of the logits of `answers` tokens."""
        return 2 * self.hidden * self.vocabulary * answers


@dataclass(frozen=True)
class CaseShape:
    """Number of tokens of prefix, span and suffix, of all queries, and of compared answer tokens.

    Tokens that several queries begin with are counted for each, although they run once.
    """

    prefix: float
    span: float
    suffix: float
    queried: float
    answers: float

    @property
    def tokens(self) -> float:
        """Number of tokens of context and queries."""
        return self.prefix + self.span + self.suffix + self.queried


@dataclass(frozen=True)
class Part:
    """Memory of one part, in bytes."""

    part: str
    bytes: int


def model_shape(config: Any, recipe: Recipe, settings: EraserSettings) -> ModelShape:
    """Count the sizes of a backbone and its eraser on a model on the meta device.

    Raises:
        UnsupportedModelError: the backbone's layers can't be edited exactly.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        check_model(model, recipe.backbone)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        linear = sum(
            parameter.numel()
            for module in model.base_model.modules()
            if not isinstance(module, torch.nn.Embedding)
            for parameter in module.parameters(recurse=False)
            if parameter.dim() == 2
        )
        # Heads are read off a cache, because some configurations name heads that the model does not use.
        token = torch.zeros(1, 1, dtype=torch.long)
        # With an explicit 4D mask, the model inspects no mask values.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        cache = model.base_model(
            input_ids=token, position_ids=token, attention_mask=mask, use_cache=True
        ).past_key_values
        adapter = recipe.adapter
        eraser = Eraser.untrained(model, adapter.rank, adapter.alpha)
    text = config.get_text_config(decoder=True)
    extras = LAYOUTS[settings.layout].extras(settings.slots, text.hidden_size)
    adapted = sum(parameter.numel() for parameter in eraser.parameters().values())
    _, kv_heads, _, head_dim = cache.layers[0].keys.shape
    return ModelShape(
        parameters=parameters,
        linear=linear,
        trainable=adapted + sum(prod(size) for size in extras.values()),
        adapter=adapted,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def case_shape(case: TokenizedCase) -> CaseShape:
    """Count the tokens of a case. The last token of an answer is compared, but not run."""
    return CaseShape(
        prefix=len(case.prefix),
        span=len(case.span),
        suffix=len(case.suffix),
        queried=sum(len(prompt) + len(answer) - 1 for prompt, answer in case.queries),
        answers=sum(len(answer) for _, answer in case.queries),
    )


def passes(case: CaseShape, settings: EraserSettings) -> tuple[float, float, float, float]:
    """Return the steering states, the slots they attend to, the repaired tokens, and the slots of the edited cache."""
    p, m, s = case.prefix, case.span, case.suffix
    window = min(settings.window(round(m)), s)
    layout = LAYOUTS[settings.layout]
    states = layout.states(m, settings.slots)
    return states, layout.attended(p, m), window, p + states + s


def case_flops(shape: ModelShape, case: CaseShape, settings: EraserSettings) -> dict[str, float]:
    """FLOPs of one case by phase.

    `prefill`: the contaminated context. `teacher`: the suffix after the prefix, and the queries after both. `steering`:
    the steering pass, backward pass and adapter gradients. `repair`: the first suffix tokens, with backward pass.
    `queries`: the queries after the edited cache, with backward pass.
    """
    p, m, s, q = case.prefix, case.span, case.suffix, case.queried
    steering, seen, window, edited = passes(case, settings)

    def both_ways(tokens: float, before: float) -> float:
        return shape.forward_flops(tokens, before) + shape.backward_flops(tokens, before)

    return {
        "prefill": shape.forward_flops(p + m + s, 0),
        "teacher": shape.forward_flops(s, p) + shape.forward_flops(q, p + s) + shape.head_flops(case.answers),
        "steering": both_ways(steering, seen) + 6 * shape.adapter * steering,
        "repair": both_ways(window, edited - s),
        "queries": both_ways(q, edited) + 2 * shape.head_flops(case.answers),
    }


def memory(
    shape: ModelShape, case: CaseShape, settings: EraserSettings, width: int, batch: int = 1, copies: int = 1
) -> list[Part]:
    """Memory at the start of the backward pass of `batch` such cases, by part; the last row is the total.

    `weights`: `copies` of the backbone, `width` bytes a value. `adapter`: `ADAPTER_BYTES` a parameter. `kv`: the
    prefilled context, the states that the steering and repair passes read and write, and the edited context with the
    queries. `activations`: see `activation_bytes`. `logits`: `LOGIT_COPIES` float32 values a logit.
    """
    steering, seen, window, edited = passes(case, settings)
    slots = (case.prefix + case.span + case.suffix) + (seen + steering) + (edited + case.queried)
    if window:
        slots += edited - case.suffix + window
    parts = {
        "weights": copies * shape.parameters * width,
        "adapter": shape.trainable * ADAPTER_BYTES,
        "kv": batch * shape.kv_bytes(slots, width),
        "activations": batch * activation_bytes(shape, case, settings, width),
        "logits": batch * LOGIT_COPIES * 4 * case.answers * shape.vocabulary,
    }
    rows = [Part(part, round(size)) for part, size in parts.items()]
    return [*rows, Part("total", sum(row.bytes for row in rows))]


def activation_bytes(shape: ModelShape, case: CaseShape, settings: EraserSettings, width: int) -> float:
    """Bytes that a case keeps for its backward pass, in a decoder with gated MLPs and RMS norms.

    Each token keeps in each layer: the inputs of two norms in float32, queries and outputs of attention, and three
    intermediate values of the MLP. With the adapter on, it also keeps the float32 inputs of the seven projections, as
    copies in half precision, shared in float32. With grouped heads, the masked pass of the queries keeps repeated keys
    and values.
    """
    attention = shape.heads * shape.head_dim
    steering, _, window, edited = passes(case, settings)
    tokens = steering + window + case.queried
    per_token = 4 * 2 * shape.hidden + width * (2 * attention + 3 * shape.intermediate)
    inputs = 2 * shape.hidden if width == 4 else 5 * shape.hidden + attention
    under_adapter = 4 * (inputs + shape.intermediate)
    repeated = 2 * attention * width * (edited + case.queried) if shape.heads > shape.kv_heads else 0
    return shape.layers * (tokens * per_token + steering * under_adapter + repeated)
