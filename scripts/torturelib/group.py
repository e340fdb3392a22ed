"""A group to be tortured: two primaries, an intermediate, two secondaries, three volumes, and its processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from blockrepl.cli import processes
from blockrepl.cli.client import call
from blockrepl.definition import Definition, Volume, load
from blockrepl.errors import BlockreplError
from blockrepl.frontends.loop import device as loop_device
from blockrepl.frontends.loop.leftovers import clean_leftovers
from blockrepl.node.create import create, image_path
from scripts.demolib.group import BLOCKREPL, ROOT
from scripts.demolib.process import attempt, environment
from scripts.torturelib.disks import Disks
from scripts.torturelib.errors import BrokenPromiseError, TortureError
from scripts.torturelib.network import Network

PRIMARIES, SECONDARIES, INTERMEDIATE = ("p1", "p2"), ("s1", "s2"), "i1"
NODES = (*SECONDARIES, INTERMEDIATE, *PRIMARIES)  # in the order of starting
SITES = (PRIMARIES, SECONDARIES)
SITE_NAMES = ("primary", "secondary")
PLACES = {"data": ("p1", "s1"), "log": ("p2", "s2"), "index": ("p1", "s2")}
NAMES = tuple(PLACES)  # a volume's number is its place here
VOLUME_MIB = 320  # the least that mkfs.xfs takes
PATIENCE_S = 300.0  # a machine may be several times slower, and busy with other things
POLL_S = 0.02
POLICY = {"heartbeat_s": "0.3", "link_timeout_s": "1.5", "hold_s": "30.0", "checkpoint_s": "1.0"}


class Process(Protocol):
    """A node's, as far as a torture is concerned."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, number: signal.Signals) -> None: ...


