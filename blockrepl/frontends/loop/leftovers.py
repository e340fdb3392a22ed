"""What a killed process left behind: loop devices and mounts whose server is dead.

A front end holds a lock for as long as it lives (the kernel drops it with the process, whatever killed it), so
another process can tell leftovers from what is in use without touching a file that might not answer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blockrepl.errors import InUseError
from blockrepl.frontends.loop import device, system

DIRECTORY = "loop"
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Leftover:
    """``kind`` is "device" or "mount"; ``path`` the device or mount point; ``backing`` the file under a device."""

    kind: str
    path: str
    backing: str
    users: tuple[str, ...] = ()

    def __str__(self) -> str:
        used = f", {'; '.join(self.users)}" if self.users else ""
        return (
            f"{self.path} (loop device over {self.backing}{used})" if self.kind == "device" else f"{self.path} (mount)"
        )


def lock(runtime_dir: Path) -> int:
    """The descriptor that makes this process the owner of ``runtime_dir``/loop. Raises InUseError."""
    path = runtime_dir / DIRECTORY / LOCK
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InUseError(f"{path.parent}: another process serves loop devices here") from error
    return fd


def find_leftovers(runtime_dir: Path) -> list[Leftover]:
    """What nobody serves any more; empty while a live process owns the directory. Waits for nobody."""
    if not (runtime_dir / DIRECTORY).is_dir():
        return []
    try:
        fd = lock(runtime_dir)
    except (InUseError, PermissionError):
        return []
    try:
        return list(_find(runtime_dir))
    finally:
        os.close(fd)


def clean_leftovers(runtime_dir: Path) -> list[str]:
    """Free the devices and unmount; returns what was done, one phrase each. Does nothing to what is in use."""
    if not (runtime_dir / DIRECTORY).is_dir():
        return []
    try:
        fd = lock(runtime_dir)
    except (InUseError, PermissionError):
        return []
    try:
        return clean_locked(runtime_dir)
    finally:
        os.close(fd)


def clean_locked(runtime_dir: Path) -> list[str]:
    """`clean_leftovers` for the owner of the lock, before it serves anything."""
    done = []
    for leftover in _find(runtime_dir):
        if leftover.kind == "device":
            if device.free(leftover.path):
                done.append(f"freed {leftover}")
            else:
                done.append(f"{leftover.path} frees itself when it is unused: {'; '.join(leftover.users) or 'open'}")
        else:
            with contextlib.suppress(OSError):
                system.unmount(leftover.path, lazily=True)
                done.append(f"unmounted {leftover.path}")
    for path in (runtime_dir / DIRECTORY).iterdir():
        if path.name != LOCK:
            try:
                path.unlink()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
    return done


def _find(runtime_dir: Path) -> Iterator[Leftover]:
    base = os.path.realpath(runtime_dir / DIRECTORY) + os.sep
    for name, backing in device.bound_devices():
        if backing.startswith(base):
            yield Leftover("device", name, backing, tuple(device.users(name)))
    for _, target, kind in list(device.mounts()):
        if kind == system.FILESYSTEM and target.startswith(base):
            yield Leftover("mount", target, target)
