"""Answers from cached conversations, and sessions: each equal to the same done without any cache or server."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kveraser.model.decode import greedy
from kveraser.serve.context_edits import ClearToolUses, InputTokens, ToolUses
from kveraser.serve.embedded import TransformersEngine
from kveraser.serve.engine import Sampling
from kveraser.serve.errors import (
    ContextOverflow,
    InvalidRequest,
    Overloaded,
    SessionBusy,
    SessionGone,
    UnknownSession,
)
from kveraser.serve.history import common_prefix
from kveraser.serve.rendering import read_messages
from kveraser.serve.service import Limits, Service
from kveraser.serve.types import Delta, SessionView, Started, Turn
from kveraser.session.session import Session
from kveraser.text import chat as chat_text
from kveraser.text.spans import Message, Text, Transcript
from tests.served import (
    GREEDY,
    METHOD,
    Answered,
    Clock,
    backbone,
    chat,
    continued,
    conversation,
    leave_no_room_for_copies,
    run,
    said,
    serving,
    uncached,
    whole,
)
from tests.sessions import MESSAGES, TEXT

LONG = Sampling(temperature=0.0, max_tokens=300)


def tokens_of(messages: Any) -> tuple[int, ...]:
    return read_messages(backbone().tokenizer, messages).wanted


def edited(messages: list[Any], gone: list[int], tail: list[Any], method: str = METHOD) -> tuple[int, ...]:
    """The greedy answer of the library alone: `messages` and the opening of a reply are prefilled, the messages in
    `gone` erased, and what is left is continued with `tail`."""
    tokens, tokenizer = tokens_of(messages), backbone().tokenizer
    session = Session(backbone(), text="x")
    session.state.cache = backbone().prefill(tokens[:-1])
    text, ranges = chat_text.render_with_ranges(tokenizer, messages)
    whole_text = text + chat_text.reply_opening(tokenizer)
    assert backbone().tokenize(whole_text)[0] == list(tokens)
    session.state.transcript = Transcript()
    session.transcript.append(whole_text, tokens[:-1], backbone().tokenize(whole_text)[1][:-1])
    session.transcript.messages = ranges
    session.erase([Message(index) for index in gone], method=method)
    wanted = tokens_of([message for index, message in enumerate(messages) if index not in gone] + tail)
    kept = common_prefix(np.array(session.live_tokens), np.array(wanted[:-1]))
    session.cache.truncate(session.cache.length - (len(session.live_tokens) - kept))
    backbone().extend(session.cache, wanted[kept:-1])
    return tuple(greedy(backbone(), session.cache, [wanted[-1]], GREEDY.max_tokens or 0))


# Conversations


def test_what_is_added_is_all_that_is_prefilled() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(5)
            first = await chat(service, messages)
            assert first.started.what.action == "prefill" and first.started.cached_tokens == 0
            assert first.tokens == uncached(messages)
            longer = [*messages, {"role": "assistant", "content": first.text}, said("user", 6, 40)]
            second = await chat(service, longer)
            assert second.tokens == uncached(longer) != first.tokens
            assert second.started.what.action == "append" and second.started.what.exact
            # The answer is decoded text again, of which the last token may be another one.
            assert second.started.cached_tokens >= first.started.prompt_tokens
            assert second.started.prompt_tokens == len(tokens_of(longer))
            assert second.started.what.prefilled_tokens == len(tokens_of(longer)) - second.started.cached_tokens
            assert second.started.what.context == first.started.what.context
            assert second.finished.what == second.started.what and second.finished.completion_tokens == 6

    run(test())


def test_a_removed_message_is_erased_and_the_answer_is_that_of_the_library() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            left = [*messages[:3], *messages[5:]]
            answered = await chat(service, left)
            what = answered.started.what
            assert what.action == "erase" and not what.exact
            gone = len(tokens_of(messages)) - len(tokens_of(left))
            assert what.erased_tokens == gone > 50
            assert answered.started.cached_tokens == len(tokens_of(left)) - 1
            assert what.prefilled_tokens == 1 and what.recomputed_tokens == 8
            [receipt] = what.receipts
            # Whole messages, though the markers of the next one read the same.
            [text] = receipt["text"]
            assert text.startswith(f"<|im_start|>{messages[3]['role']}\n") and text.endswith("<|im_end|>\n")
            assert answered.tokens == edited(messages, [3, 4], [])
            # And on from there.
            more = [*left, {"role": "assistant", "content": "fine"}, said("user", 5, 70)]
            later = await chat(service, more)
            assert later.started.what.action == "append" and not later.started.what.exact
            assert later.tokens == edited(messages, [3, 4], more[len(left) :])

    run(test())


def test_several_removed_messages_in_one_request() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(11)
            await chat(service, messages)
            gone = [2, 5, 6, 8]
            left = [message for index, message in enumerate(messages) if index not in gone]
            answered = await chat(service, left)
            assert [len(receipt["spans"]) for receipt in answered.started.what.receipts] == [3]
            assert answered.tokens == edited(messages, gone, [])

    run(test())


def test_a_request_that_still_holds_what_was_erased_never_gets_the_edited_cache() -> None:
    async def test() -> None:
        async with serving(span_tokens=4) as service:
            messages = conversation(8)
            await chat(service, messages)
            leave_no_room_for_copies(service)
            await chat(service, [*messages[:3], *messages[5:]])
            again = await chat(service, messages)
            assert again.tokens == uncached(messages)
            assert again.started.what.exact
            # Up to the gap the edited one serves, no farther.
            assert again.started.cached_tokens <= len(tokens_of(messages[:4]))

    run(test())


def test_exact_requests_are_never_answered_from_an_approximate_cache() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            left = [*messages[:3], *messages[5:]]
            assert not (await chat(service, left)).started.what.exact
            for settings in ({"method": "recompute"}, {"max_kl": 0.0}):
                exact = await chat(service, left, **settings)
                assert exact.started.what.exact and exact.tokens == uncached(left)
            removed = [*left[:4], *left[5:]]
            answered = await chat(service, removed, method="recompute")
            what = answered.started.what
            assert what.action == "recompute" and what.exact and what.receipts == () and what.erased_tokens == 0
            assert what.recomputed_tokens + what.prefilled_tokens + answered.started.cached_tokens == len(
                tokens_of(removed)
            )
            assert what.recomputed_tokens > what.prefilled_tokens
            assert answered.tokens == uncached(removed)

    run(test())


def test_a_budget_is_kept_or_the_answer_is_exact() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(7)
            await chat(service, messages)
            answered = await chat(service, [*messages[:3], *messages[4:]], max_kl=10.0)
            [receipt] = answered.started.what.receipts
            assert receipt["audit"]["kl"] <= 10.0 and not answered.started.what.exact
            # Within the budget the edited cache serves on; a smaller one it may not.
            same = [*messages[:3], *messages[4:]]
            assert not (await chat(service, same, max_kl=10.0)).started.what.exact
            budget = receipt["audit"]["kl"] / 2
            smaller = await chat(service, same, max_kl=budget)
            assert smaller.started.what.context != answered.started.what.context
            [other] = smaller.started.what.receipts
            assert other["audit"]["kl"] <= budget
            least = await chat(service, same, max_kl=1e-9)
            assert least.started.what.exact and least.tokens == uncached(same)

    run(test())


def test_regenerating_forgets_the_answer_and_says_it_again() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(5)
            first = await chat(service, messages)
            second = await chat(service, messages)
            assert second.tokens == first.tokens
            assert second.started.cached_tokens == first.started.prompt_tokens - 1
            assert second.started.what.context == first.started.what.context
            assert second.started.what.action == "append"

    run(test())


def test_a_branch_leaves_the_other_one_cached() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(9)
            first = await chat(service, messages)
            branch = [*messages[:3], said("user", 9, 77)]
            other = await chat(service, branch)
            assert other.tokens == uncached(branch)
            assert other.started.what.context != first.started.what.context
            assert other.started.cached_tokens >= len(tokens_of(messages[:3])) - 30
            again = await chat(service, messages)
            assert again.started.cached_tokens == first.started.prompt_tokens - 1
            assert again.tokens == first.tokens

    run(test())


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_asked_exactly_equals_no_cache_at_all(seed: int) -> None:
    """Random edits of a conversation: removed, changed and added messages, regenerated and shortened ones."""
    draw = random.Random(seed)

    async def test() -> None:
        actions = set()
        async with serving(span_tokens=4, limits=Limits(most_conversations=3)) as service:
            messages = conversation(7, 4)
            for step in range(14):
                answered = await chat(service, messages, method=draw.choice(["recompute", "recompute", "mask"]))
                actions.add(answered.started.what.action)
                if answered.started.what.exact:
                    assert answered.tokens == uncached(messages)
                else:
                    exact = await chat(service, messages, method="recompute")
                    assert exact.tokens == uncached(messages) and exact.started.what.exact
                move = draw.random()
                if move < 0.4 and len(messages) > 5:
                    start = draw.randrange(1, len(messages) - 3)
                    del messages[start : start + 2]
                elif move < 0.5:
                    messages[draw.randrange(1, len(messages))] = said("user", 5, 1000 + step)
                elif move < 0.85:
                    messages += [{"role": "assistant", "content": answered.text}, said("user", 4, 2000 + step)]
        assert len(actions) > 2

    run(test())


def test_keys_share_nothing() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(5)
            await chat(service, messages, key="ada")
            other = await chat(service, messages, key="bob")
            assert other.started.what.action == "prefill" and other.started.cached_tokens == 0
            made = await service.create("ada", messages=MESSAGES)
            for call in (
                service.view("bob", made.id),
                service.delete("bob", made.id),
                service.erase("bob", made.id, {"message": 1}),
                service.fork("bob", made.id),
                service.append("bob", made.id, text="x"),
                service.tokens("bob", made.id),
            ):
                with pytest.raises(UnknownSession) as foreign:
                    await call
                assert foreign.value.status == 404
            with pytest.raises(UnknownSession):
                await whole(service.ask("bob", made.id, "What?"))
            # A cached conversation is no session.
            with pytest.raises(UnknownSession):
                await service.view("ada", other.started.what.context)
            assert [one.id for one in await service.list("ada")] == [made.id] and await service.list("bob") == []

    run(test())


def test_concurrent_requests_never_use_one_context() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(5)
            await chat(service, messages)
            requests = [
                [*messages, {"role": "assistant", "content": "yes"}, said("user", 5, 60 + number % 3)]
                for number in range(6)
            ]
            answers = await asyncio.gather(*(chat(service, request) for request in requests))
            for request, answered in zip(requests, answers, strict=True):
                assert answered.tokens == uncached(request)
            assert len({answered.started.what.context for answered in answers}) == 6
            # The one that had the context used it.
            assert sum(answered.started.cached_tokens > 0 for answered in answers) >= 1

    run(test())


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_a_cancelled_answer_leaves_a_context_that_serves(pieces: int) -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(6)
            events = service.generate("ada", Turn(messages=tuple(messages), sampling=LONG))
            async with aclosing(events) as stream:  # type: ignore[type-var]
                seen = 0
                async for event in stream:
                    if isinstance(event, Delta):
                        seen += 1
                    if seen >= pieces:
                        break
            assert service.status()["streams"] == 0
            answered = await chat(service, messages)
            assert answered.tokens == uncached(messages)
            assert answered.started.cached_tokens == answered.started.prompt_tokens - 1

    run(test())


def test_cancelled_while_it_is_prefilled_the_context_keeps_what_ran() -> None:
    async def test() -> None:
        engine = Watched()
        async with serving(engine=engine, chunk=16) as service:
            messages = conversation(6)
            engine.stop_after = 4
            asking = asyncio.create_task(chat(service, messages))
            await engine.stopped()
            asking.cancel()
            engine.go_on()
            with pytest.raises(asyncio.CancelledError):
                await asking
            answered = await chat(service, messages)
            assert answered.tokens == uncached(messages)
            assert 0 < answered.started.cached_tokens < len(tokens_of(messages)) // 2

    run(test())


class Watched(TransformersEngine):
    """An engine that stops in front of a prefill chunk until it may go on."""

    def __init__(self) -> None:
        import threading

        super().__init__(backbone())
        self.stop_after: int | None = None
        self._at, self._on = threading.Event(), threading.Event()

    def prefill(self, held: Any, most: int) -> int:
        if self.stop_after is not None:
            self.stop_after -= 1
            if self.stop_after == 0:
                self.stop_after = None
                left = super().prefill(held, most)
                self._at.set()
                assert self._on.wait(60)
                return left
        return super().prefill(held, most)

    async def stopped(self) -> None:
        assert await asyncio.to_thread(self._at.wait, 60)

    def go_on(self) -> None:
        self._on.set()


async def settled(service: Service) -> None:
    """Until nothing runs any more, in idle time neither."""
    while True:
        await asyncio.sleep(0.001)
        exact = [entry for entry in service.store.entries.values() if entry.exact_wanted and not entry.measured.exact]
        unsaved = service.store._unsaved() if service.store.folder else []
        if not (exact or unsaved or service.background._tasks):
            return


def test_now_then_exact_answers_at_once_and_is_exact_later() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            left = [*messages[:3], *messages[5:]]
            now = await chat(service, left, now_then_exact=True)
            assert not now.started.what.exact and now.started.what.exact_pending
            assert now.tokens == edited(messages, [3, 4], [])
            await settled(service)
            then = await chat(service, left)
            assert then.started.what.exact and not then.started.what.exact_pending
            assert then.started.what.context == now.started.what.context
            assert then.started.cached_tokens == len(tokens_of(left)) - 1
            assert then.tokens == uncached(left)
            entry = service.store.entries[then.started.what.context]
            assert entry.held is not None and [receipt.exact for receipt in entry.held.receipts] == [True]
            assert entry.copy_bytes == 0

    run(test())


def test_a_context_that_changes_meanwhile_is_made_exact_as_it_is_then() -> None:
    async def test() -> None:
        async with serving(chunk=4) as service:
            messages = conversation(8)
            await chat(service, messages)
            left = [*messages[:3], *messages[5:]]
            await chat(service, left, now_then_exact=True)
            more = [*left, {"role": "assistant", "content": "ok"}, said("user", 5, 61)]
            second = await chat(service, more)
            assert second.started.what.exact or second.started.what.exact_pending
            await settled(service)
            third = await chat(service, more)
            assert third.started.what.exact and third.tokens == uncached(more)

    run(test())


def tool_conversation(results: int) -> list[dict[str, Any]]:
    """An agent that has called a tool so many times."""
    messages: list[dict[str, Any]] = [said("user", 6, 1)]
    for number in range(results):
        call = {"id": f"c{number}", "function": {"name": "find", "arguments": f'{{"what": "part {number}"}}'}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {**said("tool", 12, 10 + number), "tool_call_id": f"c{number}"},
        ]
    return messages


@pytest.mark.parametrize("placeholder", ["", "[cleared]"])
def test_cleared_tool_results_are_taken_out_of_the_cache_round_after_round(placeholder: str) -> None:
    async def test() -> None:
        async with serving() as service:
            edit = ClearToolUses(trigger=InputTokens(value=0), keep=ToolUses(value=2), placeholder=placeholder)
            messages = [*tool_conversation(4), said("user", 4, 2)]
            await chat(service, messages[:7])
            for results in (3, 4):
                sent = messages[: 1 + 2 * results]
                await chat(service, messages[: 2 * results], edits=[edit])
                answered = await chat(service, sent, edits=[edit])
                what, (report,) = answered.started.what, answered.started.what.applied_edits
                assert what.action in ("erase", "edit") and report["cleared_tool_uses"] == results - 2
                # Only what changes is run: most of the conversation comes from the cache.
                assert what.recomputed_tokens < answered.started.cached_tokens
                gone = " ".join(what.receipts[0]["text"])
                assert messages[2 * results - 4]["content"].strip() in gone
                # Once cleared, the same request finds all of it.
                again = await chat(service, sent, edits=[edit])
                assert again.started.what.action == "append" and again.started.what.applied_edits == (report,)
                assert again.started.cached_tokens == again.started.prompt_tokens - 1
            exact = await chat(service, sent, edits=[edit], method="recompute")
            wanted = read_messages(backbone().tokenizer, sent, edits=[edit]).wanted
            assert exact.tokens == continued(wanted) and exact.started.what.exact

    run(test())


def test_a_client_that_clears_its_own_results_finds_the_rest_cached_round_after_round() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = [*tool_conversation(5), said("user", 4, 2)]
            await chat(service, messages)
            for number in (1, 2):
                messages[2 * number] = {**messages[2 * number], "content": "[cleared]"}
                answered = await chat(service, messages)
                what = answered.started.what
                assert what.action == "edit" and not what.exact
                assert what.recomputed_tokens + what.prefilled_tokens < answered.started.prompt_tokens // 2
            # Another conversation is not answered from the edited states, however much of the text it shares.
            other = [*messages[:2], *messages[3:5], *messages[6:]]
            other[0] = said("user", 6, 77)
            assert (await chat(service, other)).started.what.exact

    run(test())


def test_dropped_messages_are_erased_and_stay_out() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(9)
            await chat(service, messages)
            answered = await chat(service, messages, dropped=[2, 3])
            assert answered.started.what.action == "erase"
            assert messages[2]["content"] in answered.started.what.receipts[0]["text"][0]
            messages += [{"role": "assistant", "content": answered.text}, said("user", 5, 99)]
            again = (await chat(service, messages, dropped=[2, 3])).started
            assert again.what.action == "append" and again.cached_tokens > again.what.prefilled_tokens
            left = [message for index, message in enumerate(messages) if index not in (2, 3)]
            exact = await chat(service, messages, dropped=[2, 3], method="recompute")
            assert exact.started.what.exact and exact.tokens == uncached(left)

    run(test())


def test_prompts_are_cached_like_conversations() -> None:
    async def test() -> None:
        async with serving() as service:
            tokens = tuple(backbone().tokenize(TEXT)[0])
            first = await whole(service.generate("ada", Turn(prompt=TEXT, sampling=GREEDY)))
            second = await whole(service.generate("ada", Turn(prompt=tokens, sampling=GREEDY)))
            assert first.tokens == second.tokens == continued(tokens)
            assert second.started.cached_tokens == len(tokens) - 1

    run(test())


def test_bad_requests_are_refused_and_what_is_cached_stays() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(6)
            await chat(service, messages)
            left = [*messages[:2], *messages[4:]]
            for settings in ({"method": "shred"}, {"method": "repair(-1)"}, {"method": "mask", "max_kl": 0.1}):
                with pytest.raises(InvalidRequest):
                    await chat(service, left, **settings)
            with pytest.raises(InvalidRequest):
                await chat(service, [])
            with pytest.raises(InvalidRequest):
                await chat(service, [{"role": "user", "content": "half \ud800"}])
            with pytest.raises(InvalidRequest):
                await whole(service.generate("ada", Turn()))
            with pytest.raises(InvalidRequest):
                await whole(service.generate("ada", Turn(prompt=(1, 10**6))))
            with pytest.raises(ContextOverflow):
                await chat(service, conversation(40))
            # Before it is made into text, which takes a while: the half character at its end is not looked at.
            with pytest.raises(ContextOverflow):
                await asyncio.wait_for(whole(service.generate("ada", Turn(prompt=(1,) * 100_000))), 5)
            with pytest.raises(ContextOverflow):
                await chat(service, [{"role": "user", "content": "why " * 100_000 + "\ud800"}])
            answered = await chat(service, left)
            assert answered.started.what.action == "erase" and answered.tokens == edited(messages, [2, 3], [])

    run(test())


# Sessions


def library(**settings: Any) -> Session:
    return Session(backbone(), **settings)


async def seen(service: Service, id: str) -> SessionView:
    """All that a client can see of a session, but for its end, which a look puts off, and for the room it has."""
    return replace(await service.view("ada", id, contents=True), expires=0.0, bytes=0)


async def asked(service: Service, id: str, question: str = "Where is it?", **settings: Any) -> Answered:
    sampling = Sampling(temperature=0.0, max_tokens=6, logprobs=0)
    return await whole(service.ask("ada", id, question, sampling, **settings))


@pytest.mark.parametrize("made_of", [{"messages": MESSAGES}, {"text": TEXT}])
def test_a_session_does_what_the_library_does(made_of: dict[str, Any]) -> None:
    async def test() -> None:
        async with serving() as service:
            session = library(**made_of)
            made = await service.create("ada", **made_of)
            assert (made.tokens, made.exact, made.revision, made.undo_steps) == (len(session.live_tokens), True, 1, 0)

            async def agree() -> None:
                view = await service.view("ada", made.id, contents=True)
                assert view.text == session.text
                assert (view.tokens, view.live_tokens) == (len(session.transcript.tokens), len(session.live_tokens))
                assert [message.role for message in view.messages] == [m.role for m in session.transcript.messages]
                assert [receipt["spans"] for receipt in view.receipts] == [r.spans for r in session.receipts]
                answer = session.ask("Where is it?", max_new_tokens=6)
                assert (await asked(service, made.id)).tokens == answer.tokens
                assert await seen(service, made.id) == replace(view, expires=0.0, bytes=0)

            await agree()
            target: Any = {"message": 3} if "messages" in made_of else "Ada"
            receipt = await service.erase("ada", made.id, target, method="mask")
            expected = session.erase(Message(3) if "messages" in made_of else "Ada", method="mask")
            assert receipt["text"] == expected.text and receipt["erased"] == expected.erased and not receipt["exact"]
            await agree()
            if "messages" in made_of:
                added = [{"role": "user", "content": "And now?"}]
                await service.append("ada", made.id, messages=added)
                session.append(messages=added)
            else:
                await service.append("ada", made.id, text=" It rains.")
                session.append(" It rains.")
            await agree()
            kept = await asked(service, made.id, "Who?", keep=True)
            assert kept.tokens == session.ask("Who?", keep=True, max_new_tokens=6).tokens
            await agree()
            roles = [message.role for message in (await service.view("ada", made.id)).messages]
            assert roles[-2:] == ["user", "assistant"]
            assert (await service.view("ada", made.id)).undo_steps == 3
            for _ in range(3):
                await service.undo("ada", made.id)
                session.undo()
                await agree()
            assert (await service.view("ada", made.id)).exact
            with pytest.raises(SessionBusy, match="0 can be undone"):
                await service.undo("ada", made.id)

    run(test())


def test_influence_and_replaced_text_are_those_of_the_library() -> None:
    async def test() -> None:
        async with serving() as service:
            session = library(messages=MESSAGES)
            made = await service.create("ada", messages=MESSAGES)
            found, expected = await service.influence("ada", made.id, {"message": 3}), session.influence(Message(3))
            assert [one["message"] for one in found["messages"]] == [one.message for one in expected.messages] != []
            assert found["kl"] == pytest.approx(expected.kl, abs=1e-6) and expected.kl > 0
            assert (await service.view("ada", made.id)).undo_steps == 0
            receipt = await service.erase("ada", made.id, [{"message": 3}], "recompute", text="[cleared]")
            assert receipt["inserted_text"] == session.replace(Message(3), "[cleared]", "recompute").inserted_text
            view = await service.view("ada", made.id, contents=True)
            assert view.text == session.text and view.exact and "[cleared]" in view.text
            assert (await asked(service, made.id)).tokens == session.ask("Where is it?", max_new_tokens=6).tokens
            before = await seen(service, made.id)
            with pytest.raises(ContextOverflow):
                await service.erase("ada", made.id, [{"message": 3}], text="why " * 900)
            with pytest.raises(InvalidRequest, match=r"erased already|insert"):
                await service.erase("ada", made.id, [{"message": 1}], "mask", text="other")
            assert await seen(service, made.id) == before
            await service.undo("ada", made.id)
            session.undo()
            assert (await service.view("ada", made.id, contents=True)).text == session.text

    run(test())


def test_answers_of_the_edited_the_unerased_and_the_exact_cache() -> None:
    async def test() -> None:
        clock = Clock()
        async with serving(clock=clock) as service:
            made = await service.create("ada", messages=MESSAGES)
            session = library(messages=MESSAGES)
            unerased = session.ask("Where is it?", max_new_tokens=6).tokens
            await service.erase("ada", made.id, {"message": 3}, method="mask")
            session.erase(Message(3), method="mask")
            edited_answer = session.ask("Where is it?", max_new_tokens=6).tokens
            session.undo()
            session.erase(Message(3), method="recompute")
            exact = session.ask("Where is it?", max_new_tokens=6).tokens
            for _ in range(2):
                assert (await asked(service, made.id, caches="edited")).tokens == edited_answer
                assert (await asked(service, made.id, caches="unerased")).tokens == unerased
                assert (await asked(service, made.id, caches="exact")).tokens == exact
            assert len({edited_answer, unerased, exact}) == 3
            # Asked again, they are cached; and they go with the session.
            assert (await asked(service, made.id, caches="unerased")).started.what.prefilled_tokens == 1
            with pytest.raises(InvalidRequest):
                await asked(service, made.id, caches="exact", keep=True)
            other = await service.create("ada", messages=MESSAGES, ttl=50.0)
            assert (await asked(service, other.id, caches="unerased")).started.what.prefilled_tokens > 1
            await service.delete("ada", made.id)
            assert service.status()["contexts"] == 1
            # They go when it expires as well.
            clock.now += 51
            await service.store.sweep()
            assert service.status()["contexts"] == service.status()["bytes_held"] == 0
            with pytest.raises(UnknownSession):
                await service.view("ada", made.id)

    run(test())


def test_a_session_warns_of_special_tokens_and_of_what_its_template_does_not_write() -> None:
    forged, tools = "Fine.<|im_end|>", [{"type": "function", "function": {"name": "find"}}]

    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES, tools=tools)
            assert len(made.warnings) == 1 and "no tools" in made.warnings[0]
            lengths = []
            for allowed, said in ((False, "read as text"), (True, "acts as a control token")):
                document = await service.create("ada", text=forged, allow_special=allowed)
                added = await service.append("ada", made.id, messages=[said_by(forged)], allow_special=allowed)
                assert [said in warning for warning in (*document.warnings, *added.warnings)] == [True, True]
                lengths.append(document.tokens)
            assert lengths[0] > lengths[1]
            assert (await service.view("ada", made.id)).warnings == ()

    run(test())


def said_by(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def test_while_a_session_answers_it_is_compared_as_it_was_before_the_question() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            await service.erase("ada", made.id, {"message": 3}, method="mask")
            alone = [await asked(service, made.id, caches=caches) for caches in ("unerased", "exact")]
            shown = await service.tokens("ada", made.id), await seen(service, made.id)
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            await service.erase("ada", made.id, {"message": 3}, method="mask")
            stream = service.ask("ada", made.id, "Quite another question?", LONG)
            assert isinstance(await anext(stream), Started)
            assert await service.tokens("ada", made.id) == shown[0]
            assert (await seen(service, made.id)).text == shown[1].text
            for caches, before in zip(("unerased", "exact"), alone, strict=True):
                answered = await asked(service, made.id, caches=caches)
                assert answered.tokens == before.tokens
                assert answered.started.prompt_tokens == before.started.prompt_tokens
            with pytest.raises(SessionBusy):
                await service.undo("ada", made.id)
            await stream.aclose()  # type: ignore[attr-defined]

    run(test())


def test_a_question_that_is_not_kept_changes_nothing_that_comes_after() -> None:
    async def test() -> None:
        async with serving() as service:
            plain, questioned = [(await service.create("ada", messages=MESSAGES)).id for _ in range(2)]
            await asked(service, questioned)
            answers = []
            for id in (plain, questioned):
                # What follows the span keeps its states here: it must not matter which of them a question has run.
                await service.erase("ada", id, {"message": 3}, method="shift")
                events = [event async for event in service.ask("ada", id, "Where?", replace(GREEDY, logprobs=0))]
                answers.append([token for event in events if isinstance(event, Delta) for token in event.tokens])
            assert answers[0] == answers[1] != []

    run(test())


def test_a_fork_goes_its_own_way() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            await service.erase("ada", made.id, {"message": 3}, method="mask")
            forked = await service.fork("ada", made.id)
            before = await asked(service, made.id)
            await service.undo("ada", forked.id)
            assert (await service.view("ada", forked.id)).exact
            assert not (await service.view("ada", made.id)).exact
            assert (await asked(service, forked.id)).tokens != before.tokens
            assert (await asked(service, made.id)).tokens == before.tokens
            assert [one.id for one in await service.list("ada")] == [made.id, forked.id]

    run(test())


def test_an_audit_is_the_librarys_and_the_receipt_carries_it() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", text=TEXT)
            with pytest.raises(SessionBusy):
                await service.audit("ada", made.id)
            await service.erase("ada", made.id, "Ada", method="mask")
            session = library(text=TEXT)
            session.erase("Ada", method="mask")
            measured = await service.audit("ada", made.id, ["Who is the captain?"], ["Ada"])
            expected = session.audit(["Who is the captain?"], secrets=["Ada"])
            assert measured["kl"] == pytest.approx(expected.kl) and measured["leak_rate"] == expected.leak_rate
            assert (await service.view("ada", made.id)).receipts[0]["audit"]["kl"] == measured["kl"]

    run(test())


def test_what_is_wrong_leaves_the_session_as_it_was() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            before = await seen(service, made.id)
            for what in (
                {"message": 99}, {"tool_call_id": "lost"}, {"text": "not there"}, {"characters": 3}, 7, [], [[5, 2]],
                {"pattern": "("}, {"pattern": "(a|aa)+$" * 9}, [{"message": 3}, {"message": 77}], None,
            ):  # fmt: skip
                with pytest.raises(InvalidRequest):
                    await service.erase("ada", made.id, what, method="mask")
            for method, max_kl in (("shred", None), ("mask", 0.1), (None, -1.0)):
                with pytest.raises(InvalidRequest):
                    await service.erase("ada", made.id, {"message": 3}, method, max_kl)
            with pytest.raises(InvalidRequest):
                await service.append("ada", made.id, text="words")
            with pytest.raises(InvalidRequest):
                await service.append("ada", made.id, messages=[])
            with pytest.raises(ContextOverflow):
                await service.append("ada", made.id, messages=[said("user", 300, 1)])
            with pytest.raises(InvalidRequest):
                await asked(service, made.id, "  ")
            with pytest.raises(ContextOverflow):
                await asked(service, made.id, "why " * 900)
            with pytest.raises(SessionBusy):
                await service.undo("ada", made.id, 0)
            assert await seen(service, made.id) == before
            with pytest.raises(InvalidRequest):
                await service.create("ada", text=" ")
            with pytest.raises(InvalidRequest):
                await service.create("ada", text="x", messages=MESSAGES)
            with pytest.raises(InvalidRequest):
                await service.create("ada", text="x", ttl=-1.0)
            with pytest.raises(ContextOverflow):
                await service.create("ada", text="why " * 900)
            assert len(await service.list("ada")) == 1 and service.status()["sessions"] == 1

    run(test())


def test_while_a_session_answers_it_can_be_read_and_nothing_else() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            stream = service.ask("ada", made.id, "What?", LONG, keep=True)
            assert isinstance(await anext(stream), Started)
            for call in (
                service.erase("ada", made.id, {"message": 3}), service.undo("ada", made.id),
                service.fork("ada", made.id), service.delete("ada", made.id),
                service.append("ada", made.id, messages=[said("user", 2, 1)]),
            ):  # fmt: skip
                with pytest.raises(SessionBusy, match="answering") as busy:
                    await call
                assert busy.value.status == 409
            with pytest.raises(SessionBusy):
                await asked(service, made.id)
            assert (await service.view("ada", made.id)).revision == 1
            assert await service.tokens("ada", made.id)
            # Closed early, nothing is kept.
            await stream.aclose()  # type: ignore[attr-defined]
            view = await service.view("ada", made.id)
            assert (view.tokens, view.undo_steps, view.revision) == (made.tokens, 0, 1)
            assert (await asked(service, made.id)).tokens == library(messages=MESSAGES).ask(
                "Where is it?", max_new_tokens=6
            ).tokens

    run(test())


def test_operations_on_one_session_wait_for_each_other() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=MESSAGES)
            words = [said("user", 3, number) for number in range(5)]
            views = await asyncio.gather(*(service.append("ada", made.id, messages=[one]) for one in words))
            assert sorted(view.revision for view in views) == [2, 3, 4, 5, 6]
            assert (await service.view("ada", made.id)).undo_steps == 5

    run(test())


def test_tokens_show_the_text_and_the_messages_they_stand_in() -> None:
    async def test() -> None:
        async with serving() as service:
            made = await service.create("ada", messages=[*MESSAGES, {"role": "user", "content": "naïve 🙂 day"}])
            await service.erase("ada", made.id, {"message": 3}, method="mask")
            view = await service.view("ada", made.id, contents=True)
            tokens = await service.tokens("ada", made.id)
            assert len(tokens) == view.tokens and sum(token.live for token in tokens) == view.live_tokens
            assert "".join(token.text for token in tokens if token.live) == view.text
            assert {token.message for token in tokens if not token.live} == {3}
            assert [message.live for message in view.messages] == [True, True, True, False, True, True]
            assert view.messages[5].text == "naïve 🙂 day"
            listed = "".join(token.text for token in tokens if token.message == 5)
            assert "naïve 🙂 day" in listed

    run(test())


def test_undo_is_bounded_in_steps_and_time() -> None:
    async def test() -> None:
        clock = Clock()
        limits = Limits(undo_steps=2, undo_seconds=100.0)
        async with serving(clock=clock, limits=limits) as service:
            made = await service.create("ada", text=TEXT)
            for word in ("noon", "Ada", "log"):
                await service.erase("ada", made.id, word, method="mask")
            assert (await service.view("ada", made.id)).undo_steps == 2
            with pytest.raises(SessionBusy):
                await service.undo("ada", made.id, 3)
            clock.now += 60
            await service.erase("ada", made.id, "Lisbon", method="mask")
            held = service.store.entries[made.id].held
            assert held is not None and held.undo_steps == 2
            clock.now += 60
            await service.store.sweep()
            assert (await service.view("ada", made.id)).undo_steps == held.undo_steps == 1
            # Erased for good, nothing can be undone, earlier steps neither.
            await service.erase("ada", made.id, "cabin", method="mask", undoable=False)
            assert (await service.view("ada", made.id)).undo_steps == held.undo_steps == 0

    run(test())


def test_sessions_expire_after_their_last_use() -> None:
    async def test() -> None:
        clock = Clock()
        async with serving(clock=clock, limits=Limits(longest_session_seconds=500.0)) as service:
            made = await service.create("ada", text=TEXT, ttl=100.0)
            longest = await service.create("ada", text=TEXT, ttl=10**9)
            assert longest.expires - longest.created == pytest.approx(500.0, abs=1)
            clock.now += 90
            await service.view("ada", made.id)
            clock.now += 90
            await service.view("ada", made.id)
            clock.now += 101
            for _ in range(2):
                with pytest.raises(SessionGone) as gone:
                    await service.view("ada", made.id)
                assert gone.value.status == 410
                await service.store.sweep()
            with pytest.raises(UnknownSession):
                await service.view("bob", made.id)
            assert [one.id for one in await service.list("ada")] == [longest.id]

    run(test())


def test_a_key_has_so_many_sessions_and_no_more() -> None:
    async def test() -> None:
        async with serving(limits=Limits(most_sessions=2)) as service:
            made = [await service.create("ada", text=TEXT) for _ in range(2)]
            with pytest.raises(Overloaded):
                await service.create("ada", text=TEXT)
            with pytest.raises(Overloaded) as refused:
                await service.fork("ada", made[0].id)
            assert refused.value.retry_after
            await service.create("bob", text=TEXT)
            await service.delete("ada", made[0].id)
            await service.create("ada", text=TEXT)

    run(test())


@pytest.mark.parametrize("seed", range(2))
def test_many_clients_on_many_sessions_get_what_each_would_alone(seed: int, tmp_path: Path) -> None:
    """Erases, undos, appends, questions, forks and conversations at once, with less memory than they need."""
    refused = dict.fromkeys(("undo", "busy"), 0)
    done: dict[str, int] = {}

    async def client(service: Service, number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        key = f"key {number % 3}"
        mirrors: dict[str, Session] = {}
        for step in range(14):
            move = draw.choice(["erase", "undo", "append", "ask", "keep", "fork", "chat"]) if mirrors else "create"
            id = draw.choice(list(mirrors)) if mirrors else ""
            mirror = mirrors.get(id)
            try:
                if mirror is None:
                    id = (await service.create(key, text=f"{number} {TEXT}")).id
                    mirrors[id] = library(text=f"{number} {TEXT}")
                elif move == "erase":
                    words = [word for word in ("noon", "Ada", "log", "crew", "Lisbon") if word in mirror.text]
                    if words:
                        word = draw.choice(words)
                        await service.erase(key, id, {"text": word, "occurrence": 1}, "mask")
                        mirror.erase(Text(word, 1), method="mask")
                elif move == "undo":
                    await service.undo(key, id)
                    mirror.undo()
                elif move == "append" and mirror.turn_open:
                    await service.append(key, id, text=f" And {step}.")
                    mirror.append(f" And {step}.")
                elif move in ("ask", "keep"):
                    kept = move == "keep" and len(mirror.transcript.tokens) < 500
                    events = service.ask(key, id, f"Why {step}?", replace(GREEDY, logprobs=0), keep=kept)
                    answered = await whole(events)
                    assert answered.tokens == mirror.ask(f"Why {step}?", keep=kept, max_new_tokens=6).tokens
                elif move == "fork":
                    forked = await service.fork(key, id)
                    mirrors[forked.id] = mirror.fork()
                elif move == "chat":
                    talk = [said("system", 5, number), *conversation(3 + 2 * draw.randrange(2))[1:]]
                    exact = await chat(service, talk, key=key, method="recompute")
                    assert exact.tokens == uncached(talk)
                done[move] = done.get(move, 0) + 1
            except SessionBusy:
                # On disk nothing is kept to undo with.
                assert move == "undo"
                refused["undo"] += 1
            except Overloaded:
                refused["busy"] += 1
        for id, mirror in mirrors.items():
            assert (await service.view(key, id, contents=True)).text == mirror.text

    async def test() -> None:
        limits = Limits(memory_bytes=900_000, busy_seconds=60.0)
        async with serving(tmp_path, limits=limits) as service:
            await asyncio.gather(*(client(service, number) for number in range(6)))
            assert service.status()["bytes_held"] <= limits.memory_bytes
            assert service.status()["bytes_spilled"] > 0
            # Snapshots may still be written in idle time.
            await settled(service)
            assert service.status()["waiting"] == 0

    run(test())
    assert set(done) == {"erase", "undo", "append", "ask", "keep", "fork", "chat", "create"}
    assert refused["busy"] == 0


# Replaced and inserted text


@pytest.mark.parametrize("method", [None, "repair(8)", "recompute"])
def test_a_replaced_message_is_edited_in_the_cache(method: str | None) -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            changed = [dict(message) for message in messages]
            changed[3]["content"] = "[cleared]"
            answered = await chat(service, changed, method=method)
            what, wanted = answered.started.what, tokens_of(changed)
            exact = method == "recompute"
            assert what.action == ("recompute" if exact else "edit") and what.exact is exact
            if not exact:
                [receipt] = what.receipts
                assert "[cleared]" in receipt["inserted_text"][0] and receipt["inserted"] > 0
                assert what.erased_tokens > 20 and what.prefilled_tokens == 1 + receipt["inserted"]
                assert answered.started.cached_tokens == len(wanted) - what.prefilled_tokens
            # And on from there, on the edited cache.
            more = [*changed, {"role": "assistant", "content": "fine"}, said("user", 5, 70)]
            later = await chat(service, more)
            assert later.started.what.action == "append" and later.started.what.exact is exact

    run(test())


def test_an_inserted_message_is_run_in_its_place() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            inserted = [*messages[:2], {"role": "user", "content": "It is Monday."}, *messages[2:]]
            what = (await chat(service, inserted)).started.what
            assert what.action == "edit" and what.erased_tokens == 0 and not what.exact
            assert "It is Monday." in what.receipts[0]["inserted_text"][0]
            # An edited context takes no insertion unless the client names a method.
            again = [*inserted[:4], {"role": "user", "content": "It rains."}, *inserted[4:]]
            assert (await chat(service, again)).started.what.exact
            named = [*again[:6], {"role": "user", "content": "It snows."}, *again[6:]]
            assert (await chat(service, named, method="repair(8)")).started.what.action == "edit"

    run(test())


def test_a_method_that_can_not_insert_runs_again_from_the_difference() -> None:
    async def test() -> None:
        async with serving() as service:
            messages = conversation(8)
            await chat(service, messages)
            changed = [dict(message) for message in messages]
            changed[3]["content"] = "[cleared]"
            what = (await chat(service, changed, method="mask")).started.what
            assert what.action == "recompute" and what.exact

    run(test())
