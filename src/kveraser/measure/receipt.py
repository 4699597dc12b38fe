"""The receipt of an erase and its audit. Definitions: docs/measures.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

ProbeKind = Literal["influence", "leak", "no_harm"]


@dataclass(frozen=True)
class TokenKL:
    """A token of a forced answer: the text it adds, and KL(exact || cache) at its prediction, in nats."""

    text: str
    kl: float
    kl_unerased: float


@dataclass(frozen=True)
class ProbeResult:
    """Results of one probe. KL in nats per answer token; log-probabilities are means over answer tokens."""

    question: str
    kind: ProbeKind
    answer: str
    edited_answer: str
    tokens: int
    kl: float
    kl_unerased: float
    kl_hole: float | None
    log_probability_exact: float
    log_probability_edited: float
    reproduced: bool
    reproduced_exact: bool
    by_token: tuple[TokenKL, ...] = ()


@dataclass(frozen=True)
class Audit:
    """Results of an audit, over all probes of each kind.

    Attributes:
        kl: mean KL(exact || edited) over influence probes, nats per answer token; None without such probes.
        kl_unerased: the same for the unerased cache.
        fidelity: 1 - kl / kl_unerased, from sums; 1 is exact, 0 no better than not erasing, negative worse. None when
            the span has no influence on the probes.
        fidelity_low, fidelity_high: 95% bootstrap interval over probes.
        leak: mean log-probability per token of the erased text, edited minus exact, in nats.
        leak_rate: rate at which greedy answers reveal a secret of the span, edited minus exact.
        no_harm: mean KL(exact || edited) over no-harm probes.
        kl_hole: mean KL of the remaining tokens prefilled at the cache's positions: the bound of every method that
            keeps these positions. None where they have no gap.
        probes: results of the single probes.
    """

    kl: float | None
    kl_unerased: float | None
    fidelity: float | None
    fidelity_low: float | None
    fidelity_high: float | None
    leak: float | None
    leak_rate: float | None
    no_harm: float | None
    kl_hole: float | None
    probes: tuple[ProbeResult, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the attributes' names as keys."""
        return asdict(self)


@dataclass(frozen=True)
class Receipt:
    """The record of an erase.

    Attributes:
        method: its name.
        parameters: its parameters by name.
        exact: the cache equals a fresh prefill of the remaining tokens.
        spans: erased token ranges of the transcript, `[start, end)`.
        text: the text of each, snapped outwards to whole tokens.
        erased: tokens erased.
        recomputed: tokens run through the backbone.
        seconds: wall-clock time of the erase.
        bytes_written: bytes of keys and values written or moved.
        undo_bytes: bytes kept so that `undo` can restore every bit.
        next_position: position of the next token.
        audit: set by `Session.audit`.
        requested: the requested method with its parameters, where `recompute` ran instead; else None.
        reason: why `recompute` ran instead.
        inserted: tokens inserted.
        inserted_text: the text of each insertion.
    """

    method: str
    parameters: dict[str, Any]
    exact: bool
    spans: tuple[tuple[int, int], ...]
    text: tuple[str, ...]
    erased: int
    recomputed: int
    seconds: float
    bytes_written: int
    undo_bytes: int
    next_position: int
    audit: Audit | None = None
    requested: str | None = None
    reason: str | None = None
    inserted: int = 0
    inserted_text: tuple[str, ...] = ()

    def moved(self, index: int, count: int) -> Receipt:
        """A copy whose spans count `count` tokens more from token `index` on."""
        spans = tuple((start + count, end + count) if start >= index else (start, end) for start, end in self.spans)
        return self if spans == self.spans else replace(self, spans=spans)

    def with_audit(self, audit: Audit) -> Receipt:
        """A copy with `audit`."""
        return replace(self, audit=audit)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary with the attributes' names as keys."""
        return asdict(self)
