"""`erratum`: leave the cache as it is and append words that take the span back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.cache.editable import NO_TOKEN, EditableCache
from kveraser.errors import MethodError
from kveraser.methods.base import Method, clear_tokens
from kveraser.methods.slots import slot_tokens
from kveraser.model.backbone import Backbone
from kveraser.text.chat import as_turn, has_template
from kveraser.text.spans import Span
from kveraser.text.tokenized import encode

QUOTED_WORDS = 24


@dataclass(frozen=True)
class Erratum(Method):
    """Append a notice that asks the model to disregard the span, which stays readable. A baseline, not a safe erase.

    Args:
        wording: the notice; `{quote}` is replaced by the span's text, shortened in the middle if long.
    """

    wording: str = 'Correction: disregard the following part of the text above, it is not valid: "{quote}".'

    name = "erratum"
    summary = "keep all, append a notice that takes the span back"
    cost = "notice tokens"
    source = "arXiv:2606.17107"
    removes_text = False

    def __post_init__(self) -> None:
        if not isinstance(self.wording, str) or not self.wording.strip():
            raise MethodError(f"erratum: wording is {self.wording!r}, but it must be text")

    def __call__(self, backbone: Backbone, cache: EditableCache, tokens: Sequence[int], span: Span) -> int:
        tokenizer = backbone.tokenizer
        ids = slot_tokens(cache, tokens)
        words = tokenizer.decode(ids[span.start : span.end], skip_special_tokens=True).split()
        if len(words) > QUOTED_WORDS:
            words = [*words[: QUOTED_WORDS // 2], "...", *words[-QUOTED_WORDS // 2 :]]
        notice = self.wording.replace("{quote}", " ".join(words))
        last = next((token for token in reversed(ids) if token != NO_TOKEN and tokenizer.decode(token).strip()), None)
        if has_template(tokenizer) and last in tokenizer.all_special_ids:
            # The last turn is closed, and a chat model ignores text outside turns.
            notice = as_turn(tokenizer, {"role": "user", "content": notice})
        else:
            notice = f"\n\n{notice}"
        appended, _ = encode(tokenizer, notice, follows=True)
        cache.mark_inexact(span.start)
        backbone.extend(cache, appended)
        clear_tokens(cache, span)
        return len(appended)

    def estimate(self, prefix: int, span: int, suffix: int) -> int:
        return min(span, QUOTED_WORDS * 2) + 20
