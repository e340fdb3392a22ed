"""What tests must not leave behind: files, mounts, loop devices, processes. Looked for after each test run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.patience import patient

IMAGES = Path(__file__).resolve().parents[1] / "images"
_WAIT_S = 20.0  # a killed process ends when its disk lets it


def leftovers(*prefixes: str) -> list[str]:
    """What belongs to paths that begin so: a line each. Files are not looked for."""
    return sorted(
        line
        for line in (*_mounts(), *_loop_devices(), *_processes())
        if any(prefix in f"{line}/" for prefix in prefixes)
    )


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield f"mount {line.split()[4]}"


def _loop_devices() -> Iterator[str]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield f"/dev/{path.parts[3]} on {path.read_text().strip()}"


def _processes() -> Iterator[str]:
    above = _ourselves()
    for directory in Path("/proc").glob("[0-9]*"):
        if int(directory.name) not in above:
            with suppress(OSError):
                words = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                yield f"process {directory.name} in {os.readlink(directory / 'cwd')}/: {words}"


def _ourselves() -> set[int]:
    """This process and those above it, whose arguments may name the directories."""
    pid, found = os.getpid(), set()
    while pid > 1:
        found.add(pid)
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return found


def wait_for_none(*prefixes: str, but: Iterable[str] = ()) -> list[str]:
    """`leftovers` when there are none any more, or after a generous time."""
    deadline_s = time.monotonic() + patient(_WAIT_S)
    while (found := set(leftovers(*prefixes)) - set(but)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return sorted(found)


@dataclass
class Leftover:
    """Counted in the last line of a test run."""

    line: str


class Watch:
    """Fails a test run that left something in its temporary directory or in images/."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._before = {*map(str, IMAGES.iterdir()), *leftovers(f"{IMAGES}/")}
        self._found: list[str] = []

    @pytest.hookimpl(trylast=True)  # the workers are gone
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        factory: pytest.TempPathFactory = self._config._tmp_path_factory  # type: ignore[attr-defined]
        places = (f"{factory.getbasetemp()}/", f"{IMAGES}/")
        found = {*wait_for_none(*places, but=self._before), *map(str, IMAGES.iterdir())}
        self._found = sorted(found - self._before)
        if self._found and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._found:
            terminalreporter.section("left behind", red=True)
            for line in self._found:
                terminalreporter.line(line)
            terminalreporter.stats["left behind"] = [Leftover(line) for line in self._found]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist
        config.pluginmanager.register(Watch(config), "leftovers")
