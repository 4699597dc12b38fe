"""Every benchmark suite, by name. A new one costs a page beside these and one line in `SUITES`."""

from __future__ import annotations

from evaluation.suites.base import Made, Suite, SuiteSettings
from evaluation.suites.chains import CHAINS
from evaluation.suites.edits import EDITS
from evaluation.suites.heldout import HELDOUT
from evaluation.suites.leak import LEAK
from evaluation.suites.longqa import LONGQA
from evaluation.suites.niah import NIAH
from evaluation.suites.ruler import RULER
from evaluation.suites.scenarios import SCENARIOS
from evaluation.suites.sweeps import SWEEPS

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (HELDOUT, NIAH, RULER, LONGQA, SCENARIOS, CHAINS, SWEEPS, LEAK, EDITS)
}

__all__ = ["SUITES", "Made", "Suite", "SuiteSettings"]
