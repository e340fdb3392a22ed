"""NBD servers in C, and QEMU's mirror: synchronous too, but to the page cache of the other side only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripts.benchlib.fio import NbdTarget
from scripts.benchlib.process import Child, NotAvailableError, listens, running
from scripts.benchlib.systems import Running
from scripts.benchlib.workspace import Workspace
from scripts.ports import free_port

_MIRROR_TIMEOUT_S = 120.0


@contextmanager
def nbdkit_server(directory: Workspace, name: str, image: Path) -> Iterator[tuple[Child, int]]:
    """nbdkit's file plugin, with its default of 16 threads."""
    port = free_port()
    argv = ["nbdkit", "--foreground", "--ipaddr=127.0.0.1", f"--port={port}", "file", str(image)]
    with running(argv, directory.log(name)) as child:
        child.wait_until(lambda: listens(port), "it does not listen")
        yield child, port


@contextmanager
def nbdkit(directory: Workspace) -> Iterator[Running]:
    image = directory.image("nbdkit")
    with nbdkit_server(directory, "nbdkit", image) as (child, port):
        yield Running(NbdTarget(port), {"nbdkit": child.pid}, (image,))


@contextmanager
def qemu_nbd_server(directory: Workspace, name: str, image: Path) -> Iterator[tuple[Child, int]]:
    """qemu-nbd with its default cache mode (writeback); ``--export-name`` is empty."""
    port = free_port()
    argv = ["qemu-nbd", "--format=raw", "--persistent", "--shared=16", "--bind=127.0.0.1", f"--port={port}", str(image)]
    with running(argv, directory.log(name)) as child:
        child.wait_until(lambda: listens(port), "it does not listen")
        yield child, port


@contextmanager
def qemu_nbd(directory: Workspace) -> Iterator[Running]:
    image = directory.image("qemu-nbd")
    with qemu_nbd_server(directory, "qemu-nbd", image) as (child, port):
        yield Running(NbdTarget(port), {"qemu-nbd": child.pid}, (image,))


@contextmanager
def qemu_mirror(directory: Workspace) -> Iterator[Running]:
    """qemu-storage-daemon exports a node that a mirror job copies, write-blocking, to a second qemu-nbd."""
    source, copy = directory.image("qemu-mirror-source"), directory.image("qemu-mirror-copy")
    port = free_port()
    with qemu_nbd_server(directory, "qemu-mirror-copy", copy) as (second, copy_port):
        argv = ["qemu-storage-daemon", "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
        argv += ["--blockdev", f"driver=file,node-name=source,filename={source}"]
        argv += ["--blockdev", _nbd_client(copy_port)]
        argv += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"]
        argv += ["--export", "type=nbd,id=export,node-name=source,name=bench,writable=on"]
        with running(argv, directory.log("qemu-mirror"), pipes=True) as first:
            first.wait_until(lambda: listens(port), "it does not listen")
            _start_mirror(Qmp(first))
            yield Running(
                NbdTarget(port, "bench"), {"qemu-storage-daemon": first.pid, "qemu-nbd": second.pid}, (source, copy)
            )


def _nbd_client(port: int) -> str:
    return f"driver=nbd,node-name=copy,server.type=inet,server.host=127.0.0.1,server.port={port}"


def _start_mirror(qmp: Qmp) -> None:
    qmp.execute("qmp_capabilities", {})
    arguments = {"job-id": "mirror", "device": "source", "target": "copy", "sync": "full"}
    qmp.execute("blockdev-mirror", {**arguments, "copy-mode": "write-blocking"})
    qmp.wait_for_event("BLOCK_JOB_READY")


class Qmp:
    """The few messages of QEMU's monitor (QMP specification) that a mirror needs, over a child's pipes."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._events: list[str] = []

    def execute(self, command: str, arguments: dict[str, str]) -> None:
        line = json.dumps({"execute": command, "arguments": arguments})
        self._child.stdin.write(line.encode() + b"\n")
        while "return" not in (message := self._message()):
            if "error" in message:
                raise NotAvailableError(f"{self._child.name}: {command}: {message['error']['desc']}")

    def wait_for_event(self, name: str) -> None:
        while name not in self._events:
            if "BLOCK_JOB_COMPLETED" in self._events:
                raise NotAvailableError(f"{self._child.name}: the mirror job ended early")
            self._message()

    def _message(self) -> dict[str, Any]:
        """The next line. The job copies the whole volume first, so this may take seconds, and no longer."""
        line = self._child.read_line(_MIRROR_TIMEOUT_S)
        if not line:
            raise NotAvailableError(f"{self._child.name}: the monitor closed")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message
