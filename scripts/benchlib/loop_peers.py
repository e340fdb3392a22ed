"""Kernel loop devices over FUSE files that C programs serve."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scripts.benchlib.fio import BlockTarget
from scripts.benchlib.nbd_peers import nbdkit_server
from scripts.benchlib.process import running
from scripts.benchlib.systems import Running, require_root
from scripts.benchlib.workspace import Workspace, command

_DETACH_TIMEOUT_S = 30.0


@contextmanager
def losetup(path: Path) -> Iterator[Path]:
    """A loop device with direct I/O over ``path``; gone at the end, in time for its server to end after it."""
    try:
        yield Path(command(["losetup", "--find", "--show", "--direct-io=on", str(path)]).strip())
    finally:
        # Asked of the kernel, not remembered: an interrupt may come between the device and its name.
        for device in devices_over(path):
            subprocess.run(["losetup", "--detach", str(device)], capture_output=True, check=False, timeout=30)
        deadline_s = time.monotonic() + _DETACH_TIMEOUT_S  # a detach is lazy while someone (udev) has it open
        while devices_over(path) and time.monotonic() < deadline_s:
            time.sleep(0.02)


def devices_over(path: Path) -> list[Path]:
    """Loop devices whose backing file is ``path``."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if file.read_text().rstrip("\n") == str(path.absolute()):
                found.append(Path("/dev") / file.parent.parent.name)
    return found


@contextmanager
def unmounted_at_the_end(path: Path) -> Iterator[None]:
    """What a server that was killed leaves mounted is unmounted."""
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], capture_output=True, check=False, timeout=30)


@contextmanager
def qemu_fuse(directory: Workspace) -> Iterator[Running]:
    """losetup over the FUSE export of qemu-storage-daemon."""
    require_root("a loop device")
    image = directory.image("loop-qemu-fuse")
    mount = directory.directory / "loop-qemu-fuse.mount"
    mount.touch()
    argv = ["qemu-storage-daemon", "--blockdev", f"driver=file,node-name=image,filename={image}"]
    argv += ["--export", f"type=fuse,id=export,node-name=image,mountpoint={mount},writable=on"]
    with unmounted_at_the_end(mount), running(argv, directory.log("loop-qemu-fuse")) as child:
        child.wait_until(lambda: mount.stat().st_size == directory.image_bytes, "nothing is mounted")
        with losetup(mount) as device:
            yield Running(BlockTarget(device), {"qemu-storage-daemon": child.pid}, (image,))


@contextmanager
def nbdfuse(directory: Workspace) -> Iterator[Running]:
    """losetup over nbdfuse over nbdkit."""
    require_root("a loop device")
    image = directory.image("loop-nbdfuse")
    mount = directory.directory / "loop-nbdfuse"
    mount.mkdir()
    file = mount / "nbd"
    with nbdkit_server(directory, "loop-nbdfuse-nbdkit", image) as (server, port), unmounted_at_the_end(mount):
        argv = ["nbdfuse", str(file), f"nbd://127.0.0.1:{port}"]
        with running(argv, directory.log("loop-nbdfuse")) as child:
            child.wait_until(file.exists, "nothing is mounted")
            with losetup(file) as device:
                yield Running(BlockTarget(device), {"nbdfuse": child.pid, "nbdkit": server.pid}, (image,))
