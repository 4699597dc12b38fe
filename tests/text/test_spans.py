"""Selectors against a transcript of a byte-level tokenizer: what they point at, how they snap, what they refuse."""

from __future__ import annotations

import random
from typing import Any

import pytest

from kveraser.errors import AmbiguousSpanError, SpanError
from kveraser.text.spans import (
    Characters,
    Erasable,
    Message,
    MessageRange,
    Pattern,
    Selector,
    Span,
    Text,
    Tokens,
    ToolCall,
    Transcript,
    merge,
    resolve,
    selector_from_json,
)
from tests.tiny import tiny_tokenizer

TEXT = "The ship left at noon. Ada keeps the log 🙂 in the cabin. The ship is old."


def transcript(text: str = TEXT, opening: str = "", bos: bool = False) -> Transcript:
    """`text` behind an opening that belongs to the template, with a zero-width token in front if asked for."""
    encoded = tiny_tokenizer()(opening + text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]
    built = Transcript(body_start=len(opening))
    built.append(opening + text, [1] * bos + tokens, [(0, 0)] * bos + offsets)
    return built


def texts(built: Transcript, what: Erasable) -> list[str]:
    return [built.text_of(span) for span in resolve(built, what)]


def erase(built: Transcript, what: Erasable) -> None:
    for span in resolve(built, what):
        built.live[span.start : span.end] = [False] * len(span)


def conversation() -> Transcript:
    """Four messages: a user's, an assistant's request for a tool, its result, and an empty reply."""
    turns = [("user", "Where is Ada?"), ("assistant", "Ask find."), ("tool", "In Rome."), ("assistant", "")]
    text, messages = "<sys>", []
    for role, content in turns:
        start = len(text)
        text += f"[{role}]{content}[end]"
        inside = start + len(role) + 2
        place = (inside, inside + len(content)) if content else (len(text), len(text))
        messages.append(MessageRange(role, start, len(text), *place, "call_1" if role == "tool" else None))
    built = transcript(text)
    built.messages, built.body_start = messages, len("<sys>")
    return built


# What selectors point at


def test_tokens_are_taken_as_they_are() -> None:
    assert resolve(transcript(), Tokens(3, 7)) == [Span(3, 7)]


def test_characters_snap_outwards_to_whole_tokens() -> None:
    built = transcript("on the ship")
    assert [built.text_of(Span(token, token + 1)) for token in range(3)] == ["on", " the", " "]
    assert texts(built, Characters(4, 5)) == [" the"]
    assert texts(built, Characters(1, 3)) == ["on the"]
    assert texts(built, Characters(2, 6)) == [" the"]


def test_characters_count_from_the_users_own_text() -> None:
    built = transcript("Ada is here", opening="<opening>")
    assert texts(built, Characters(0, 3)) == ["Ada"]


def test_characters_keep_their_numbers_after_an_erase() -> None:
    built = transcript("one two dogs!")
    erase(built, Characters(0, 3))
    assert texts(built, Characters(8, 13)) == ["dogs!"]


def test_a_character_of_several_tokens_goes_as_a_whole() -> None:
    built = transcript("log 🙂 in")
    (span,) = resolve(built, "🙂")
    assert len(span) == 4
    assert built.text_of(span) == "🙂" and built.text.count("🙂") == 1
    assert resolve(built, Characters(4, 5)) == [span]
    assert resolve(built, Text("g 🙂"))[0] == Span(span.start - 2, span.end)


def test_a_text_is_found_once_or_by_its_number() -> None:
    built = transcript()
    assert texts(built, "Ada keeps") == ["Ada keeps"]
    first, second = resolve(built, Text("The ship", 1)), resolve(built, Text("The ship", occurrence=2))
    assert first[0].start == 0 and second[0].start > first[0].end
    assert built.text_of(first[0]) == "The ship" and built.text_of(second[0]) == "The ship"


def test_overlapping_occurrences_are_told_apart() -> None:
    built = transcript("aXaXa!")
    assert resolve(built, Text("aXa", 1)) == [Span(0, 3)]
    assert resolve(built, Text("aXa", 2)) == [Span(2, 5)]


