"""Messages through templates that trim, merge, group, forget and refuse: every range is right, or there is none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kveraser.errors import InputError
from kveraser.text import chat
from kveraser.text.spans import MessageRange
from tests.templates import COUNTING, INSTRUCTING, LAST_ONLY, REVERSED, TEMPLATES, THINKING, tokenizer_with
from tests.tiny import CHAT_TEMPLATE

SYSTEM = {"role": "system", "content": " Be brief. "}
ASKED = {"role": "user", "content": "user?"}
SAID = {"role": "assistant", "content": "assistant "}
AGAIN = {"role": "user", "content": "s"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"name": "Ada"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "tool_call_id": "call_1", "content": "In Rome."}
ALSO = {"role": "tool", "tool_call_id": "call_2", "content": "In Oslo."}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "d", "parameters": {"type": "object"}}}]
CONVERSATIONS = {
    "user": [ASKED],
    "user first": [ASKED, SAID, AGAIN],
    "system first": [SYSTEM, ASKED, SAID, AGAIN],
    "system and user": [SYSTEM, ASKED],
    "reply last": [ASKED, SAID, AGAIN, SAID],
    "reasoning": [ASKED, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine"}, AGAIN, SAID],
}


def turns(text: str, ranges: list[MessageRange]) -> list[str | None]:
    return [text[place.start : place.end] if place.own_turn else None for place in ranges]


def contents(text: str, ranges: list[MessageRange]) -> list[str]:
    return [text[place.content_start : place.content_end] for place in ranges]


def read(template: str, messages: list[Any], tools: Any = None) -> tuple[list[str | None], list[str]]:
    text, ranges = chat.render_with_ranges(tokenizer_with(template), messages, chat.ChatOptions(tools or ()))
    return turns(text, ranges), contents(text, ranges)


# Where messages stand


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_turns_cover_the_text_exactly_behind_a_default_system_prompt(messages: list[Any]) -> None:
    text, ranges = chat.render_with_ranges(tokenizer_with(CHAT_TEMPLATE), messages)
    default = "" if messages[0] is SYSTEM else "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    expected = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages]
    assert text == default + "".join(expected)
    assert turns(text, ranges) == expected
    assert ranges[0].start == len(default) and ranges[-1].end == len(text)
    assert all(one.end == other.start for one, other in pairwise(ranges))
    # A role's name inside the markers is not taken for a content that reads the same.
    assert contents(text, ranges) == [one["content"] for one in messages]
    assert [place.role for place in ranges] == [one["role"] for one in messages]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_without_its_turn_the_text_is_that_of_the_conversation_without_the_message(
    template: str, messages: list[Any]
) -> None:
    tokenizer = tokenizer_with(template)
    text, ranges = chat.render_with_ranges(tokenizer, messages)
    assert len(ranges) == len(messages)
    for index, place in enumerate(ranges):
        words = text[place.content_start : place.content_end]
        assert words.strip() == words or words == messages[index]["content"]
        assert (words and words in messages[index]["content"]) or template is THINKING
        if not place.own_turn:
            assert (place.start, place.end) == (place.content_start, place.content_end)
            continue
        assert place.start <= place.content_start < place.content_end <= place.end
        for other, elsewhere in enumerate(ranges):
            assert other == index or elsewhere.end <= place.start or place.end <= elsewhere.start
        try:
            rest = chat.render(tokenizer, [*messages[:index], *messages[index + 1 :]])
        except InputError:
            continue
        # Two things may come back that only rendering anew can write: a default system prompt, an opened thought.
        if template is not THINKING and not (template is CHAT_TEMPLATE and messages[index] is SYSTEM):
            remaining = text[: place.start] + text[place.end :]
            assert remaining == rest or template is COUNTING


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", "<|im_start|>system\n Be brief. <|im_end|>\n"),
        ("dated", "Be brief."),
        ("merging", "\n Be brief. \n"),
        ("instructing", " Be brief. \n\n"),
        ("thinking", "<|im_start|>system\n Be brief. <|im_end|>\n"),
        ("counting", None),
    ],
)
def test_a_system_message_takes_no_more_than_its_own_text_along(name: str, expected: str | None) -> None:
    found, words = read(TEMPLATES[name], [SYSTEM, ASKED, SAID, AGAIN])
    assert found[0] == expected
    assert words[0].strip() == "Be brief."


def test_a_turn_that_carries_the_system_prompt_is_no_turn_of_its_own() -> None:
    merged, words = read(TEMPLATES["merging"], [SYSTEM, ASKED, SAID, AGAIN])
    assert merged[1:] == [None, "<turn>model\nassistant</turn>\n", "<turn>user\ns</turn>\n"]
    last, others = read(INSTRUCTING, [SYSTEM, ASKED, SAID, AGAIN])
    assert last[1:] == ["[INST]user?[/INST]", "assistant </s>", None]
    assert words[1:] == ["user?", "assistant", "s"] and others[1:] == ["user?", "assistant ", "s"]


def test_a_turn_that_carries_the_tool_descriptions_is_no_turn_of_its_own() -> None:
    found, _ = read(INSTRUCTING, [ASKED, SAID, AGAIN], TOOLS)
    assert found == ["[INST]user?[/INST]", "assistant </s>", None]
    assert read(INSTRUCTING, [ASKED, SAID, AGAIN])[0][2] == "[INST]s[/INST]"
    assert read(THINKING, [SYSTEM, ASKED, AGAIN], TOOLS)[0][0] == "\n Be brief. \n"


def test_a_template_that_takes_one_tool_only_still_gives_turns() -> None:
    picky = "{% if tools and tools | length > 1 %}{{ raise_exception('one tool') }}{% endif %}" + CHAT_TEMPLATE
    assert read(picky, [ASKED, SAID], TOOLS) == read(CHAT_TEMPLATE, [ASKED, SAID])
    with pytest.raises(InputError, match="refuses this conversation: one tool"):
        read(picky, [ASKED, SAID], TOOLS * 2)


def test_dropped_reasoning_does_not_displace_the_turns() -> None:
    found, words = read(THINKING, CONVERSATIONS["reasoning"])
    assert found == [
        "<|im_start|>user\nuser?<|im_end|>\n",
        "<|im_start|>assistant\nfine<|im_end|>\n",
        "<|im_start|>user\ns<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\nassistant<|im_end|>\n",
    ]
    assert words == ["user?", "fine", "s", "assistant"]


def test_reasoning_that_is_shown_otherwise_has_a_turn_but_no_content() -> None:
    found, words = read(THINKING, [ASKED, {"role": "assistant", "content": "<think>hm</think>fine"}])
    assert found[1] == "<|im_start|>assistant\n<think>\nhm\n</think>\n\nfine<|im_end|>\n"
    assert words == ["user?", ""]


def test_tool_results_that_share_a_turn_are_told_apart() -> None:
    found, words = read(THINKING, [ASKED, CALLING, FOUND, ALSO, SAID], TOOLS)
    assert found[2:4] == ["\n<result>\nIn Rome.\n</result>", "\n<result>\nIn Oslo.\n</result>"]
    assert words[2:4] == ["In Rome.", "In Oslo."]
    assert found[4] == "<|im_start|>assistant\n<think>\n\n</think>\n\nassistant<|im_end|>\n"
    _, ranges = chat.render_with_ranges(tokenizer_with(THINKING), [ASKED, CALLING, FOUND, ALSO, SAID])
    assert [place.tool_call_id for place in ranges] == [None, None, "call_1", "call_2", None]


def test_a_template_whose_beginning_depends_on_the_rest_gives_the_first_message_no_turn() -> None:
    found, words = read(COUNTING, [ASKED, SAID, AGAIN])
    assert found == [None, "assistant: assistant \n", "user: s\n"]
    assert words == ["user?", "assistant ", "s"]


def test_a_message_that_is_not_shown_is_refused() -> None:
    with pytest.raises(InputError, match=r"leaves out the content of message 0 \(user\)"):
        read(LAST_ONLY, [ASKED, SAID, AGAIN])
    # As Mistral's: the system prompt stands in the last turn, if that is the user's.
    with pytest.raises(InputError, match=r"leaves out the content of message 0 \(system\).*end with a user's"):
        read(INSTRUCTING, [SYSTEM, ASKED, SAID])


def test_a_content_that_is_shown_in_other_words_has_no_place() -> None:
    other = CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('s', '$')")
    found, words = read(other, [ASKED, SAID])
    assert found == ["<|im_start|>user\nu$er?<|im_end|>\n", "<|im_start|>assistant\na$$i$tant <|im_end|>\n"]
    assert words == ["", ""]


def test_an_empty_message_has_a_turn_and_no_content() -> None:
    found, words = read(CHAT_TEMPLATE, [ASKED, {"role": "assistant", "content": ""}, AGAIN])
    assert found[1] == "<|im_start|>assistant\n<|im_end|>\n" and words == ["user?", "", "s"]


# Forms of messages


def test_tool_calls_are_written_out_for_a_template_that_does_not_know_them() -> None:
    written = '<tool_call>\n{"name": "find", "arguments": {"name": "Ada"}}\n</tool_call>'
    found, words = read(CHAT_TEMPLATE, [ASKED, CALLING, FOUND])
    assert found[1] == f"<|im_start|>assistant\n{written}<|im_end|>\n"
    assert words[1] == written
    both, _ = read(CHAT_TEMPLATE, [ASKED, {**CALLING, "content": "Looking."}])
    assert both[1] == f"<|im_start|>assistant\nLooking.\n{written}<|im_end|>\n"


@pytest.mark.parametrize("arguments", ['{"name": "Ada"}', {"name": "Ada"}])
def test_a_template_that_knows_tool_calls_gets_their_arguments_parsed(arguments: Any) -> None:
    call = {"id": "c", "function": {"name": "find", "arguments": arguments}}
    text = chat.render(tokenizer_with(THINKING), [ASKED, {**CALLING, "tool_calls": [call]}])
    assert '<call>find{"name": "Ada"}</call>' in text
    flat = {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": arguments}]}
    plain = chat.render(tokenizer_with(CHAT_TEMPLATE), [ASKED, flat])
    assert '{"name": "find", "arguments": {"name": "Ada"}}' in plain


def test_absent_and_empty_fields_of_client_libraries_are_left_out() -> None:
    template = "{% for message in messages %}{{ message.keys() | list | join(',') }}={{ message.content }};{% endfor %}"
    messages = [{**ASKED, "tool_calls": None, "name": None}, {**SAID, "tool_calls": []}]
    assert chat.render(tokenizer_with(template), messages) == "role,content=user?;role,content=assistant ;"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "user"}, {"type": "text", "text": "?"}]
    assert read(CHAT_TEMPLATE, [{"role": "user", "content": parts}, SAID]) == read(CHAT_TEMPLATE, [ASKED, SAID])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "the conversation is empty"),
        ("hello", "messages is 'hello': give a list"),
        ({"role": "user"}, "give a list of messages"),
        (5, "messages is 5: give a list"),
        (["hello"], "message 0 is 'hello': a message is an object with a role and content"),
        ([{"content": "a"}], "message 0 is .*'content': 'a'"),
        ([{"role": 3, "content": "a"}], "message 0 is"),
        ([ASKED, {"role": "assistant"}], r"message 1 \(assistant\) has neither content nor tool_calls"),
        ([{"role": "user", "content": 5}], "message 0 has content 5: give a text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has content that is not text"),
        ([{"role": "user", "content": ["a"]}], "message 0 has content that is not text"),
        ([ASKED, {**CALLING, "tool_calls": {"a": 1}}], "message 1 has tool_calls {'a': 1}: give a list"),
        ([ASKED, {**CALLING, "tool_calls": ["find"]}], "message 1 has a tool call 'find'"),
        ([ASKED, {**CALLING, "tool_calls": [{"function": {}}]}], "give it a function with name"),
        ([{**CALLING, "tool_calls": [{"name": "find", "arguments": "{"}]}], "arguments that are not JSON: '{'"),
    ],
)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, THINKING], ids=["chatml", "thinking"])
def test_messages_of_the_wrong_form_are_refused_with_their_number(template: str, messages: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chat.render_with_ranges(tokenizer_with(template), messages)


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InputError, match="refuses this conversation: roles must alternate"):
        chat.render_with_ranges(tokenizer_with(TEMPLATES["merging"]), [ASKED, AGAIN])


def test_without_a_template_messages_are_refused(plain_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="has no chat template: pass the context as text"):
        chat.render_with_ranges(plain_tokenizer, [ASKED])
    assert not chat.has_template(plain_tokenizer) and chat.has_template(tokenizer_with(CHAT_TEMPLATE))


# Going on


@pytest.mark.parametrize(
    ("name", "turn", "opening", "closing"),
    [
        ("chatml", "<|im_start|>user\ns<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("dated", "[user]s[end]", "[assistant]", "[end]"),
        ("merging", "<turn>user\ns</turn>\n", "<turn>model\n", "</turn>\n"),
        ("instructing", "[INST]s[/INST]", "", "</s>"),
        ("thinking", "<|im_start|>user\ns<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        ("counting", "user: s\n", "", "\n"),
    ],
)
def test_a_conversation_goes_on_in_place(name: str, turn: str, opening: str, closing: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    assert chat.as_turn(tokenizer, AGAIN) == turn
    assert chat.as_turn(tokenizer, AGAIN, generation_prompt=True) == turn + opening
    assert chat.reply_opening(tokenizer) == opening
    assert chat.reply_closing(tokenizer) == closing
    assert chat.question_text(tokenizer, "s", turn_open=False) == turn + opening


def test_added_messages_are_rendered_together_and_placed() -> None:
    text, ranges = chat.continuation(tokenizer_with(THINKING), [CALLING, FOUND, ALSO, SAID, AGAIN])
    assert turns(text, ranges)[1:] == [
        "\n<result>\nIn Rome.\n</result>",
        "\n<result>\nIn Oslo.\n</result>",
        "<|im_start|>assistant\nassistant<|im_end|>\n",
        "<|im_start|>user\ns<|im_end|>\n",
    ]
    assert text.startswith("<|im_start|>assistant\n") and text.count("<|im_start|>user") == 2
    assert ranges[0].start == 0 and ranges[-1].end == len(text)
    assert chat.continuation(tokenizer_with(THINKING), []) == ("", [])


@pytest.mark.parametrize("template", [LAST_ONLY, REVERSED], ids=["last", "reversed"])
def test_a_template_that_can_not_go_on_in_place_is_refused(template: str) -> None:
    with pytest.raises(InputError, match="continue"):
        chat.as_turn(tokenizer_with(template), AGAIN)


def test_the_first_turn_is_left_open_between_its_opening_and_closing() -> None:
    tokenizer = tokenizer_with(CHAT_TEMPLATE)
    frame = chat.first_turn_frame(tokenizer)
    words = "A document."
    assert frame.opening + words + frame.closing == chat.render(tokenizer, [{"role": "user", "content": words}])
    assert frame.opening[chat.first_turn_start(tokenizer) :] == "<|im_start|>user\n"
    asked = frame.opening + words + chat.question_text(tokenizer, "Who?", turn_open=True)
    both = [{"role": "user", "content": f"{words}\n\nWho?"}]
    assert asked == chat.render(tokenizer, both, generation_prompt=True)


def test_templates_without_a_place_for_words_or_a_reply_are_refused() -> None:
    with pytest.raises(InputError, match="does not show a user's words"):
        chat.first_turn_frame(tokenizer_with("{{ messages[0]['content'] | upper }}"))
    opening_first = "{% if add_generation_prompt %}{{ 'reply ' }}{% endif %}{{ messages[0]['content'] }}"
    with pytest.raises(InputError, match="does not open a reply at the end"):
        chat.reply_opening(tokenizer_with(opening_first))


def test_a_plain_question_needs_no_template_and_keeps_its_braces(plain_tokenizer: Any) -> None:
    text = chat.question_text(plain_tokenizer, "What is {x}?", turn_open=False)
    assert text == "\n\nQuestion: What is {x}?\nAnswer:"


@pytest.mark.parametrize("question", ["", " \n", None, 5])
def test_an_empty_question_is_refused(question: Any) -> None:
    with pytest.raises(InputError, match="the question is empty or not a text"):
        chat.question_text(tokenizer_with(CHAT_TEMPLATE), question, turn_open=True)


# Long conversations


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_are_rendered_a_fixed_number_of_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [renders(name, talk(rounds), monkeypatch) for rounds in (20, 200)]
    # Ten times the messages: the same renderings find the ranges.
    assert counted[0] == counted[1] <= 20


def test_long_agent_conversations_are_rendered_a_fixed_number_of_times(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = [renders("thinking", work(rounds), monkeypatch) for rounds in (20, 200)]
    assert counted[0] == counted[1] <= 30


def talk(rounds: int) -> list[Any]:
    turns = [(f"Question {number}?", f"Answer {number}.") for number in range(rounds)]
    return [
        {"role": role, "content": said}
        for pair in turns
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]


def work(rounds: int) -> list[Any]:
    done = [{"role": "tool", "tool_call_id": "call_1", "content": f"Result {number}."} for number in range(rounds)]
    return [ASKED, *(message for result in done for message in (CALLING, result))]


def renders(name: str, messages: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the template is rendered to find the ranges, which are those that each message's words tell."""
    tokenizer, count = tokenizer_with(TEMPLATES[name]), 0
    original = tokenizer.apply_chat_template

    def counting(*args: Any, **settings: Any) -> str:
        nonlocal count
        count += 1
        text: str = original(*args, **settings)
        return text

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    text, ranges = chat.render_with_ranges(tokenizer, messages)
    assert contents(text, ranges) == [message["content"] or "" for message in messages]
    return count


