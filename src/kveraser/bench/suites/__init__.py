"""Every benchmark suite, by name. A new one costs a page beside these and one line in `SUITES`."""

from __future__ import annotations

from kveraser.bench.suites.base import Made, Suite, SuiteSettings
from kveraser.bench.suites.chains import CHAINS
from kveraser.bench.suites.heldout import HELDOUT
from kveraser.bench.suites.leak import LEAK
from kveraser.bench.suites.longqa import LONGQA
from kveraser.bench.suites.niah import NIAH
from kveraser.bench.suites.ruler import RULER
from kveraser.bench.suites.scenarios import SCENARIOS
from kveraser.bench.suites.sweeps import SWEEPS

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (HELDOUT, NIAH, RULER, LONGQA, SCENARIOS, CHAINS, SWEEPS, LEAK)
}

__all__ = ["SUITES", "Made", "Suite", "SuiteSettings"]