def test_erased_occurrences_no_longer_count() -> None:
    built = transcript()
    erase(built, Text("The ship", 1))
    assert resolve(built, "The ship")[0].start > 0
    assert texts(built, Pattern("The ship")) == ["The ship"]


def test_a_pattern_takes_every_match_or_the_numbered_one() -> None:
    built = transcript("call 555 or 777, not 12")
    assert texts(built, Pattern(r"\d{3}")) == ["555", "777"]
    assert texts(built, Pattern(r"\d+", occurrence=3)) == ["12"]


def test_the_templates_opening_is_neither_searched_nor_matched() -> None:
    built = transcript("Ada is here", opening="Ada: ")
    assert resolve(built, "Ada")[0].start >= 5
    assert len(resolve(built, Pattern("Ada"))) == 1


@pytest.mark.parametrize(
    ("selector", "erased"),
    [
        (Message(0), "[user]Where is Ada?[end]"),
        (Message(2), "[tool]In Rome.[end]"),
        (Message(-1), "[assistant][end]"),
        (Message(-4), "[user]Where is Ada?[end]"),
        (Message(0, keep_turn=True), "Where is Ada?"),
        (Message(-2, keep_turn=True), "In Rome."),
        (ToolCall("call_1"), "[tool]In Rome.[end]"),
        (ToolCall("call_1", keep_turn=True), "In Rome."),
    ],
)
def test_a_message_goes_with_its_turn_or_without(selector: Selector, erased: str) -> None:
    assert texts(conversation(), selector) == [erased]


def test_several_spans_come_in_order_and_merge_where_they_overlap_or_touch() -> None:
    built = transcript("abcdefghij")
    assert resolve(built, [Tokens(6, 8), Tokens(1, 3), "c", Characters(2, 5)]) == [Span(1, 5), Span(6, 8)]
    assert merge([Span(3, 4), Span(0, 2), Span(2, 3), Span(5, 6)]) == [Span(0, 4), Span(5, 6)]
    assert merge([Span(0, 9), Span(2, 3)]) == [Span(0, 9)]


def test_a_span_may_hold_tokens_that_are_erased_already() -> None:
    built = transcript("abcdef")
    erase(built, "c")
    assert resolve(built, Characters(1, 4)) == [Span(1, 4)]


# Snapping


def test_snapping_agrees_with_looking_at_every_character() -> None:
    numbers = random.Random(0)
    alphabet = ["a", "the ", "on", "ing", " ", "\n", "é", "漢", "🙂", " in"]
    sizes = set()
    for _ in range(60):
        built = transcript("".join(numbers.choices(alphabet, k=12)), bos=numbers.random() < 0.5)
        for _ in range(10):
            start = numbers.randrange(len(built.text))
            end = numbers.randint(start + 1, len(built.text))
            touched = [token for token, (low, high) in enumerate(built.offsets) if low < end and high > start]
            assert built.snap(start, end) == Span(touched[0], touched[-1] + 1)
            sizes.add(len(touched) - (end - start))
    # Some spans had fewer tokens than characters and some more, or the comparison would say little.
    assert min(sizes) < 0 < max(sizes)


def test_a_zero_width_beginning_is_never_included() -> None:
    built = transcript("Ada", bos=True)
    assert built.tokens[0] == 1 and built.offsets[0] == (0, 0)
    assert built.snap(0, 3) == Span(1, 4)
    assert built.snap(0, 1).start == 1


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        (3, 3, "empty span"),
        (5, 3, "empty span"),
        (-1, 2, "lie outside"),
        (0, 8, "lie outside"),
        (3, 4, "no token covers"),
    ],
)
def test_snapping_refuses_what_no_token_covers(start: int, end: int, said: str) -> None:
    built = Transcript()
    # Some tokenizers drop spaces.
    built.append("one two", [5, 6], [(0, 3), (4, 7)])
    with pytest.raises(SpanError, match=said):
        built.snap(start, end)
    assert built.snap(2, 5) == Span(0, 2)


def test_live_text_shows_shared_characters_once_and_leaves_out_the_erased() -> None:
    built = transcript("a🙂b c")
    assert built.live_text(0, len(built.tokens)) == "a🙂b c"
    erase(built, "🙂")
    assert built.live_text(0, len(built.tokens)) == "ab c"
    assert built.live_text(0, 1) == "a"