JOINING = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ CALL }}{% endfor %}{{ '[end]' }}{% endfor %}"
)
JOINED = {
    "joined": "call.function.name + ' ' + call.function.arguments",
    "trimmed": "call.function.name + ' ' + call.function.arguments.strip()",
    "measured": "call.function.name + ' ' + call.function.arguments.replace('x', 'x')",
}


@pytest.mark.parametrize("written", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize("arguments", ['{"name": "Ada"}', {"name": "Ada"}], ids=["text", "object"])
def test_arguments_go_as_text_to_a_template_that_joins_them_to_text(written: str, arguments: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    messages = [ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}, FOUND]
    text, ranges = chat.render_with_ranges(tokenizer_with(JOINING.replace("CALL", written)), messages)
    assert text == '[user]user?[end][assistant]find {"name": "Ada"}[end][tool]In Rome.[end]'
    assert contents(text, ranges) == ["user?", "", "In Rome."]


PHI = (
    "{% for message in messages %}{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
)


def test_roles_that_a_template_drops_are_written_out() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, ASKED, CALLING, FOUND]
    text, ranges = chat.render_with_ranges(tokenizer_with(PHI), messages)
    assert "<|system|>\nBe brief.<|end|>\n" in text
    assert text.endswith("<|user|>\n<tool_response>\nIn Rome.\n</tool_response><|end|>\n")
    assert all("find" in one or one in text for one in contents(text, ranges)) and "find" in text
    # A template that writes them gets them as they are.
    text, _ = chat.render_with_ranges(tokenizer_with(THINKING), [ASKED, CALLING, FOUND])
    assert "<tool_response>" not in text