class Group:
    """``say`` tells what is done to it."""

    def __init__(
        self, home: Path, network: Network, disks: Disks, say: Callable[[str], None], *,
        journal: str, policy: dict[str, str] | None = None, keys: Sequence[str] = (), bug: str = "",
        volume_mib: int = VOLUME_MIB,
    ) -> None:  # fmt: skip
        """``bug``: one of tests/torture/broken_node.py, planted in every node."""
        self._bug = bug
        self.home, self.network, self.disks, self.say = home, network, disks, say
        self.name = "torture"
        text = self._text(journal, {**POLICY, **(policy or {})}, keys, volume_mib)
        self.file = home / "group.toml"
        self.file.write_text(text)
        self.definition: Definition = load(self.file)
        self._seen: dict[str, Definition] = {}
        for node in NODES:
            path = home / f"seen-from-{node}.toml"
            path.write_text(network.seen_from(node, text))
            self._seen[node] = load(path)
        self.running: dict[str, Process] = {}
        self.stopped: set[str] = set()
        self._devices: dict[str, int] = {}  # that are attached, each held open
        self.direction = 0  # the site where hosts are

    def _text(self, journal: str, policy: dict[str, str], keys: Sequence[str], volume_mib: int) -> str:
        lines = [
            "[group]",
            f'name = "{self.name}"',
            f'journal = "{journal}"',
            f'secondary_journal = "{journal}"',
            *keys,
        ]
        lines += ["[policy]", *(f"{key} = {value}" for key, value in policy.items())]
        for node in sorted(NODES):
            role = {"p": "primary", "i": "intermediate", "s": "secondary"}[node[0]]
            lines += ["[[node]]", f'name = "{node}"', f'role = "{role}"', f'directory = "{node}"']
            lines += [f'listen = "{self.network.link_address(node)}"']
            lines += [] if role == "intermediate" else [f'nbd = "{self.network.nbd_address(node)}"']
        for name, (primary, secondary) in PLACES.items():
            lines += ["[[volume]]", f'name = "{name}"', f'size = "{volume_mib}MiB"']
            lines += [f'primary = "{primary}"', f'secondary = "{secondary}"']
        return "\n".join(lines) + "\n"

    @property
    def sources(self) -> tuple[str, ...]:
        """Where hosts are."""
        return SITES[self.direction]

    @property
    def targets(self) -> tuple[str, ...]:
        """The other site."""
        return SITES[1 - self.direction]

    # life

    def create(self) -> None:
        """Disks, journals, images."""
        self.disks.make()
        for node in self.definition.nodes:
            create(self.definition, node)
        if self.disks.lose_power:
            os.sync()  # the disks are new, and so is what lies on them

    def start(self, *nodes: str, wait: bool = True, extra: tuple[str, ...] = ()) -> None:
        """All by default; those that run are left alone."""
        started = []
        for node in nodes or NODES:
            if node in self.running and self.running[node].poll() is None:
                continue
            definition = self._seen[node]
            directory = definition.node(node).directory
            with (directory / processes.LOG_NAME).open("ab") as log:
                offset_bytes = log.tell()
                process = subprocess.Popen(
                    [*self.network.prefix(node), *self.disks.prefix, *self._serve(definition, node), *extra],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=self._environment(),
                    start_new_session=True,
                )  # fmt: skip
            self.running[node] = process
            started.append(processes.Started(definition.node(node), process, offset_bytes))
        if wait:
            for each in started:
                processes.wait_ready(each, time.monotonic() + PATIENCE_S)

    def _serve(self, definition: Definition, node: str) -> list[str]:
        argv = processes.serve_command(definition, definition.node(node))
        if not self._bug:
            return argv
        return [sys.executable, "-m", "tests.torture.broken_node", self._bug, *argv[argv.index("serve") :]]

    def _environment(self) -> dict[str, str]:
        return environment(
            PYTHONPATH=str(ROOT), BLOCKREPL_FILE=str(self.file), BLOCKREPL_RUNTIME_DIR=str(self.home / "run")
        )

    def alive(self, nodes: Iterable[str] = NODES) -> list[str]:
        """Those that run and are not stopped."""
        return [node for node in nodes if node in self.running and node not in self.stopped]

    def signal_kill(self, nodes: Iterable[str]) -> Callable[[], None]:
        """kill -9, all at once; call the answer to wait until they are gone."""
        dying = [self.running.pop(node) for node in nodes if node in self.running]
        self.stopped.difference_update(nodes)
        for process in dying:
            process.send_signal(signal.SIGKILL)

        def gone() -> None:
            for process in dying:
                try:
                    process.wait(PATIENCE_S)
                except subprocess.TimeoutExpired:
                    raise BrokenPromiseError("a node survives kill -9: it waits for its disk") from None

        return gone

    def kill(self, nodes: Iterable[str]) -> None:
        """kill -9; returns when they are gone."""
        self.signal_kill(list(nodes))()

    def stop(self, nodes: Iterable[str]) -> None:
        """SIGSTOP."""
        for node in self.alive(nodes):
            self.running[node].send_signal(signal.SIGSTOP)
            self.stopped.add(node)

    def go_on(self) -> None:
        """SIGCONT for whoever is stopped."""
        for node in self.stopped:
            if node in self.running:
                self.running[node].send_signal(signal.SIGCONT)
        self.stopped.clear()

    def cut_power(self, nodes: Sequence[str], seed: str) -> dict[str, int]:
        """Of these nodes' machines; nothing runs there afterwards."""
        return self.disks.cut_power(nodes, lambda: self.signal_kill(nodes), seed)

    def check_running(self) -> None:
        """Raises BrokenPromiseError when a node ended by itself."""
        for node, process in self.running.items():
            if process.poll() is not None:
                raise BrokenPromiseError(f"{node} ended by itself with {process.returncode}:\n{self.log_tail(node)}")

    def log_tail(self, node: str, lines: int = 12) -> str:
        """The end of its log."""
        with suppress(OSError):
            text = (self.definition.node(node).directory / processes.LOG_NAME).read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    # commands and questions

    def command(self, *arguments: str) -> str:
        """What a user types; returns stdout. Raises TortureError with what it said."""
        self.say(f"$ blockrepl {' '.join(arguments)}")
        done = attempt([*BLOCKREPL, *arguments], env=self._environment())
        if done.returncode != 0:
            raise TortureError(f"blockrepl {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def attach(self, volume: str) -> str:
        """The volume's loop device, where it is active."""
        device = self.command("attach", f"{self.name}/{volume}").strip()
        if device not in self._devices:
            self._devices[device] = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
            loop_device.free(device)  # we use it, so it frees itself with us: nobody else does when we are killed
        return device

    def ask(self, node: str, command: str, **args: Any) -> dict[str, Any]:
        """A node's control socket. Raises BlockreplError."""
        return call(self.definition.node(node).directory, command, args, timeout_s=PATIENCE_S)

    def takeover(self, leader: str, **args: Any) -> dict[str, Any]:
        """Led by a secondary. Raises BlockreplError."""
        self.say(f"takeover led by {leader}" + (f" {json.dumps(args)}" if args else ""))
        return call(self.definition.node(leader).directory, "takeover", args, timeout_s=PATIENCE_S)

    def status(self, node: str) -> dict[str, Any]:
        """Empty while it does not answer."""
        try:
            return call(self.definition.node(node).directory, "status", timeout_s=5.0)
        except BlockreplError:
            return {}

    def marks(self, node: str) -> dict[str, Any]:
        """Its watermarks."""
        return dict(self.status(node).get("watermarks") or {})

    def nbd_uri(self, volume: str, *, secondary: bool) -> str:
        """Where hosts find it."""
        return f"nbd://{self.network.nbd_address(PLACES[volume][1 if secondary else 0])}/{volume}"

    def image(self, volume: str, site: int) -> Path:
        """Its file."""
        found: Volume = self.definition.volume(volume)
        return image_path(self.definition.node(PLACES[volume][site]), found)

    # quiet

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll. Raises BrokenPromiseError when it does not come."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            self.check_running()
            if time.monotonic() > deadline_s:
                states = {node: self.status(node).get("state", "silent") for node in NODES}
                raise BrokenPromiseError(f"not within {PATIENCE_S:g} s: {what}; the nodes are {states}")
            time.sleep(POLL_S)
        return value

    def heal(self) -> None:
        """Links whole, everybody runs and is ready."""
        self.network.heal()
        self.go_on()
        self.check_running()
        self.start(wait=False)
        self.wait_for(lambda: all(self.status(node).get("ready") for node in NODES), "every node is ready again")

    def settle(self) -> int:
        """Wait until everything numbered is applied everywhere. Returns the last number."""

        def settled() -> bool:
            marks = self.marks(INTERMEDIATE)
            numbered = marks.get("numbered")
            return (
                numbered is not None
                and marks["validated"] == numbered
                and all(self.marks(node).get("applied") == numbered for node in self.targets)
                and not any(self.status(node).get("pending", {}).get("batches", 1) for node in self.sources)
            )

        self.wait_for(settled, "everything numbered is applied")
        return int(self.marks(INTERMEDIATE)["numbered"])

    # end

    def close(self) -> None:
        """Nothing of it runs, is mounted, or remains. Never raises."""
        with suppress(Exception):
            self.network.heal()
        with suppress(Exception):
            self.kill(NODES)
        for fd in self._devices.values():
            os.close(fd)
        for node in self.definition.nodes:
            with suppress(Exception):
                clean_leftovers(node.directory)
        self.disks.close()
        self.network.close()
        for name in NODES:
            shutil.rmtree(self.home / name, ignore_errors=True)
