"""What the server counts, for Prometheus: requests, tokens, times, and what the caches hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kveraser.serve.types import Finished, Started

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Borders of the histograms' buckets."""


class _Held(Collector):
    """The service's own numbers, read when Prometheus asks."""

    def __init__(self, status: Callable[[], Mapping[str, float]]) -> None:
        self.status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self.status().items():
            yield GaugeMetricFamily(f"kveraser_{name}", f"Service: {name.replace('_', ' ')}.", value=value)

    def describe(self) -> list[GaugeMetricFamily]:
        # Without it, registering would ask the service, which may not be ready.
        return []


class Metrics:
    """One server's metrics, in a registry of their own.

    Args:
        status: the service's numbers: contexts, sessions, bytes held and spilled, queue and streams.
    """

    def __init__(self, status: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Held(status))
        self._requests = Counter(
            "kveraser_requests", "Requests answered.", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "kveraser_request_seconds",
            "Time from a request to the end of its response.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._running = Gauge("kveraser_requests_running", "Requests being answered.", registry=self.registry)
        self._phases = Gauge(
            "kveraser_answers_running",
            "Answers under way: those whose prompt is being read, and those that are being written.",
            ["phase"],
            registry=self.registry,
        )
        self._oldest = Gauge(
            "kveraser_oldest_answer_seconds",
            "How long the oldest answer is under way.",
            registry=self.registry,
        )
        self._oldest.set_function(self._longest)
        self._since: dict[int, float] = {}
        for phase in ("reading", "writing"):
            self._phases.labels(phase)
        self._first_token = Histogram(
            "kveraser_first_token_seconds",
            "Time from a request to the first piece of its answer.",
            ["action"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "kveraser_tokens",
            "Tokens of prompts, of those from the cache, of answers; erased, run again and run first for answers.",
            ["kind"],
            registry=self.registry,
        )
        self._answers = Counter(
            "kveraser_answers",
            "Answers by what was done to the cache and how they ended.",
            ["action", "finish_reason"],
            registry=self.registry,
        )

    def began(self) -> None:
        """A request came in."""
        self._running.inc()

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request's response has ended. `route` is a route's pattern, never a path that a client wrote."""
        self._running.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def _longest(self) -> float:
        now = time.monotonic()
        # Another thread may read this while answers come and go.
        return now - min([*self._since.values()], default=now)

    def asked(self, answer: int) -> None:
        """The answer of this number is under way."""
        self._since[answer] = time.monotonic()
        self._phases.labels("reading").inc()

    def written(self, answer: int, begun: bool) -> None:
        """It has ended, however it did; `begun`: its prompt had been read."""
        if self._since.pop(answer, None) is not None:
            self._phases.labels("writing" if begun else "reading").dec()

    def started(self, started: Started, seconds: float) -> None:
        """An answer has begun, `seconds` after its request."""
        self._phases.labels("reading").dec()
        self._phases.labels("writing").inc()
        self._first_token.labels(started.what.action).observe(seconds)
        counts = {
            "prompt": started.prompt_tokens,
            "cached": started.cached_tokens,
            "erased": started.what.erased_tokens,
            "recomputed": started.what.recomputed_tokens,
            "prefilled": started.what.prefilled_tokens,
        }
        for kind, count in counts.items():
            self._tokens.labels(kind).inc(count)

    def finished(self, finished: Finished) -> None:
        """An answer is complete."""
        self._tokens.labels("completion").inc(finished.completion_tokens)
        self._answers.labels(finished.what.action, finished.finish_reason).inc()

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)
