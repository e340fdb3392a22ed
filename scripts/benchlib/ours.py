"""blockrepl, driven as a user would: a definition file, `create`, `up`, `attach`, `down`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blockrepl.cli.client import call
from blockrepl.errors import BlockreplError
from scripts.benchlib import qemu_img
from scripts.benchlib.fio import BlockTarget, IscsiTarget, NbdTarget, fill
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.systems import Lag, Running, require_root
from scripts.benchlib.workspace import Workspace, command
from scripts.ports import free_port

_COMMAND = [sys.executable, "-m", "blockrepl.cli.main"]


@dataclass(frozen=True)
class Node:
    """A node of the group. Volumes lie at ``volumes`` primaries or secondaries, so each of these has an image."""

    name: str
    role: str
    nbd_port: int = 0
    iscsi_port: int = 0

    def table(self) -> str:
        lines = ["[[node]]", f'name = "{self.name}"', f'role = "{self.role}"', 'host = "local"']
        lines.append(f'directory = "{self.name}"')
        if self.role != "primary":
            lines.append(f'listen = "127.0.0.1:{free_port()}"')
        if self.nbd_port:
            lines.append(f'nbd = "127.0.0.1:{self.nbd_port}"')
        if self.iscsi_port:
            lines.append(f'iscsi = "127.0.0.1:{self.iscsi_port}"')
        return "\n".join(lines)


@dataclass(frozen=True)
class Volume:
    name: str
    secondary: str
    size_bytes: int
    frontend: str

    def table(self) -> str:
        lines = ["[[volume]]", f'name = "{self.name}"', f"size = {self.size_bytes}", 'primary = "p1"']
        return "\n".join([*lines, f'secondary = "{self.secondary}"', f'frontends = ["{self.frontend}"]'])


def definition(group: str, journal_bytes: int, nodes: list[Node], volumes: list[Volume]) -> str:
    """The text of a definition file."""
    head = f'[group]\nname = "{group}"\njournal = {journal_bytes}\nsecondary_journal = {journal_bytes}'
    return "\n\n".join([head, *(node.table() for node in nodes), *(volume.table() for volume in volumes)]) + "\n"


@contextmanager
def group(directory: Workspace, name: str, nodes: list[Node], volumes: list[Volume]) -> Iterator[Path]:
    """A running group; yields its definition file. Its nodes live in directories beside it."""
    home = directory.directory / name
    home.mkdir()
    file = home / "group.toml"
    file.write_text(definition(name, directory.journal_bytes, nodes, volumes))
    blockrepl(file, "create")
    try:
        blockrepl(file, "up")
        yield file
    finally:
        with suppress(NotAvailableError):
            blockrepl(file, "down")


def blockrepl(file: Path, *arguments: str) -> str:
    """Run one command on this definition; returns its output. Notes of running groups stay in the workspace."""
    env = {**os.environ, "BLOCKREPL_FILE": str(file), "BLOCKREPL_RUNTIME_DIR": str(file.parent / "run")}
    return command([*_COMMAND, *arguments], env=env)


def pids(file: Path, nodes: list[Node]) -> dict[str, int]:
    return {node.name: int((file.parent / node.name / "node.pid").read_text().split()[0]) for node in nodes}


def lag(intermediate: Path) -> Lag:
    """Of the secondary that is behind most, as the intermediate sees it: what `status` shows."""
    try:
        peers = call(intermediate, "status")["peers"]
    except BlockreplError as error:
        raise NotAvailableError(str(error)) from error
    return Lag(
        max((peer.get("lag_writes") or 0 for peer in peers), default=0),
        max((peer.get("lag_bytes") or 0 for peer in peers), default=0),
    )


def files(file: Path) -> tuple[Path, ...]:
    """Images and journals of all nodes."""
    return (*sorted(file.parent.glob("*/*.img")), *sorted(file.parent.glob("*/journal")))


@contextmanager
def nbd(directory: Workspace) -> Iterator[Running]:
    """A plain target: one volume without a pair."""
    port = free_port()
    nodes = [Node("p1", "primary", port)]
    volumes = [Volume("data", "none", directory.image_bytes, "nbd")]
    with group(directory, "bench-nbd", nodes, volumes) as file:
        target = NbdTarget(port, "data")
        fill(target, directory.image_bytes)
        yield Running(target, pids(file, nodes), files(file))


@contextmanager
def iscsi(directory: Workspace) -> Iterator[Running]:
    """A plain target as `nbd` is, over iSCSI."""
    port = free_port()
    nodes = [Node("p1", "primary", iscsi_port=port)]
    volumes = [Volume("data", "none", directory.image_bytes, "iscsi")]
    with group(directory, "bench-iscsi", nodes, volumes) as file:
        target = IscsiTarget(port, "iqn.2026-11.org.blockrepl:bench-iscsi", 0, directory.image_bytes)
        qemu_img.fill(target)
        yield Running(target, pids(file, nodes), files(file))


@contextmanager
def replicated(directory: Workspace) -> Iterator[Running]:
    """One primary, one intermediate, two secondaries with a volume each; the load goes to the first volume.

    The other secondary takes part in every prepare round all the same.
    """
    port = free_port()
    nodes = [Node("p1", "primary", port), Node("i1", "intermediate"), Node("s1", "secondary"), Node("s2", "secondary")]
    volumes = [Volume("data", "s1", directory.image_bytes, "nbd"), Volume("other", "s2", directory.image_bytes, "nbd")]
    with group(directory, "bench-replicated", nodes, volumes) as file:
        target = NbdTarget(port, "data")
        fill(target, directory.image_bytes)
        yield Running(target, pids(file, nodes), files(file), partial(lag, file.parent / "i1"))


@contextmanager
def loop(directory: Workspace) -> Iterator[Running]:
    """A plain target behind a loop device of ours."""
    require_root("a loop device")
    nodes = [Node("p1", "primary")]
    volumes = [Volume("data", "none", directory.image_bytes, "loop")]
    with group(directory, "bench-loop", nodes, volumes) as file:
        device = Path(blockrepl(file, "attach", "bench-loop/data").strip())
        try:
            target = BlockTarget(device)
            fill(target, directory.image_bytes)
            yield Running(target, pids(file, nodes), files(file))
        finally:
            with suppress(NotAvailableError):
                blockrepl(file, "detach", "bench-loop/data")