def test_truncating_goes_back_to_an_earlier_transcript() -> None:
    built, before = transcript("abc"), transcript("abc")
    built.append("déf", *_tokens("déf"))
    assert built != before and built.text == "abcdéf" and built.offsets[-1] == (5, 6)
    built.truncate(3, 3, 0)
    assert built == before


def _tokens(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    built = transcript(text)
    return built.tokens, built.offsets


# What selectors refuse


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (Tokens(4, 4), r"\[4, 4\) is empty"),
        (Tokens(5, 4), r"\[5, 4\) is empty"),
        (Tokens(-1, 4), r"tokens \[-1, 4\) lie outside .* tokens"),
        (Tokens(0, 10_000), r"outside the context, which has \d+ tokens"),
        (Characters(7, 7), r"characters \[7, 7\) are an empty span"),
        (Characters(-3, 7), r"characters \[-3, 7\) lie outside"),
        (Characters(0, 10_000), r"outside the context, which has 73 characters"),
        ("", "empty: give the words"),
        ("submarine", "'submarine' is not in the context: give the exact text"),
        ("ADA  keeps", "letters or spaces differ in 'Ada keeps'"),
        ("Ada\nkeeps", "letters or spaces differ in 'Ada keeps'"),
        (Text("The ship", 3), "no occurrence 3: it occurs 2 times"),
        (Text("The ship", 0), "no occurrence 0"),
        (Pattern("(ship"), "not a regular expression"),
        (Pattern("submarine"), "matches nothing in the context"),
        (Pattern("x*"), "matches empty text only"),
        (Pattern("ship", 5), "no match 5: it matches 2 times"),
        (Message(0), r"no message 0: the conversation has 0 messages \(text sessions have none: erase by text"),
        (ToolCall("call_9"), "'call_9': the conversation has none"),
        ([], "no span given"),
        ((), "no span given"),
        (TEXT, "the whole context and nothing would remain"),
        ([Tokens(0, 9), Pattern("(?s).+")], "the whole context"),
        (7, "7 is not a span"),
        ((10, 20), r"10 is not a span: .*Characters\(10, 20\)"),
        ({"text": "Ada"}, "is not a span"),
    ],
)
def test_what_points_nowhere_is_refused_with_the_reason(what: Any, said: str) -> None:
    built = transcript()
    with pytest.raises(SpanError, match=said):
        resolve(built, what)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Tokens(1.5, 3), "Tokens: start is 1.5: give a whole number"),
        (lambda: Characters("1", 3), "Characters: start is '1'"),
        (lambda: Text(5), "Text: text is 5: give a text"),
        (lambda: Text("a", "2"), "occurrence is '2': give a whole number"),
        (lambda: Pattern(None), "Pattern: pattern is None"),
        (lambda: Message("3"), "Message: index is '3'"),
        (lambda: Message(True), "Message: index is True"),
        (lambda: Message(1, keep_turn="yes"), "keep_turn is 'yes': give True or False"),
        (lambda: ToolCall(7), "tool_call_id is 7"),
    ],
)
def test_fields_of_the_wrong_type_are_refused(make: Any, said: str) -> None:
    with pytest.raises(SpanError, match=said):
        make()


def test_an_ambiguous_text_lists_its_occurrences_with_their_surroundings() -> None:
    built = transcript("one cat, two cats, no dog", opening="<cat> ")
    with pytest.raises(AmbiguousSpanError, match=r"occurs 2 times.*occurrence=1..2") as raised:
        resolve(built, "cat")
    assert raised.value.occurrences == ((4, 7), (13, 16))
    assert "occurrence 2 at characters 13-16: 'one cat, two cats, no dog'" in str(raised.value)
    assert "<cat>" not in str(raised.value)
    for start, end in raised.value.occurrences:
        assert texts(built, Characters(start, end)) == ["cat"]


