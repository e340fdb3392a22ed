"""A group whose every change is typed: what a user does with `blockrepl`, and kill -9."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockrepl.cli import processes
from blockrepl.definition import load
from scripts.demolib.group import BLOCKREPL
from scripts.demolib.process import environment
from scripts.torturelib.errors import BrokenPromiseError
from scripts.torturelib.group import NODES, PATIENCE_S, Group

ANSWER_S = 600.0  # a command says something in the end
REFUSED, NOT_RUNNING, NOT_IN_TIME, NOTHING_THERE = 2, 4, 6, 21
# docs/command-line.md, "Exit codes"; 10 is what nobody expects, 233 is `pair wait`'s timeout, 1 and 2 also `verify`'s.
EXPECTED = frozenset({0, 1, REFUSED, NOT_RUNNING, 5, NOT_IN_TIME, *range(20, 26), *range(30, 35), 233})
HINTLESS = frozenset({0, 1, 233})


class Running:
    """A node's process, which is nobody's child but that of the first process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """None while it lives."""
        return self._ended(0.0)

    def wait(self, timeout: float) -> int:
        """Raises subprocess.TimeoutExpired."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def _ended(self, timeout_s: float) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if poll.poll(timeout_s * 1000):
                self.returncode = self._reaped()
                os.close(self._fd)
        return self.returncode

    def _reaped(self) -> int:
        with suppress(ChildProcessError):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if pid else -1
        return -1  # another one reaps it

    def send_signal(self, number: signal.Signals) -> None:
        """Nothing happens when it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)


@dataclass(frozen=True)
class Answer:
    """What a command came to."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def hint(self) -> str:
        """The last one."""
        found = re.findall(r"^hint: (.*)$", self.err, re.MULTILINE)
        return str(found[-1]) if found else ""

    @property
    def bad_manners(self) -> str:
        """A command says what is wrong and what to type next, and ends with a code that the documents name."""
        if "Traceback" in self.err or self.code not in EXPECTED:
            return f"{self} says {self.err[-2000:]}"
        if self.code not in HINTLESS and not ("blockrepl: " in self.err and self.hint):
            return f"{self} does not say what to type next: {self.err[-500:]}"
        return ""

    def __str__(self) -> str:
        return f"blockrepl {' '.join(self.words)} ended with {self.code}"


@dataclass
class Typed:
    """A command that is being typed."""

    words: tuple[str, ...]
    process: subprocess.Popen[str]

    def answer(self) -> Answer:
        """Raises BrokenPromiseError when it never ends."""
        try:
            out, err = self.process.communicate(timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise BrokenPromiseError(f"blockrepl {' '.join(self.words)} does not end within {ANSWER_S:g} s") from None
        return Answer(self.words, self.process.returncode, out, err)


@dataclass
class _Place:
    """Where a node is started."""

    prefix: tuple[str, ...] = ()
    file: Path | None = None


class TypedGroup(Group):
    """Nodes are started by `up` where they belong; `typed` has all that was typed."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self.answers: list[Answer] = []

    # commands

    def begin(self, *words: str) -> Typed:
        """Type a command; it runs. One that starts a node is typed on that node's machine."""
        self.say(f"$ blockrepl {' '.join(words)}")
        place = self._place(words)
        process = subprocess.Popen(
            [*place.prefix, *BLOCKREPL, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
            env={**self._environment(), "BLOCKREPL_FILE": str(place.file or self.file)},
        )  # fmt: skip
        return Typed(words, process)

    def end(self, typed: Typed) -> Answer:
        """Its end. Raises BrokenPromiseError when it is not what the documents promise."""
        answer = typed.answer()
        self.answers.append(answer)
        if answer.code:
            self.say(f"  {answer.code}: {' '.join(answer.err.split())[-300:]}")
        if answer.bad_manners:
            raise BrokenPromiseError(answer.bad_manners)
        self.find_running()
        return answer

    def type(self, *words: str) -> Answer:
        """A command from its begin to its end."""
        return self.end(self.begin(*words))

    def _place(self, words: Sequence[str]) -> _Place:
        if words[0] in ("up", "replace") and "--node" in words:
            node = words[words.index("--node") + 1]
            return _Place((*self.network.prefix(node), *self.disks.prefix), self.home / f"seen-from-{node}.toml")
        return _Place()

    # nodes

    def start(self, *nodes: str, wait: bool = True, extra: tuple[str, ...] = ()) -> None:
        """As machines do that boot: all at once; those that run are left alone."""
        self.find_running()
        missing = [node for node in nodes or NODES if node not in self.running]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: self.begin("up", "--node", node, "--no-wait", *extra).answer(), missing))
        self.find_running()
        for node in missing:
            if node not in self.running:
                raise BrokenPromiseError(f"{node} does not start:\n{self.log_tail(node)}")
            if wait:
                each = processes.Started(self.definition.node(node))
                processes.wait_ready(each, time.monotonic() + PATIENCE_S)

    def find_running(self) -> None:
        """Which nodes run is asked of the machine: `up`, `down` and `replace` change it."""
        for node, process in list(self.running.items()):
            if process.poll() is not None:
                self.ended(node)
        for node in NODES:
            if node not in self.running and (pid := processes.pid_of(self.definition.node(node))) is not None:
                with suppress(ProcessLookupError):
                    self.running[node] = Running(pid)

    def ended(self, node: str) -> None:
        """It ended, by `down` or by kill -9, which takes it out before; by itself it must not."""
        process = self.running.pop(node)
        if not any(answer.words[0] == "down" for answer in self.answers[-3:]):
            raise BrokenPromiseError(f"{node} ended by itself with {process.returncode}:\n{self.log_tail(node)}")

    def gone_by_itself(self, node: str) -> bool:
        """Whether it was started, and has ended with a refusal."""
        process = self.running.get(node)
        if process is not None and process.poll() is not None:
            self.running.pop(node)
        return node not in self.running and processes.pid_of(self.definition.node(node)) is None

    def close(self) -> None:
        with suppress(Exception):
            self.find_running()
        super().close()

    def lose(self, node: str) -> None:
        """Its disk is gone, and a new, empty one in its place."""
        self.kill([node])
        shutil.rmtree(self.definition.node(node).directory)

    # the definition

    def change(self, old: str, new: str) -> None:
        """Write it on every machine. Nodes read it when they start."""
        for path in (self.file, *(self.home / f"seen-from-{node}.toml" for node in NODES)):
            text = path.read_text()
            assert old in text, old
            path.write_text(text.replace(old, new))
        self.definition = load(self.file)
        self._seen = {node: load(self.home / f"seen-from-{node}.toml") for node in NODES}

    def _environment(self) -> dict[str, str]:
        return {**super()._environment(), "NO_COLOR": "1", "PATH": environment()["PATH"]}
