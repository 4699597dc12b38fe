"""Inputs that look right and are not: each is understood, or refused in one sentence."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import ByT5Tokenizer

from kveraser.cli import main as cli
from kveraser.errors import BackboneError, InputError, SpanError
from kveraser.measure.case_file import read_case_file
from kveraser.model.backbone import Backbone
from kveraser.session.session import Session
from kveraser.text.spans import Message, Text, ToolCall
from kveraser.text.tokenized import encode
from kveraser.training.build import BuildSettings, build_cases
from kveraser.training.corpus import read_passages
from kveraser.training.recipe import load_recipe
from tests.sessions import EXACT, MESSAGES, TEXT, far, same, state
from tests.templates import THINKING
from tests.tiny import VOCABULARY, tiny_backbone, tiny_model, tiny_tokenizer

# Tokenizers


def test_a_slow_tokenizer_is_refused_when_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"tiny: ByT5Tokenizer is a slow tokenizer"):
        Backbone(tiny_model(), ByT5Tokenizer(), "tiny")
    tiny_model().save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is a slow tokenizer"):
        Backbone.load(tmp_path)


def with_added_tokens() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


@pytest.mark.parametrize("way", ["text", "append", "ask", "prefill", "negative", "logits"])
def test_token_ids_that_the_model_has_no_embedding_for_are_refused(way: str) -> None:
    backbone = Backbone(tiny_model(), with_added_tokens(), "tiny")
    session = Session(backbone, text=TEXT)
    before = state(session)
    with pytest.raises(InputError, match=rf"token (-3|{VOCABULARY}) is none of the {VOCABULARY} that tiny"):
        match way:
            case "text":
                Session(backbone, text="The <extra> ship")
            case "append":
                session.append(" and <extra>")
            case "ask":
                session.ask("Where is <extra>?", max_new_tokens=2)
            case "prefill":
                backbone.prefill([5, VOCABULARY])
            case "negative":
                backbone.prefill([5, -3])
            case _:
                backbone.logits(session.cache, [VOCABULARY])
    assert same(before, state(session))


def marking_tokenizer() -> Any:
    """A tokenizer without a chat template that puts its marker in front of every text."""
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "leading"), [("The ship", 1), ("<|im_start|>The ship", 1), ("<|im_start|><|im_start|>The ship", 2)]
)
def test_a_rendered_prompt_gets_no_second_beginning_marker(text: str, leading: int) -> None:
    tokens, offsets = encode(marking_tokenizer(), text, special=True)
    assert tokens[: leading + 1].count(1) == leading and len(tokens) == len(offsets)
    session = Session(Backbone(tiny_model(), marking_tokenizer()), text=text, allow_special=True)
    assert session.live_tokens == tokens


# Turns


CALLS = [{"id": "call_1", "type": "function", "function": {"name": "find", "arguments": {"what": "parcel 7718"}}}]


def thinking_session(messages: list[dict[str, Any]]) -> Session:
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = THINKING
    return Session(backbone, messages=messages)


@pytest.mark.parametrize("content", ["Let me look.", "", None])
def test_an_empty_turn_keeps_no_calls(content: str | None) -> None:
    messages = [
        {"role": "user", "content": "Where is my parcel?"},
        {"role": "assistant", "content": content, "tool_calls": CALLS},
        {"role": "tool", "tool_call_id": "call_1", "content": "It is in Rome."},
        {"role": "user", "content": "Thanks."},
    ]
    session = thinking_session(messages)
    session.erase(Message(1, keep_turn=True), "recompute")
    assert "7718" not in session.text and "Let me look" not in session.text and far(session) < EXACT
    assert "<|im_start|>assistant\n<|im_end|>" in session.text and "It is in Rome." in session.text
    session.undo()
    session.erase(ToolCall("call_1", keep_turn=True), "recompute")
    assert "7718" in session.text and "Rome" not in session.text


REASONING = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + '</call>' }}{% endfor %}"
    "{{ '[end]' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def test_an_empty_turn_keeps_no_reasoning() -> None:
    backbone = tiny_backbone()
    backbone.tokenizer.chat_template = REASONING
    said = {"role": "assistant", "content": "In Rome.", "reasoning_content": "The code is 7718."}
    messages = [{"role": "user", "content": "Where?"}, said, {"role": "user", "content": "Thanks."}]
    session = Session(backbone, messages=messages)
    session.erase(Message(1, keep_turn=True), "recompute")
    assert session.text == "[user]Where?[end][assistant][end][user]Thanks.[end]"
    session.append(messages=[said, {"role": "user", "content": "And?"}])
    session.erase(Message(-2, keep_turn=True), "recompute")
    assert "7718" not in session.text and session.text.endswith("[assistant][end][user]And?[end]")


def test_a_turn_with_no_more_than_its_content_is_emptied_of_that() -> None:
    session = Session(tiny_backbone(), messages=MESSAGES)
    assert session.find(Message(3, keep_turn=True))[0][1] == "It is in Rome, shelf 44."


# Texts


NFC = "Le café de Zoë est fermé à Orléans. Le cafe est ouvert."
NFD = unicodedata.normalize("NFD", NFC)


@pytest.mark.parametrize(("text", "wanted"), [(NFD, "café de Zoë"), (NFC, unicodedata.normalize("NFD", "café de Zoë"))])
def test_a_span_is_found_however_its_accents_are_written(text: str, wanted: str) -> None:
    session = Session(tiny_backbone(), text=text)
    ((_, found),) = session.find(wanted)
    assert found != wanted and unicodedata.normalize("NFC", found) == "café de Zoë"
    session.erase(wanted, "recompute")
    assert "Le  est fermé à Orléans. Le cafe est ouvert." in unicodedata.normalize("NFC", session.text)


def test_accents_are_not_cut_off_and_other_letters_are_not_equal() -> None:
    session = Session(tiny_backbone(), text=NFD)
    # The letter without its accent stands once, whole; inside the accented one it is another letter.
    assert session.find(Text("fermé"))[0][1] == unicodedata.normalize("NFD", "fermé")
    with pytest.raises(SpanError, match="not in the context"):
        session.find("Zoé est")
    with pytest.raises(SpanError, match="not in the context"):
        session.find("ouvért")


BOM = b"\xef\xbb\xbf"


def test_a_mark_of_the_encoding_is_no_part_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = tmp_path / "context.txt"
    context.write_bytes(BOM + TEXT.encode())
    assert cli._read(str(context)) == TEXT
    case = {"id": "a", "context": TEXT, "erase": "noon", "question": "Who is the captain?", "answers": ["Ada"]}
    cases = tmp_path / "cases.jsonl"
    cases.write_bytes(BOM + json.dumps(case).encode())
    assert len(read_case_file(cases)) == 1
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(BOM + json.dumps({"text": TEXT}).encode())
    assert [passage.startswith("The ship") for passage in read_passages(str(corpus))] == [True]
    messages = tmp_path / "messages.json"
    messages.write_bytes(BOM + json.dumps(MESSAGES).encode())
    assert cli._parse_messages(cli._read(str(messages)), str(messages)) == MESSAGES


# Builds


STORY = "The ship number {} left the harbour at noon and came back to it in the evening. "
PASSAGES = [STORY.format(number) * 3 for number in range(60)]


def test_settings_that_can_not_be_met_leave_no_mark_behind(tmp_path: Path) -> None:
    target = tmp_path / "cases.jsonl"
    with pytest.raises(InputError):
        build_cases(target, PASSAGES, BuildSettings(cases=3, context=(50_000, 60_000), span=(4, 8)))
    assert list(tmp_path.iterdir()) == []
    assert build_cases(target, PASSAGES, BuildSettings(cases=3, context=(20, 40), span=(4, 8))) == 0
    assert len(target.read_text("utf-8").splitlines()) == 3


def test_a_build_that_made_nothing_yet_blocks_no_other(tmp_path: Path) -> None:
    target, settings = tmp_path / "cases.jsonl", BuildSettings(cases=3, context=(20, 40), span=(4, 8))

    def interrupt(step: str, fraction: float) -> None:
        raise KeyboardInterrupt

    for begun in (b"", b'{"context": "half a li'):
        (tmp_path / ".cases.jsonl.part").write_bytes(begun)
        (tmp_path / ".cases.jsonl.part.json").write_text('{"context": [1, 2]}', "utf-8")
        assert build_cases(target, PASSAGES, settings) == 0 and target.is_file()
        target.unlink()
    with pytest.raises(KeyboardInterrupt):
        build_cases(target, PASSAGES, settings, progress=interrupt)
    with pytest.raises(InputError, match=r"an interrupted build .* has other context"):
        build_cases(target, PASSAGES, BuildSettings(cases=3, context=(20, 41), span=(4, 8)))
    assert build_cases(target, PASSAGES, settings) == 1


def test_a_recipe_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(BOM + b"backbon: x\n")
    with pytest.raises(InputError, match="backbon") as refusal:
        load_recipe(recipe)
    assert "\ufeff" not in str(refusal.value)
