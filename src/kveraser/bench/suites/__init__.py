"""Every benchmark suite, by name. A new one costs a page beside these and one line in `SUITES`."""

from __future__ import annotations

from kveraser.bench.suites.base import Made, Suite, SuiteSettings

SUITES: dict[str, Suite] = {}

__all__ = ["SUITES", "Made", "Suite", "SuiteSettings"]
