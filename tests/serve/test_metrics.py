"""What Prometheus reads."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kveraser.serve.metrics import Metrics
from kveraser.serve.types import Finished, Happened, Started
from tests.serve_fake import MODEL, FakeService, http


def values(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and labels."""
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_answers_are_counted_by_what_happened_to_the_cache() -> None:
    metrics = Metrics(lambda: {"bytes_held": 5.0})
    erased = Happened("erase", "context_1", erased_tokens=7, recomputed_tokens=32, prefilled_tokens=5)
    metrics.started(Started(100, 60, erased), 0.2)
    metrics.started(Started(10, 0, Happened("prefill", "context_2", prefilled_tokens=10)), 0.02)
    metrics.finished(Finished("stop", 3, erased))
    found = values(metrics.render().decode())
    tokens = {
        kind: found["kveraser_tokens_total", f"kind={kind}"]
        for kind in ("prompt", "cached", "erased", "recomputed", "prefilled", "completion")
    }
    assert tokens == {
        "prompt": 110, "cached": 60, "erased": 7, "recomputed": 32, "prefilled": 15, "completion": 3,
    }  # fmt: skip
    assert found["kveraser_answers_total", "action=erase", "finish_reason=stop"] == 1
    assert found["kveraser_first_token_seconds_sum", "action=erase"] == 0.2
    assert found["kveraser_bytes_held",] == 5


def test_the_services_numbers_are_read_when_they_are_asked_for() -> None:
    numbers = {"sessions": 1.0}
    first, second = Metrics(lambda: numbers), Metrics(lambda: {"sessions": 9.0})
    numbers["sessions"] = 2.0
    assert values(first.render().decode())["kveraser_sessions",] == 2
    # Two servers in one process count apart.
    assert values(second.render().decode())["kveraser_sessions",] == 9


@pytest.mark.anyio
async def test_requests_are_counted_by_route_and_not_by_what_clients_write() -> None:
    async with http(FakeService()) as client:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "stream": True}
        await client.post("/v1/chat/completions", json=body)
        for path in ("/v1/sessions/one", "/v1/sessions/two", "/a", "/b"):
            await client.request("GET", path)
        await client.request("BREW", "/health")
        reply = await client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    found = values(reply.text)
    requests = {labels[1:]: value for labels, value in found.items() if labels[0] == "kveraser_requests_total"}
    assert requests == {
        ("method=POST", "route=/v1/chat/completions", "status=200"): 1,
        ("method=GET", "route=/v1/sessions/{session}", "status=404"): 2,
        ("method=GET", "route=unknown", "status=404"): 2,
        ("method=other", "route=/health", "status=405"): 1,
    }
    # The one that asks is running.
    assert found["kveraser_requests_running",] == 1
    assert found["kveraser_tokens_total", "kind=completion"] == 5
