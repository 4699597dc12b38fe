"""What a session shows is what its model read, whatever the tokenizer does to text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kveraser.measure.probes import default_secrets, mentions
from kveraser.model.backbone import Backbone
from kveraser.session.answer import question_tokens
from kveraser.session.session import Session
from kveraser.text.chat import added_text
from kveraser.text.spans import Text
from kveraser.text.tokenized import encode
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer

MARKERS = ("<unk>", "<s>", "</s>")
LETTERS = "▁,.?:\n123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def llama_2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def always(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)


def first(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first", split=False)])


def never(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


def sentencepiece(prefixed: Callable[[Tokenizer], None]) -> Backbone:
    vocabulary = {token: index for index, token in enumerate((*MARKERS, *LETTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    prefixed(tokenizer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(list(MARKERS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert len(vocabulary) <= VOCABULARY
    return Backbone(tiny_model("llama"), fast, name="tiny-sentencepiece")


@pytest.mark.parametrize("prefixed", [llama_2, always, first, never])
def test_appended_text_is_read_as_it_is_shown(prefixed: Callable[[Tokenizer], None]) -> None:
    backbone = sentencepiece(prefixed)
    session = Session(backbone, text="There are 12")
    for added in ("34 crates, un", "loaded", " by now"):
        session.append(added)
    assert session.text == "There are 1234 crates, unloaded by now" == backbone.tokenizer.decode(session.live_tokens)
    session.erase("crates, unloaded", method="recompute")
    assert session.text == "There are 1234  by now" == backbone.tokenizer.decode(session.live_tokens)


@pytest.mark.parametrize("prefixed", [llama_2, always, first])
def test_questions_and_served_text_go_on_without_a_space(prefixed: Callable[[Tokenizer], None]) -> None:
    backbone = sentencepiece(prefixed)
    session = Session(backbone, text="There are 12")
    question = question_tokens(session.state, "How many?")
    shown = backbone.tokenizer.decode([*session.live_tokens, *question.tokens])
    assert shown == session.text + question.text
    assert added_text(backbone.tokenizer, question.text).tokens == tuple(question.tokens)
    # A beginning keeps the space that the model was trained with.
    assert backbone.tokenizer.convert_ids_to_tokens(session.live_tokens[:1]) == ["▁"]


@pytest.mark.parametrize("prefixed", [llama_2, always, first])
def test_a_filler_is_read_without_a_space(prefixed: Callable[[Tokenizer], None]) -> None:
    backbone = sentencepiece(prefixed)
    session = Session(backbone, text="There are 1234 crates")
    ((start, end),) = session.erase("1234", method="blank('ab')").spans
    tokens = session.transcript.tokens
    filler = backbone.tokenizer.convert_tokens_to_ids(["a", "b"])
    fresh = backbone.prefill([*tokens[:start], *filler, *filler])
    assert end - start == 4
    for mine, its in zip(session.cache.read(start, end), fresh.read(start, end), strict=True):
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefixed", [llama_2, always, first])
def test_text_behind_a_marker_is_read_as_when_rendered_whole(prefixed: Callable[[Tokenizer], None]) -> None:
    tokenizer = sentencepiece(prefixed).tokenizer
    whole, _ = encode(tokenizer, "abc</s>def")
    added, offsets = encode(tokenizer, "bc</s>def", follows=True)
    assert whole[-len(added) :] == added
    assert offsets[-1][1] == len("bc</s>def")


def unlike(normalizer: Any = None, trimmed: bool = False) -> Backbone:
    fast = tiny_tokenizer(chat=False)
    backend = fast.backend_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    if trimmed:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return Backbone(tiny_model("llama"), fast, name="tiny-unlike")


ODD = (
    unicodedata.normalize("NFD", "Le café de Zoë est fermé à Orléans."),
    "e\u0301\u0323 and  e\u0301\u0301, twice",
    "  two spaces  in  front and behind  ",
    "\u0301an accent alone, one at the end: a\u0301",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 and a flag \U0001f1eb\U0001f1f7\ufe0f.",
    "\ufeffa mark of its encoding\r\nand a line\r\n\r\n",
    "Hangul \u1112\u1161\u11ab, joined\u200b \u200d\u00a0 by nothing",
    "word" * 100,
)


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()])
@pytest.mark.parametrize("trimmed", [False, True])
def test_the_text_is_what_was_given(normalizer: Any, trimmed: bool) -> None:
    backbone = unlike(normalizer, trimmed)
    for text in ODD:
        session = Session(backbone, text=text)
        session.append(text)
        assert session.text == text + text
        offsets: Sequence[tuple[int, int]] = session.transcript.offsets
        starts, ends = zip(*offsets, strict=True)
        assert list(starts) == sorted(starts) and list(ends) == sorted(ends)


@pytest.mark.parametrize("trimmed", [False, True])
def test_what_was_erased_is_gone_with_its_accents(trimmed: bool) -> None:
    backbone = unlike(normalizers.NFC(), trimmed)
    text = unicodedata.normalize("NFD", "Ask Zoë for the key. Then go to Orléans at once.")
    session = Session(backbone, text=text)
    receipt = session.erase(Text(unicodedata.normalize("NFD", "go to Orléans")), method="recompute")
    (erased,) = receipt.text
    assert session.text == text.replace(erased, "") and erased.strip() in text
    named = default_secrets(erased, session.text)
    assert named == ["Orléans"]
    assert mentions(erased, named[0]) and not mentions(session.text, named[0])


def test_a_secret_that_stands_elsewhere_with_other_accents_is_none() -> None:
    composed, apart = "Orléans 45000", unicodedata.normalize("NFD", "Orléans")
    assert default_secrets(composed, f"the train to {apart}") == ["45000"]


@pytest.mark.parametrize("prefixed", [llama_2, always, never])
def test_a_kept_answer_keeps_the_space_that_it_begins_with(
    prefixed: Callable[[Tokenizer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = sentencepiece(prefixed)
    said = iter(backbone.tokenizer.convert_tokens_to_ids([*"▁in▁all", "</s>"]))

    def logits(cache: Any, tokens: Sequence[int], **_: Any) -> torch.Tensor:
        backbone.extend(cache, tokens)
        return torch.nn.functional.one_hot(torch.tensor([next(said)]), VOCABULARY).float()

    monkeypatch.setattr(backbone, "logits", logits)
    session = Session(backbone, text="There are 12")
    answer = session.ask("How many?", keep=True)
    assert answer.text.strip() == "in all"
    assert session.text == backbone.tokenizer.decode(session.live_tokens)
    assert session.text.endswith("Answer: in all")
