"""`--second-chance`: a test of real processes that failed beside others is run once more, alone.

Such a test drives processes in real time, and on a machine that stalls it may fail though nothing is wrong. What then
passes is told apart from what passed at once, by name, in the summary and its last line. What fails again has failed.
Tests without processes get no second chance: nothing but a mistake makes them fail. Nor does anybody when so many
failed that it was no chance, or when others failed too: the verdict could not change.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

REAL = ("tests/system/", "tests/cli/", "tests/demo/", "tests/iscsi/", "tests/lab/")
MOST = 8
KEY = "passed only when alone"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--second-chance", action="store_true", help="failed tests of real processes once more, alone")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--second-chance") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SecondChance(config), "second chance")


class SecondChance:
    """Collects failures, and at the end runs those tests again."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._failed: dict[str, pytest.TestReport] = {}  # by name, the first report that failed

    @property
    def _terminal(self) -> pytest.TerminalReporter:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        assert isinstance(terminal, pytest.TerminalReporter)
        return terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.setdefault(report.nodeid, report)

    @pytest.hookimpl(trylast=True)  # the workers are gone
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus != pytest.ExitCode.TESTS_FAILED or session.shouldfail or session.shouldstop:
            return
        if not deserving(list(self._failed)):
            return
        self._terminal.ensure_newline()
        self._terminal.section("second chance, one after the other")
        for name in self._failed:
            self._terminal.write(f"{name} ")
            words = again(self._config, name)
            self._terminal.line("FAILED again" if words else "passed alone")
            if words:
                self._terminal.line(words)
            else:
                self._forgive(name)
        if not self._terminal.stats.get("failed") and not self._terminal.stats.get("error"):
            session.exitstatus = pytest.ExitCode.OK

    def _forgive(self, name: str) -> None:
        stats = self._terminal.stats
        for key in ("failed", "error"):
            stats[key] = [report for report in stats.get(key, []) if report.nodeid != name]
        stats.setdefault(KEY, []).append(self._failed[name])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What went wrong beside others stands here whole: it is to be mended."""
        forgiven: list[pytest.TestReport] = terminalreporter.stats.get(KEY, [])
        if forgiven:
            terminalreporter.section(KEY, yellow=True)
        for report in forgiven:
            terminalreporter.line(f"{report.nodeid} failed beside others, and {KEY}; the failure was:", yellow=True)
            terminalreporter.line(report.longreprtext)


def deserving(names: Sequence[str]) -> bool:
    """Whether a second chance of these tests, all that failed, can be given and can change the verdict."""
    return 0 < len(names) <= MOST and all(name.startswith(REAL) for name in names)


def again(config: pytest.Config, name: str) -> str:
    """Run one test in a pytest of its own; what it said if it failed, else nothing."""
    argv = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-q", name]
    done = subprocess.run(argv, cwd=config.rootpath, capture_output=True, text=True, errors="replace", check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr
