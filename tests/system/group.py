"""A real group: processes on free ports, in a temporary directory. Tests wait for conditions, never for time."""

from __future__ import annotations

import filecmp
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from blockrepl.cli import processes
from blockrepl.cli.client import call
from blockrepl.definition import Definition, Node, load
from blockrepl.errors import BlockreplError
from blockrepl.node.create import create, image_path
from scripts.ports import free_ports
from tests.demo.nbd_client import NbdVolume
from tests.demo.records import RECORD_BYTES, Ledger, Verdict, found, judge
from tests.patience import patient

ROOT = Path(__file__).parents[2]
TIMEOUT_S = patient(90.0)  # for a busy machine
POLL_S = 0.02
MIB = 1 << 20
MEMORY_LIMIT_BYTES = 250 * MIB
PRIMARIES, SECONDARIES = ("p1", "p2"), ("s1", "s2")
ALL = ("s1", "s2", "i1", "p1", "p2")  # in the order of starting
# A machine that stalls must not make links end or hosts see errors where a test is about neither.
CALM = {"link_timeout_s": patient(15.0), "hold_s": patient(300.0)}
VOLUMES = {"data": ("p1", "s1"), "log": ("p2", "s2"), "index": ("p1", "s2")}
A, B = "data", "log"  # where the ordered writer writes


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true; returns what it gave. Fails after a generous time."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {TIMEOUT_S:g} s: {what}")
        time.sleep(POLL_S)


class RealGroup:
    """Two primaries, an intermediate, two secondaries, three volumes. Use as a context: it ends every process."""

    def __init__(
        self, folder: Path, *, journal: str = "64MiB", secondary_journal: str = "64MiB",
        sizes: dict[str, str] | None = None, policy: str = "", keys: str = "", iscsi_portals: int = 0, more: str = "",
    ) -> None:  # fmt: skip
        """``keys``: more lines of the table [group]; ``iscsi_portals``: of each primary and secondary; ``more``: lines
        at the end."""
        self.folder = folder
        self.path = folder / "group.toml"
        self._portals = iscsi_portals
        self.path.write_text(self._text(journal, secondary_journal, sizes or {}, policy, keys) + more)
        self.definition: Definition = load(self.path)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[Any]] = []

    def _text(self, journal: str, secondary_journal: str, sizes: dict[str, str], policy: str, keys: str) -> str:
        ports = iter(free_ports((2 + self._portals) * len(ALL)))
        lines = ["[group]", 'name = "system"', f'journal = "{journal}"', f'secondary_journal = "{secondary_journal}"']
        lines += [keys, "[policy]", policy]
        lines += [f"{key} = {value}" for key, value in CALM.items() if key not in policy]
        unseen = () if "volumes" in keys else ("intermediate",)
        for name in sorted(ALL):
            role = {"p": "primary", "i": "intermediate", "s": "secondary"}[name[0]]
            lines += ["[[node]]", f'name = "{name}"', f'role = "{role}"', f'directory = "{name}"']
            lines += [f'listen = "127.0.0.1:{next(ports)}"']
            lines += [] if role in unseen else [f'nbd = "127.0.0.1:{next(ports)}"']
            if self._portals and role != "intermediate":
                portals = ", ".join(f'"127.0.0.1:{next(ports)}"' for _ in range(self._portals))
                lines += [f"iscsi = [{portals}]"]
        for name, (primary, secondary) in VOLUMES.items():
            lines += ["[[volume]]", f'name = "{name}"', f'size = "{sizes.get(name, "64MiB")}"']
            lines += [f'primary = "{primary}"', f'secondary = "{secondary}"']
        return "\n".join(lines) + "\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._others, *self._processes.values()]:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(TIMEOUT_S)
            if process.stdout is not None:
                process.stdout.close()

    def change(self, old: str, new: str) -> None:
        """Another definition, for nodes that start from now on."""
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new))
        self.definition = load(self.path)

    # nodes

    def node(self, name: str) -> Node:
        return self.definition.node(name)

    def create(self) -> Self:
        for node in self.definition.nodes:
            create(self.definition, node)
        return self

    def start(self, *names: str, wait: bool = True, options: tuple[str, ...] = ()) -> Self:
        """Start nodes (all by default) and wait until they are ready. ``options``: of `serve`."""
        started = [processes.start(self.definition, self.node(name), options) for name in names or ALL]
        for each in started:
            assert each.process is not None
            self._processes[each.node.name] = each.process
        if wait:
            for each in started:
                processes.wait_ready(each, time.monotonic() + TIMEOUT_S)
        return self

    def kill(self, *names: str) -> None:
        """kill -9, all at once; returns when they are gone."""
        for name in names:
            self._processes[name].send_signal(signal.SIGKILL)
        for name in names:
            self._processes.pop(name).wait(TIMEOUT_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        self._processes[name].send_signal(number)

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def ended(self, name: str) -> int:
        """The exit status of a node that ends by itself."""
        return self._processes.pop(name).wait(TIMEOUT_S)

    def status(self, name: str) -> dict[str, Any]:
        return call(self.node(name).directory, "status", timeout_s=TIMEOUT_S)

    def marks(self, name: str) -> dict[str, Any]:
        marks: dict[str, Any] = self.status(name)["watermarks"]
        return marks

    def log(self, name: str) -> str:
        return (self.node(name).directory / "node.log").read_text()

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command as a user gives it."""
        argv = [sys.executable, "-m", "blockrepl.cli.main", *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "BLOCKREPL_FILE": str(self.path)}
        return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=2 * TIMEOUT_S, check=False)

    def takeover(self, **args: Any) -> dict[str, Any]:
        """Led by the first secondary."""
        return call(self.node("s1").directory, "takeover", args, timeout_s=2 * TIMEOUT_S)

    # hosts

    def uri(self, volume: str, *, secondary: bool = False) -> str:
        node = self.node(VOLUMES[volume][1 if secondary else 0])
        return f"nbd://{node.nbd}/{volume}"

    def open(self, volume: str, *, secondary: bool = False, timeout_s: float = TIMEOUT_S) -> NbdVolume:
        return NbdVolume(self.uri(volume, secondary=secondary), timeout_s)

    def run(self, argv: list[str]) -> subprocess.Popen[str]:
        """A process of a host, in the background."""
        process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._others.append(process)
        return process

    def fio(self, *arguments: str, volumes: Iterable[str] = (A, B)) -> subprocess.Popen[str]:
        """fio on NBD exports, in the background."""
        jobs = [part for volume in volumes for part in (f"--name={volume}", f"--uri={self.uri(volume)}")]
        return self.run(["fio", "--ioengine=nbd", "--thread", "--verify_state_save=0", *arguments, *jobs])

    # quiet

    def settle(self) -> int:
        """Wait until everything numbered is applied at every secondary. Returns the last number."""

        def settled() -> int:
            marks = self.marks("i1")
            numbered = int(marks["numbered"])
            quiet = marks["validated"] == numbered and all(
                self.marks(name)["applied"] == numbered for name in SECONDARIES
            )
            return numbered if quiet and not any(self.status(name)["pending"]["batches"] for name in PRIMARIES) else 0

        return int(wait_for(settled, "everything numbered is applied"))

    def images(self, volume: str) -> tuple[Path, Path]:
        """(P-VOL, S-VOL)."""
        found = self.definition.volume(volume)
        primary, secondary = (image_path(self.node(name), found) for name in VOLUMES[volume])
        return primary, secondary

    def differing(self) -> list[str]:
        """Volumes whose images differ now."""
        return [name for name in VOLUMES if not filecmp.cmp(*self.images(name), shallow=False)]


class OrderedLoad:
    """The ordered writer on volumes A and B, its acknowledged writes in a ledger outside the group."""

    def __init__(self, group: RealGroup) -> None:
        self._group = group
        self._run_id = os.urandom(16)
        self.ledger = Ledger(group.folder / "ledger", fresh=True)
        arguments = [str(group.folder / "ledger"), self._run_id.hex(), group.uri(A), group.uri(B)]
        self.process = group.run([sys.executable, "-m", "tests.demo.writer", *arguments])

    def wait_for_more(self, count: int = 20) -> None:
        """Until so many more records are acknowledged on both volumes."""
        target = self.ledger.read()[1] + count
        wait_for(lambda: self.ledger.read()[1] >= target or self.process.poll() is not None, f"record {target}")
        assert self.process.poll() is None, self.process.stdout and self.process.stdout.read()

    def finish(self) -> None:
        """Its disk is dead: it ends by itself."""
        self.process.wait(TIMEOUT_S)

    def judge(self, *, secondary: bool) -> Verdict:
        """What the volumes hold, against what was acknowledged."""
        contents = [found(self._run_id, self._blocks(name, secondary)) for name in (A, B)]
        return judge(contents[0], contents[1], *self.ledger.read())

    def _blocks(self, name: str, secondary: bool) -> Iterator[bytes]:
        volume = self._group.open(name, secondary=secondary)
        for start in range(0, volume.size_bytes, MIB):
            chunk = volume.read(start, MIB)
            yield from (chunk[at : at + RECORD_BYTES] for at in range(0, MIB, RECORD_BYTES))
        volume.close()


def peak_memory_bytes(pid: int) -> int:
    """VmHWM of proc_pid_status(5)."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def written_bytes(pid: int) -> int:
    """All that a process has written so far, to files and sockets: wchar of proc_pid_io(5)."""
    match = re.search(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
    assert match is not None
    return int(match[1])


def read_bytes(pid: int) -> int:
    """All that a process has read so far, from files and sockets: rchar of proc_pid_io(5)."""
    match = re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
    assert match is not None
    return int(match[1])


def answers(call_it: Callable[[], Any]) -> Any:
    """What a call gives, None while the node cannot answer."""
    try:
        return call_it()
    except BlockreplError:
        return None
