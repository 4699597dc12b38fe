"""Requests beside a chat leave its cache alone where memory allows, and figures tell cached tokens from new ones."""

from __future__ import annotations

import numpy as np
import pytest

from kveraser.serve.history import run_again
from kveraser.serve.rendering import read_messages
from tests.served import backbone, chat, conversation, leave_no_room_for_copies, run, said, serving, uncached


def size(messages: list[dict[str, str]]) -> int:
    return len(read_messages(backbone().tokenizer, messages).wanted)


@pytest.mark.parametrize("room", [True, False])
def test_a_side_request_that_edits_the_history_leaves_the_chat_its_cache(room: bool) -> None:
    async def test() -> None:
        async with serving(span_tokens=4) as service:
            messages = conversation(13)
            first = await chat(service, messages)
            if not room:
                leave_no_room_for_copies(service)
            # A title: early messages left out, and an instruction instead of the last one.
            side = await chat(service, [messages[0], *messages[3:-1], said("user", 4, 321)])
            assert side.started.what.action == "erase"
            following = [*messages, {"role": "assistant", "content": first.text}, said("user", 5, 322)]
            main = await chat(service, following)
            what, again = main.started.what, size(following) - main.started.cached_tokens
            assert what.exact and main.tokens == uncached(following)
            if room:
                assert what.action == "append" and what.recomputed_tokens == 0
                assert again <= size(following) - first.started.prompt_tokens
            else:
                assert again > size(following) // 2 and what.recomputed_tokens > size(following) // 3

    run(test())


def test_a_side_request_that_leaves_the_last_answer_out_does_not_cut_it() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = [*conversation(5), said("assistant", 9, 1), said("user", 2, 2)]
            await chat(service, messages)
            await chat(service, [*messages[:-2], said("user", 4, 3)])
            main = await chat(service, messages)
            assert main.started.cached_tokens == main.started.prompt_tokens - 1

    run(test())


def test_copies_for_side_requests_do_not_pile_up() -> None:
    async def test() -> None:
        async with serving(span_tokens=4) as service:
            messages, counts = conversation(9), []
            for turn in range(5):
                answer = await chat(service, messages)
                side = await chat(service, [messages[0], *messages[3:], said("user", 3, 70 + turn)])
                assert side.started.what.action == "erase"
                messages = [*messages, {"role": "assistant", "content": answer.text}, said("user", 3, turn)]
                counts.append(service.status()["contexts"])
            assert counts == [2] * 5

    run(test())


def test_an_early_change_runs_cached_tokens_again_and_says_so() -> None:
    async def test(messages: list[dict[str, str]], changed: list[dict[str, str]], action: str) -> None:
        async with serving() as service:
            await chat(service, messages)
            what = (await chat(service, changed, method="recompute")).started.what
            same = size(messages[2:]) - size([messages[2]]) + len("w1 w2")
            assert what.action == action and what.recomputed_tokens > same
            assert what.prefilled_tokens < 40 + size([said("user", 9, 777)]) and what.exact

    messages = conversation(11)
    placeholder = [messages[0], {"role": "user", "content": "[removed]"}, *messages[2:]]
    run(test(messages, placeholder, "recompute"))
    # In the very first words nothing of the cache can serve, and yet it held the rest.
    run(test(messages, [said("system", 8, 777), *messages[1:]], "prefill"))


def test_a_new_chat_with_the_same_system_prompt_is_a_prefix() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(9)
            await chat(service, messages)
            what = (await chat(service, [messages[0], said("user", 9, 555)])).started.what
            assert (what.action, what.recomputed_tokens) == ("prefix", 0) and what.prefilled_tokens > 0

    run(test())


def test_tokens_run_again_are_counted_in_runs_wherever_they_stand() -> None:
    cached, wanted = np.arange(50, dtype=np.int32), np.array([99, *range(10, 30), 98, *range(3)], dtype=np.int32)
    assert run_again(cached, wanted, 16) == 20 and run_again(cached, wanted, 21) == 0
    assert run_again(cached, wanted[1:5], 16) == 0
    # No more than there were.
    assert run_again(cached[:16], np.tile(cached[:16], 3), 16) == 16
