"""A plugin of pytest for `make test-gpu`: says at the end which targets ran on this machine, which did not, and why.

A test is of the target that one of its parameters names; the others in `tests/gpu` are of `cuda`. With no target run on a GPU the
session fails: all tests skipped is no success.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from runtime.backends import RUNTIME_TARGETS

_ON_GPU = tuple(target.name for target in RUNTIME_TARGETS if target.rehearse is not None)
_NAMES = tuple(target.name for target in RUNTIME_TARGETS)


@dataclass
class Tally:
    """How the tests of one target went."""

    passed: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Why tests were skipped."""

    def __str__(self) -> str:
        skipped = f", {self.reasons.total()} skipped" if self.reasons else ""
        if self.failed:
            return f"FAILED: {self.failed} of {self.failed + self.passed} tests{skipped}"
        if self.passed:
            return f"works: {self.passed} tests passed{skipped}"
        return f"did not run: {self.reasons.most_common(1)[0][0] if self.reasons else 'no test was chosen'}"


class Verdict:
    """Counts by target; pytest calls the rest."""

    def __init__(self) -> None:
        self._targets: dict[str, str] = {}  # by test
        self._tallies = {name: Tally() for name in _NAMES}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            parameters = (
                item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
            )
            named = next((value for value in parameters if value in _NAMES), None)
            if named is None and item.get_closest_marker("gpu"):
                named = "cuda"
            if named is not None:
                self._targets[item.nodeid] = named

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tally = self._tallies.get(self._targets.get(report.nodeid, ""))
        if tally is None:
            return
        if report.failed:
            tally.failed += 1
        elif report.skipped and isinstance(report.longrepr, tuple):
            tally.reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            tally.passed += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and not self._ran():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
        """Last of all, below the long list of what was skipped."""
        yield
        terminalreporter.section("verdict")
        for name, tally in self._tallies.items():
            terminalreporter.line(f"{name:<10}{tally}")
        ran = self._ran()
        broken = [name for name in ran if self._tallies[name].failed]
        if not ran:
            terminalreporter.line("No target ran on a GPU here.")
        else:
            terminalreporter.line(f"On this GPU {'do not work: ' if broken else 'work: '}{', '.join(broken or ran)}.")

    def _ran(self) -> list[str]:
        return [name for name in _ON_GPU if self._tallies[name].passed or self._tallies[name].failed]


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Verdict())
