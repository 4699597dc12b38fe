"""`kveraser demo`: four real documents, every method, the answers before and after, and what each erase cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kveraser.demo.documents import Document
from kveraser.errors import EraserError
from kveraser.measure.audit import References
from kveraser.measure.packing import greedy_together
from kveraser.measure.probes import Probe
from kveraser.measure.receipt import Audit, Receipt
from kveraser.methods import make_method
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.chat import question_text
from kveraser.text.spans import selector_from_json
from kveraser.text.template import mentions

ANSWER_TOKENS = 24


@dataclass(frozen=True)
class MethodResult:
    """One method on one document: its receipt with the audit, or why it was not run."""

    method: str
    receipt: Receipt | None
    missing: str | None = None

    @property
    def audit(self) -> Audit:
        """The audit of a method that was run."""
        assert self.receipt is not None and self.receipt.audit is not None
        return self.receipt.audit

    def to_json(self) -> dict[str, Any]:
        """A table row; the answers are in the order of the document's questions."""
        row: dict[str, Any] = {"method": self.method, "missing": self.missing}
        if self.receipt is None:
            return row
        return row | {
            "exact": self.receipt.exact,
            "seconds": self.receipt.seconds,
            "recomputed": self.receipt.recomputed,
            "kl": self.audit.kl,
            "kl_unerased": self.audit.kl_unerased,
            "fidelity": self.audit.fidelity,
            "kl_hole": self.audit.kl_hole,
            "no_harm": self.audit.no_harm,
            "leak": self.audit.leak,
            "answers": [probe.edited_answer for probe in self.audit.probes if probe.kind != "leak"],
        }


@dataclass(frozen=True)
class DocumentResult:
    """One document: the answers before the erase and by exact recomputation, and every method's result."""

    document: Document
    tokens: int
    erased: int
    prefill_seconds: float
    before: tuple[str, ...]
    exact: tuple[str, ...]
    results: tuple[MethodResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The document's name, sizes, questions and answers, with the methods under `rows`."""
        return {
            "document": self.document.name,
            "tokens": self.tokens,
            "erased": self.erased,
            "prefill_seconds": self.prefill_seconds,
            "questions": [asked.question for asked in [*self.document.questions, *self.document.unrelated]],
            "before": list(self.before),
            "exact": list(self.exact),
            "rows": [result.to_json() for result in self.results],
        }


def run_document(
    backbone: Backbone, document: Document, methods: Sequence[str], progress: Callable[[str], None] | None = None
) -> DocumentResult:
    """Prefill one document, ask, and erase by every method in turn, undoing each.

    Args:
        methods: names for `make_method`, an exact one among them; those that need another eraser than is
            loaded are reported as missing.
    """
    say = progress or (lambda _: None)
    say(f"{document.title}: reading")
    started = time.perf_counter()
    # A template without tools would leave them out and warn: the demo's calls are readable without.
    tools = document.tools if document.tools and mentions(backbone.tokenizer, "tools") else None
    session = Session(backbone, text=document.context, messages=document.messages, tools=tools)
    prefill_seconds = time.perf_counter() - started
    span = selector_from_json(document.erase)
    erased_text = session.find(span)[0][1]
    probes = [
        *(Probe(asked.question) for asked in document.questions),
        *(Probe(asked.question, "no_harm") for asked in document.unrelated),
        Probe(f'Repeat what was said: "{" ".join(erased_text.split()[:6])}"', "leak", erased_text),
    ]
    before = _ask_together(session, [probe.question for probe in probes if probe.kind != "leak"])
    references: References | None = None
    results: list[MethodResult] = []
    for name in methods:
        try:
            method = make_method(name).resolve(backbone)
        except EraserError as error:
            none = "needs a trained eraser: pass --eraser FOLDER"
            results.append(MethodResult(name, None, none if backbone.eraser is None else str(error)))
            continue
        say(f"{document.title}: {name}")
        session.erase(span, method, force=True)
        references = references or session.references()
        session.audit(probes, references=references, answer_tokens=ANSWER_TOKENS)
        results.append(MethodResult(name, session.receipts[-1]))
        session.undo()
    exact = next(result for result in results if result.receipt is not None and result.receipt.exact)
    assert exact.receipt is not None
    return DocumentResult(
        document=document,
        tokens=len(session.transcript.tokens),
        erased=exact.receipt.erased,
        prefill_seconds=prefill_seconds,
        before=before,
        exact=tuple(probe.answer for probe in exact.audit.probes if probe.kind != "leak"),
        results=tuple(results),
    )


def _ask_together(session: Session, questions: Sequence[str]) -> tuple[str, ...]:
    """The answers of `session.ask` to each question, decoded side by side."""
    tokenizer, backbone = session.backbone.tokenizer, session.backbone
    prompts = [
        backbone.tokenize(question_text(tokenizer, question, session.turn_open), follows=True)[0]
        for question in questions
    ]
    answers = greedy_together(backbone, session.cache, prompts, ANSWER_TOKENS)
    return tuple(tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers)


def summarize(results: Sequence[DocumentResult]) -> list[dict[str, Any]]:
    """One row a method over all documents: seconds and tokens summed, KL and fidelity over all influence probes."""
    rows: list[dict[str, Any]] = []
    for position, first in enumerate(results[0].results):
        runs = [result.results[position] for result in results]
        receipts = [run.receipt for run in runs if run.receipt is not None]
        if len(receipts) < len(runs):
            rows.append({"method": first.method, "missing": first.missing})
            continue
        probes = [probe for run in runs for probe in run.audit.probes if probe.kind == "influence"]
        tokens = sum(probe.tokens for probe in probes)
        kl = sum(probe.kl * probe.tokens for probe in probes)
        unerased = sum(probe.kl_unerased * probe.tokens for probe in probes)
        rows.append(
            {
                "method": first.method,
                "missing": None,
                "exact": all(receipt.exact for receipt in receipts),
                "seconds": sum(receipt.seconds for receipt in receipts),
                "recomputed": sum(receipt.recomputed for receipt in receipts),
                "kl": kl / tokens,
                "kl_unerased": unerased / tokens,
                "fidelity": 1 - kl / unerased if unerased else None,
            }
        )
    return rows
