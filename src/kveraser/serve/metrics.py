"""Prometheus metrics: requests, tokens, durations, and the state of the caches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kveraser.serve.types import Finished, Started

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
"""Bucket boundaries of the histograms."""


class _Held(Collector):
    """Gauges of the service's status, read on collection."""

    def __init__(self, status: Callable[[], Mapping[str, float]]) -> None:
        self.status = status

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self.status().items():
            yield GaugeMetricFamily(f"kveraser_{name}", f"Service: {name.replace('_', ' ')}.", value=value)

    def describe(self) -> list[GaugeMetricFamily]:
        # Otherwise registration would call `status`, and the service may not be ready.
        return []


class Metrics:
    """The metrics of one server, in their own registry.

    Args:
        status: of the service: contexts, sessions, bytes held and spilled, queue and streams.
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
        """Count a new request."""
        self._running.inc()

    def ended(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a finished response. `route` is the pattern of a route, never a path from a client."""
        self._running.dec()
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def _longest(self) -> float:
        now = time.monotonic()
        # Copied, because another thread may call this while answers begin and end.
        return now - min([*self._since.values()], default=now)

    def asked(self, answer: int) -> None:
        """Count the request of the answer with this number."""
        self._since[answer] = time.monotonic()
        self._phases.labels("reading").inc()

    def written(self, answer: int, begun: bool) -> None:
        """Count its end, successful or not; `begun`: whether its prompt had been read."""
        if self._since.pop(answer, None) is not None:
            self._phases.labels("writing" if begun else "reading").dec()

    def started(self, started: Started, seconds: float) -> None:
        """Count the beginning of an answer, `seconds` after its request."""
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
        """Count a complete answer."""
        self._tokens.labels("completion").inc(finished.completion_tokens)
        self._answers.labels(finished.what.action, finished.finish_reason).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
