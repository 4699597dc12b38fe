"""How soon an answer begins when the history of a long conversation changes early in it, with editing and without.

Both ways are asked of the same server: as it is by default, and told to recompute, which is caching without erasing. A
conversation is used once; the ways take turns, so that a machine that slows down slows both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from evaluation.serving.server import Server
from evaluation.serving.texts import ASKED, CALL, QUESTIONS, agent_conversation
from kveraser.errors import MeasurementError
from kveraser.model.backbone import Backbone
from kveraser.session.session import AUTO_PROBE_BUDGET

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

Way = Literal["erase", "recompute"]
WAYS: dict[Way, dict[str, Any]] = {"erase": {}, "recompute": {"method": "recompute"}}
"""What each way puts into a request's `kveraser` field."""

PLACEHOLDER = "[cleared]"
CHANGES = ("drop", "placeholder", "three")
"""The tool result is dropped; a placeholder takes its place; and two more messages become placeholders at once."""

BAR = 10.0
"""How many times sooner the first token is to come."""

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class HistorySettings:
    """What is asked.

    Attributes:
        tokens: of a conversation, about.
        result: tokens of the tool result that is dropped.
        repeats: conversations a way, after one of warm-up.
        seed: of the conversations.
    """

    tokens: int = 4000
    result: int = 100
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class HistoryRow:
    """One change, one way.

    Attributes:
        change: of `CHANGES`.
        actions: what the server says that it did; one a way, unless it could not do what was asked.
        method: of the receipts.
        prompt_tokens, cached_tokens, erased_tokens: medians of the requests with the changed history.
        run_tokens: tokens that these ran, for the first time or again.
        prefill_seconds: median to the first token of a conversation that is new to the server.
        first_token_seconds: median to the first token with the changed history.
        seconds: all of these.
    """

    change: str
    way: Way
    actions: tuple[str, ...]
    method: str | None
    prompt_tokens: int
    cached_tokens: int
    erased_tokens: int
    run_tokens: int
    prefill_seconds: float
    first_token_seconds: float
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class Agreement:
    """How far the answers of an edited conversation are from exact ones, by the audit of a session of the server.

    Attributes:
        method, erased: of the session's erase.
        kl: KL(exact || edited), the mean over all questions' answers, nats per token; unerased: the same for the
            conversation with the tool result.
        budget: what `auto` would accept.
    """

    method: str
    erased: int
    kl: float | None
    kl_unerased: float | None
    fidelity: float | None
    budget: float
    questions: int


@dataclass(frozen=True)
class HistoryResult:
    """Both ways, how many times sooner the editing one answers for every change, and how good its answers are."""

    rows: tuple[HistoryRow, ...]
    ratios: dict[str, float]
    agreement: Agreement
    bar: float = BAR


@dataclass(frozen=True)
class _Answered:
    """One request."""

    seconds: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    happened: Mapping[str, Any]


