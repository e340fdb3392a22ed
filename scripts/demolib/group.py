"""The demo's group: its own copy of targets/demo.toml, run with the commands that a user would type."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockrepl.cli.asking import node_statuses
from blockrepl.cli.processes import pid_of
from blockrepl.definition import Definition, Node, load
from blockrepl.frontends.loop.leftovers import clean_leftovers
from scripts.demolib.errors import DemoError
from scripts.demolib.process import Background, environment, run
from scripts.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
FILE_NAME = "demo.toml"
SOURCE = ROOT / "targets" / "demo.toml"
BLOCKREPL = (sys.executable, "-P", "-m", "blockrepl.cli.main")
BROKEN = (sys.executable, "-m", "tests.demo.broken_node")
LINE_DELAY_S = 0.3
FAR = "s1"  # the secondary behind the long line
READY_S = 90


def write_definition(home: Path, port_base: int | None) -> None:
    """A copy of targets/demo.toml whose nodes live in ``home``, at its own ports or at others."""
    text = SOURCE.read_text().replace('"../images/demo/', '"')
    if port_base is not None:
        ports = dict.fromkeys(re.findall(r'"127\.0\.0\.1:(\d+)"', text))
        moved = {port: str(port_base + place) for place, port in enumerate(ports)}
        text = re.sub(r'(?<="127\.0\.0\.1:)\d+', lambda match: moved[match[0]], text)
    (home / FILE_NAME).write_text(text)


class Group:
    """All nodes of the demo. ``say`` tells people what is done."""

    def __init__(self, home: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """The group whose definition `write_definition` put into ``home``."""
        self.home = home
        self.say = say
        self.file = home / FILE_NAME
        self.definition: Definition = load(self.file)
        self._line: Background | None = None
        self._broken: list[Background] = []

    @property
    def name(self) -> str:
        """As in the definition."""
        return self.definition.name

    # what must be free

    def check_ports(self) -> None:
        """Raises DemoError that names the port that is taken, and by whom it would be used."""
        for node in self.definition.nodes:
            for address in (node.listen, node.nbd):
                if address is not None:
                    _check_port(node, address.host, address.port)

    # life

    def command(self, *arguments: str) -> str:
        """Run one blockrepl command on the group; returns its stdout."""
        self.say(f"$ blockrepl {' '.join(arguments)}".replace(f"{self.home}/", ""))
        return run([*BLOCKREPL, *arguments], env=self._environment())

    def _environment(self) -> dict[str, str]:
        runtime = str(self.home / "run")
        return environment(PYTHONPATH=str(ROOT), BLOCKREPL_FILE=str(self.file), BLOCKREPL_RUNTIME_DIR=runtime)

    def create(self) -> None:
        """Journals, images, identities: afresh."""
        for node in self.definition.nodes:
            if node.directory.exists():
                shutil.rmtree(node.directory)
        self.command("create", str(self.file))

    def up(self, *, broken: bool) -> None:
        """Start every node; the line first, so that the intermediate finds it."""
        near = self._begin_line()
        if broken:
            for node in self.definition.secondaries:
                serve = ["serve", str(self.file), "--node", node.name]
                log = node.directory / "node.log"
                self._broken.append(Background([*BROKEN, *serve], log, env=self._environment()))
        self.command("up", str(near), "--node", self.definition.intermediate.name, "--no-wait")
        self.command("up", str(self.file), "--timeout", str(READY_S))

    def _begin_line(self) -> Path:
        """Start the line. Returns the intermediate's definition, where the far secondary is at the line's end."""
        port, far_port = free_port(), self.definition.node(FAR).address.port
        argv = [sys.executable, "-m", "tests.demo.slow_line", str(port), str(far_port), str(LINE_DELAY_S)]
        self._line = Background(argv, self.home / "line.log", env=self._environment())
        while not self._line.words():
            if self._line.ended():
                raise DemoError("the long line does not start")
            time.sleep(0.02)
        near = self.home / "demo-seen-from-i1.toml"
        near.write_text(self.file.read_text().replace(f":{far_port}", f":{port}"))
        return near

    def statuses(self) -> list[dict[str, Any]]:
        """What each node says of itself."""
        return node_statuses(self.definition)

    def attach(self, volume: str) -> str:
        """The volume's loop device."""
        return self.command("attach", f"{self.name}/{volume}").strip()

    def nbd_uri(self, volume: str, *, secondary: bool) -> str:
        """Where hosts find it."""
        found = self.definition.volume(volume)
        node = self.definition.node(found.secondary if secondary else found.primary)
        return f"nbd://{node.nbd}/{volume}"

    def takeover(self) -> dict[str, Any]:
        """The result as JSON has it."""
        result: dict[str, Any] = json.loads(self.command("takeover", self.name, "--json"))
        return result

    # disaster

    def kill(self, nodes: Iterable[Node], *, cut_line: bool) -> float:
        """kill -9, all at once. Returns the monotonic time just before."""
        pids = [pid for node in nodes if (pid := pid_of(node)) is not None]
        pidfds = [os.pidfd_open(pid) for pid in pids]
        if cut_line and self._line is not None:
            pids.append(self._line.process.pid)
        began_s = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pidfd in pidfds:
            _gone(pidfd)
        if cut_line and self._line is not None:
            self._line.kill()
        return began_s

    # end

    def down(self) -> None:
        """Stop everything and undo what killed nodes left: processes, loop devices, mounts of theirs."""
        with suppress(DemoError):
            run([*BLOCKREPL, "down", str(self.file)], env=self._environment())
        for node in self.definition.nodes:
            if (pid := pid_of(node)) is not None:
                with suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(pid)
                    os.kill(pid, signal.SIGKILL)
                    _gone(pidfd)
        for process in (*self._broken, *([self._line] if self._line else [])):
            process.kill()
        self._broken, self._line = [], None
        for node in self.definition.nodes:
            clean_leftovers(node.directory)


def _gone(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        if not poll.poll(READY_S * 1000):
            raise DemoError("a killed process does not end: it waits for its disk")
    finally:
        os.close(pidfd)


def _check_port(node: Node, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"{host}:{port}, where node {node.name} of {SOURCE.relative_to(ROOT)} belongs: {error.strerror}.\n"
                f"Stop what uses it (ss -ltnp 'sport = :{port}' names it; `blockrepl down` if it is this group), "
                "or move the demo: --port-base 20000",
                2,
            ) from None