def test_a_very_ambiguous_text_lists_only_the_first_occurrences() -> None:
    with pytest.raises(AmbiguousSpanError, match=r"occurs 300 times.*and 288 more$") as raised:
        resolve(transcript("xy" * 300), "x")
    assert len(raised.value.occurrences) == 300
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("what", ["Ada", Text("Ada", 1), Characters(23, 26), Tokens(21, 24), Message(0)])
def test_what_is_erased_already_is_refused(what: Any) -> None:
    built = transcript()
    built.messages = [MessageRange("user", 23, 26, 23, 26)]
    assert texts(built, what) == ["Ada"]
    erase(built, "Ada")
    with pytest.raises(SpanError, match="'Ada' is erased already"):
        resolve(built, what)
    with pytest.raises(SpanError, match="matches only what is erased already"):
        resolve(built, Pattern("Ada"))


def test_a_beginning_marker_and_an_opening_are_no_context_that_remains() -> None:
    with pytest.raises(SpanError, match="the whole context"):
        resolve(transcript("Ada", bos=True), "Ada")
    with pytest.raises(SpanError, match="the whole context"):
        resolve(transcript("Ada", opening="<opening>"), "Ada")
    assert resolve(transcript("Ada.", bos=True), "Ada") == [Span(1, 4)]


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        (Message(4), "no message 4: the conversation has 4 messages$"),
        (Message(-5), "no message -5"),
        (Message(3, keep_turn=True), r"message 3 \(assistant\) has no content, .*erase the whole turn"),
        (ToolCall("call_2"), "'call_2': the conversation has 'call_1'"),
    ],
)
def test_messages_that_are_not_there_are_refused(selector: Selector, said: str) -> None:
    with pytest.raises(SpanError, match=said):
        resolve(conversation(), selector)


def test_a_message_without_a_turn_of_its_own_is_erased_by_content_only() -> None:
    built = transcript("[user]Be brief.\n\nWho?[end]")
    built.messages = [
        MessageRange("user", 17, 21, 17, 21, own_turn=False),
        MessageRange("user", 0, 0, 0, 0, None, False),
    ]
    assert texts(built, Message(0, keep_turn=True)) == ["Who?"]
    with pytest.raises(SpanError, match=r"no turn of its own .*keep_turn=True"):
        resolve(built, Message(0))
    for keep_turn in (False, True):
        with pytest.raises(SpanError, match=r"message 1 .*erase it by text"):
            resolve(built, Message(1, keep_turn))


def test_a_tool_call_id_that_comes_twice_must_be_told_by_index() -> None:
    built = conversation()
    built.messages.append(built.messages[2])
    with pytest.raises(SpanError, match=r"'call_1' occurs in messages 2, 4: say which with Message\(index\)"):
        resolve(built, ToolCall("call_1"))


# Case files


@pytest.mark.parametrize(
    ("value", "selector"),
    [
        ("a text", Text("a text")),
        ([3, 9], Characters(3, 9)),
        ({"text": "a", "occurrence": 2}, Text("a", 2)),
        ({"pattern": "a+"}, Pattern("a+")),
        ({"message": 3}, Message(3)),
        ({"message": -1, "keep_turn": True}, Message(-1, True)),
        ({"tool_call_id": "call_1"}, ToolCall("call_1")),
        ({"tokens": [3, 9]}, Tokens(3, 9)),
    ],
)
def test_selectors_are_read_from_json(value: Any, selector: Selector) -> None:
    assert selector_from_json(value) == selector


@pytest.mark.parametrize(
    "value",
    [None, 3, [1], [1, 2, 3], [1, "2"], [True, 2], {}, {"words": "a"}, {"text": "a", "pattern": "b"},
     {"message": "3"}, {"message": 1.5}, {"text": ["a"]}, {"text": "a", "occurrence": "2"}, {"pattern": 3},
     {"tokens": 3}, {"tokens": [3]}, {"tokens": [3, 4, 5]}, {"tokens": ["3", 4]}, {"tokens": [3, 4], "end": 5}],
)  # fmt: skip
def test_other_json_is_refused_and_shown(value: Any) -> None:
    with pytest.raises(SpanError, match="is not a span") as raised:
        selector_from_json(value)
    assert repr(value) in str(raised.value)


def test_what_is_no_span_is_not_repeated_at_length() -> None:
    for wrong in ({"pattern": ["a" * 10_000]}, {"span": "a" * 10_000}, [["a" * 10_000]]):
        with pytest.raises(SpanError) as raised:
            selector_from_json(wrong)
        assert len(str(raised.value)) < 600 and "aaa" in str(raised.value)
