"""Programs run to their end, or in the background."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from scripts.demolib.errors import DemoError
from scripts.interrupts import interrupts_wait

TIMEOUT_S = 180.0  # for a slow machine; nothing here takes seconds on a quick one
_SBIN = ("/usr/sbin", "/sbin")


def environment(**more: str) -> dict[str, str]:
    """Ours, with the places of mkfs and mount."""
    places = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join([*places, *(place for place in _SBIN if place not in places)])
    return {**os.environ, "PATH": path, **more}


def run(argv: Sequence[str], *, env: dict[str, str] | None = None, ok: Sequence[int] = (0,)) -> str:
    """Run a program to its end; returns stdout. Raises DemoError with what it said when it ends otherwise."""
    done = attempt(argv, env=env)
    if done.returncode not in ok:
        words = (done.stderr.strip() or done.stdout.strip() or "it says nothing")[-2000:]
        raise DemoError(f"{shlex.join(argv)} ended with {done.returncode}:\n{words}")
    return done.stdout


def attempt(argv: Sequence[str], *, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever that is. Raises DemoError when it is not there or does not end."""
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            timeout=TIMEOUT_S, env=env or environment(), start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise DemoError(f"{argv[0]} is not installed: scripts/setup --debian", 5) from None
    except subprocess.TimeoutExpired:
        raise DemoError(f"{shlex.join(argv)} does not end within {TIMEOUT_S:g} s", 6) from None


class Background:
    """A process beside us, in a session of its own: Ctrl-C reaches us first, and we end it."""

    started: ClassVar[list[Background]] = []  # whoever is interrupted before it has the object can still end it

    def __init__(self, argv: Sequence[str], log: Path, *, env: dict[str, str] | None = None) -> None:
        self.argv = argv
        self.log = log
        with log.open("ab") as sink, interrupts_wait():
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=env or environment(),
                start_new_session=True,
            )  # fmt: skip
            self.started.append(self)

    @classmethod
    def kill_all(cls) -> None:
        """Everything that was ever started here."""
        for process in cls.started:
            if not process.ended():
                process.kill()

    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None

    def words(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace").strip()[-1000:]

    def kill(self) -> None:
        """kill -9, its children too."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(TIMEOUT_S)

    def finish(self, timeout_s: float) -> None:
        """Wait for its end; kill it when that does not come."""
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