def measure(
    server: Server,
    backbone: Backbone,
    settings: HistorySettings,
    method: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> HistoryResult:
    """Time both ways on every change.

    Args:
        method: with which the server was started, for the audit; None: its own.

    Raises:
        MeasurementError: an answer breaks off.
    """
    report = progress or (lambda _: None)
    model = server.model()
    rows, conversation = list[HistoryRow](), list[dict[str, Any]]()
    with closing(server.client()) as client:
        for change in CHANGES:
            first: dict[Way, list[_Answered]] = {way: [] for way in WAYS}
            edited: dict[Way, list[_Answered]] = {way: [] for way in WAYS}
            for repeat in range(settings.repeats + 1):
                # Whichever way comes first in a round comes second in the next.
                for way in sorted(WAYS, reverse=bool(repeat % 2)):
                    report(f"{change}: {'warm-up' if not repeat else f'round {repeat} of {settings.repeats}'}: {way}")
                    # A short one warms up as well as a long one.
                    size = settings.tokens if repeat else min(settings.tokens, 512)
                    seed = f"{settings.seed}/{change}/{way}/{repeat}"
                    messages = agent_conversation(backbone.tokenizer, seed, size, settings.result)
                    began = _ask(client, model, messages, {})
                    said = [*messages, {"role": "assistant", "content": began.text}]
                    asked = {"role": "user", "content": QUESTIONS[0]}
                    answered = _ask(client, model, [*_changed(said, change), asked], WAYS[way])
                    if repeat:
                        first[way].append(began)
                        edited[way].append(answered)
                        conversation = said
            rows += [_row(change, way, first[way], edited[way]) for way in WAYS]
    report("auditing the answers")
    seconds = {(row.change, row.way): row.first_token_seconds for row in rows}
    ratios = {change: seconds[change, "recompute"] / seconds[change, "erase"] for change in CHANGES}
    return HistoryResult(tuple(rows), ratios, _audit(server, conversation, method))


def _changed(messages: Sequence[dict[str, Any]], change: str) -> list[dict[str, Any]]:
    """The history as the client sends it next."""
    if change == "drop":
        return [message for message in messages if message["role"] != "tool"]
    (result,) = (index for index, message in enumerate(messages) if message["role"] == "tool")
    told = [index for index, message in enumerate(messages) if index > result and message["role"] == "user"]
    cleared = {result, *told[: 2 if change == "three" else 0]}
    return [
        {**message, "content": PLACEHOLDER} if index in cleared else message for index, message in enumerate(messages)
    ]


def _ask(
    client: openai.OpenAI, model: str, messages: Sequence[Mapping[str, Any]], kveraser: Mapping[str, Any]
) -> _Answered:
    """A streamed answer, timed from the request to the first piece of its text."""
    started = time.perf_counter()
    seconds, text = None, list[str]()
    happened: Mapping[str, Any] | None = None
    prompt_tokens = cached_tokens = 0
    with client.chat.completions.create(
        model=model,
        messages=cast("list[ChatCompletionMessageParam]", messages),
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"kveraser": dict(kveraser)},
    ) as stream:
        for chunk in stream:
            ended = any(choice.finish_reason for choice in chunk.choices)
            piece = "".join(choice.delta.content or "" for choice in chunk.choices)
            if seconds is None and (piece or ended):
                seconds = time.perf_counter() - started
            text.append(piece)
            happened = (chunk.model_extra or {}).get("kveraser") or happened
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
                details = chunk.usage.prompt_tokens_details
                cached_tokens = (details.cached_tokens if details is not None else None) or 0
    if seconds is None or happened is None:
        raise MeasurementError("the server's answer broke off: see its log")
    return _Answered(seconds, "".join(text), prompt_tokens, cached_tokens, happened)


def _row(change: str, way: Way, first: Sequence[_Answered], edited: Sequence[_Answered]) -> HistoryRow:
    def middle(values: Sequence[int]) -> int:
        return int(statistics.median(values))

    receipts = [receipt for one in edited for receipt in one.happened["receipts"]]
    return HistoryRow(
        change=change,
        way=way,
        actions=tuple(dict.fromkeys(one.happened["action"] for one in edited)),
        method=receipts[-1]["method"] if receipts else None,
        prompt_tokens=middle([one.prompt_tokens for one in edited]),
        cached_tokens=middle([one.cached_tokens for one in edited]),
        erased_tokens=middle([one.happened["erased_tokens"] for one in edited]),
        run_tokens=middle(
            [one.happened["recomputed_tokens"] + one.happened["prefilled_tokens"] for one in edited]
        ),
        prefill_seconds=statistics.median(one.seconds for one in first),
        first_token_seconds=statistics.median(one.seconds for one in edited),
        seconds=tuple(one.seconds for one in edited),
    )  # fmt: skip


def _audit(server: Server, conversation: Sequence[Mapping[str, Any]], method: str | None) -> Agreement:
    """The last conversation as a session from which the server erases the tool result, and audits that."""
    with server.http() as client:
        session = client.post("/v1/sessions", json={"messages": conversation}).raise_for_status().json()["id"]
        path = f"/v1/sessions/{session}"
        erased = client.post(f"{path}/erase", json={"spans": [{"tool_call_id": CALL}], "method": method})
        receipt = erased.raise_for_status().json()["receipt"]
        questions = [ASKED, *QUESTIONS]
        audit = client.post(f"{path}/audit", json={"probes": questions}).raise_for_status().json()["audit"]
        client.delete(path).raise_for_status()
    return Agreement(
        method=receipt["method"],
        erased=receipt["erased"],
        kl=audit["kl"],
        kl_unerased=audit["kl_unerased"],
        fidelity=audit["fidelity"],
        budget=AUTO_PROBE_BUDGET,
        questions=len(questions),
    )
