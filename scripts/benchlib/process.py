"""Server processes: started, watched and stopped by pid; CPU and memory from /proc (proc(5))."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.01


class NotAvailableError(Exception):
    """A system cannot be measured here; the message says why. The rest of the run goes on."""


def cpu_ticks(stat: str) -> int:
    """utime + stime + cutime + cstime of one /proc/PID/stat line: fields 14 to 17 of proc(5)."""
    # The name in parentheses may hold spaces and parentheses itself: count from the last one.
    fields = stat[stat.rindex(")") + 2 :].split()
    return sum(int(field) for field in fields[11:15])


def peak_bytes(status: str) -> int:
    """VmHWM of one /proc/PID/status, in bytes; 0 for a kernel thread or a zombie, which has none."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def tree(pid: int) -> list[int]:
    """``pid`` and all its living descendants."""
    pids = [pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                pids.extend(int(child) for child in children.read_text().split())
    return pids


def cpu_s(pid: int) -> float:
    """CPU seconds that ``pid`` and its children have used so far."""
    return sum(_read(each, "stat", cpu_ticks) for each in tree(pid)) / _TICKS_PER_S


def rss_peak_bytes(pid: int) -> int:
    """Peak resident memory of ``pid`` and its children together."""
    return sum(_read(each, "status", peak_bytes) for each in tree(pid))


def _read(pid: int, name: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(Path(f"/proc/{pid}/{name}").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0


class Child:
    """A process of ours, in a session of its own so that Ctrl-C reaches us first and the order of stopping is ours."""

    def __init__(self, argv: list[str], log: Path, *, pipes: bool = False) -> None:
        self.name = Path(argv[0]).name
        self.log = log
        self._unread = b""
        with log.open("ab") as sink:
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if pipes else sink,
                    stderr=sink,
                    start_new_session=True,
                    bufsize=0,
                )
            except FileNotFoundError as error:
                raise NotAvailableError(f"{argv[0]} is not installed") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def wait_until(self, ready: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Poll ``ready``. Raises NotAvailableError with the end of the log when the process ends or time runs out."""
        deadline_s = time.monotonic() + timeout_s
        while not ready():
            if self._process.poll() is not None:
                raise NotAvailableError(f"{self.name} ended with {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise NotAvailableError(f"{self.name}: {what} not within {timeout_s:g} s: {self._last_words()}")
            time.sleep(_POLL_S)

    def read_line(self, timeout_s: float) -> bytes:
        """The next line of its output, without the end; empty at the end of the output. Raises NotAvailableError."""
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not select.select([self.stdout], [], [], left_s)[0]:
                raise NotAvailableError(f"{self.name} says nothing for {timeout_s:g} s")
            data = os.read(self.stdout.fileno(), 1 << 16)
            if not data:
                return b""
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def running(argv: list[str], log: Path, *, pipes: bool = False) -> Iterator[Child]:
    child = Child(argv, log, pipes=pipes)
    try:
        yield child
    finally:
        child.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
