"""Kernel loop devices: make, free, and who uses them.

Everything here opens devices and files, and may wait for the server of the file: it runs in a process of its own
(helper.py) or on devices whose server is dead, never in the serving process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pyroute2.netlink.uevent import AsyncUeventSocket

from blockrepl.errors import EnvironmentLacksError, TimeoutExpiredError, UsageError
from blockrepl.formats import loop as layout
from blockrepl.formats.loop import Ioctl, LoopFlag
from blockrepl.frontends.loop import system

CONTROL = "/dev/loop-control"
APPEAR_TIMEOUT_S = 5.0
SETTLE_TIMEOUT_S = 2.0  # udev opens a device whenever it changes: such a user goes away by itself
POLL_S = 0.05


def sysfs(device: str) -> Path:
    """The directory of a block device, given as /dev/loopN."""
    return Path("/sys/block") / Path(device).name


def backing_file(device: str) -> str | None:
    """The file under a loop device as its kernel names it, or None when it has none."""
    try:
        return (sysfs(device) / "loop" / "backing_file").read_text().rstrip("\n")
    except OSError:
        return None


def bound_devices() -> Iterator[tuple[str, str]]:
    """Each loop device that has a backing file, with that file."""
    for directory in sorted(Path("/sys/block").glob("loop*")):
        backing = backing_file(directory.name)
        if backing is not None:
            yield f"/dev/{directory.name}", backing


async def configure(path: str, block_size_bytes: int, *, read_only: bool) -> str:
    """Make a loop device with direct I/O over the file at ``path``; returns it when it is there and has its size.

    Raises EnvironmentLacksError without loop devices, OSError (such as ENOTCONN: the server has died) for the rest.
    """
    async with contextlib.AsyncExitStack() as stack:
        events = await _listen(stack)
        file_fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        stack.callback(os.close, file_fd)
        size_bytes = os.fstat(file_fd).st_size  # also tells the kernel the size, which the driver takes over
        device = _bind(file_fd, path, block_size_bytes, read_only)
        if events is not None:
            with contextlib.suppress(TimeoutError):  # announcements can be lost; what counts is what is there
                await asyncio.wait_for(_announced(events, Path(device).name), APPEAR_TIMEOUT_S)
        if not _has_size(device, size_bytes):
            free(device)
            raise TimeoutExpiredError(f"{device} did not appear in {APPEAR_TIMEOUT_S:g} s")
        return device


def resize(device: str, path: str) -> None:
    """Give a device the size that its file has now. Raises OSError."""
    system.refresh_size(path)  # the kernel keeps the old one
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, Ioctl.SET_CAPACITY)
    finally:
        os.close(fd)


async def _listen(stack: contextlib.AsyncExitStack) -> AsyncUeventSocket | None:
    """The kernel's announcements; None where they are not to be had."""
    try:
        events = AsyncUeventSocket()
        stack.callback(events.close)
        await events.bind()
    except OSError:
        return None
    return events


async def _announced(events: AsyncUeventSocket, name: str) -> None:
    while True:
        async for event in events.get():
            if event.get("DEVNAME") == name and event.get("ACTION") in ("add", "change"):
                return


def _bind(file_fd: int, path: str, block_size_bytes: int, read_only: bool) -> str:
    flags = LoopFlag.DIRECT_IO | (LoopFlag.READ_ONLY if read_only else LoopFlag(0))
    info = _info(flags=int(flags), file_name=os.fsencode(path)[: layout.NAME_BYTES - 1])
    config = layout.loop_config.build(
        {"fd": file_fd, "block_size_bytes": block_size_bytes, "info": info, "reserved": [0] * 8}
    )
    try:
        control_fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise EnvironmentLacksError(f"{CONTROL}: {error.strerror}", hint="run as root; modprobe loop") from error
    try:
        while True:
            device = f"/dev/loop{fcntl.ioctl(control_fd, Ioctl.CTL_GET_FREE)}"
            device_fd = _open_device(device, os.O_RDONLY if read_only else os.O_RDWR)
            try:
                fcntl.ioctl(device_fd, Ioctl.CONFIGURE, config)
            except OSError as error:
                if error.errno == errno.EBUSY:  # someone else was faster
                    continue
                raise
            finally:
                os.close(device_fd)
            return device
    finally:
        os.close(control_fd)


def _open_device(device: str, flags: int) -> int:
    """Open a device that the kernel has just made: its node may be a moment behind."""
    end_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            return os.open(device, flags | os.O_CLOEXEC)
        except FileNotFoundError as error:
            if time.monotonic() > end_s:
                raise EnvironmentLacksError(
                    f"{device} has no node", hint="is /dev a devtmpfs? mknod it, or run outside of the container"
                ) from error
            time.sleep(POLL_S)


def _info(**fields: object) -> dict[str, object]:
    info: dict[str, object] = dict.fromkeys(
        ("device", "inode", "rdevice", "offset_bytes", "size_limit_bytes", "number"), 0
    )
    info |= {"encrypt_type": 0, "encrypt_key_size_bytes": 0, "flags": 0, "file_name": b""}
    info |= {"crypt_name": b"", "encrypt_key": b"", "init": [0, 0]} | fields
    for name, size in (
        ("file_name", layout.NAME_BYTES),
        ("crypt_name", layout.NAME_BYTES),
        ("encrypt_key", layout.KEY_BYTES),
    ):
        value = info[name]
        assert isinstance(value, bytes)
        info[name] = value.ljust(size, b"\0")
    return info


def _has_size(device: str, size_bytes: int) -> bool:
    try:
        return int((sysfs(device) / "size").read_text()) * 512 == size_bytes
    except (OSError, ValueError):
        return False


def free(device: str) -> bool:
    """Take the file from a loop device. False: it is in use, and frees itself with its last user."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENOENT):
            return True
        raise
    try:
        fcntl.ioctl(fd, Ioctl.CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # ENXIO: it has no file
            raise
    finally:
        os.close(fd)
    return backing_file(device) is None


def keep(device: str) -> None:
    """Undo a `free` that found the device in use."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = bytearray(layout.loop_info64.sizeof())
        fcntl.ioctl(fd, Ioctl.GET_STATUS64, raw)
        info = layout.loop_info64.parse(bytes(raw))
        info.flags &= ~int(LoopFlag.AUTOCLEAR)
        fcntl.ioctl(fd, Ioctl.SET_STATUS64, layout.loop_info64.build(info))
    finally:
        os.close(fd)


def release(device: str, path: str) -> None:
    """Free the device over ``path``, unless someone uses it: UsageError that names who."""
    if backing_file(device) != path:
        return  # already gone; the number may be another's by now
    end_s = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        who = users(device)
        if not who and free(device):
            return
        if not who:
            keep(device)
        if time.monotonic() > end_s or any(name.startswith("mounted") for name in who):
            raise UsageError(
                f"{device} is in use: {'; '.join(who) or 'by a process or mount out of sight'}", hint="unmount it"
            )
        time.sleep(POLL_S)


def users(device: str) -> list[str]:
    """Who uses a block device, one phrase each: mounts, swap, devices above it, processes that have it open."""
    try:
        number = os.stat(device).st_rdev
    except OSError:
        return []
    found = [f"mounted on {target}" for source, target, _ in mounts() if source == device]
    with contextlib.suppress(OSError):
        found += [f"under {holder.name}" for holder in sorted((sysfs(device) / "holders").iterdir())]
    with contextlib.suppress(OSError):
        swaps = Path("/proc/swaps").read_text().splitlines()[1:]
        found += ["used as swap" for line in swaps if line.split()[0] == device]
    return found + [f"open in process {pid} ({name})" for pid, name in _openers(number)]


def _openers(number: int) -> Iterator[tuple[int, str]]:
    for directory in Path("/proc").glob("[0-9]*"):
        if int(directory.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for link in os.scandir(directory / "fd"):
                with contextlib.suppress(OSError):
                    entry = link.stat()
                    if stat.S_ISBLK(entry.st_mode) and entry.st_rdev == number:
                        yield int(directory.name), (directory / "comm").read_text().strip()
                        break


def mounts() -> Iterator[tuple[str, str, str]]:
    """(source, target, type) of every mount of this namespace. proc_pid_mountinfo(5)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, source = after.split(" ")[:2]
        yield _unescape(source), _unescape(before.split(" ")[4]), kind


def _unescape(text: str) -> str:
    """The mount table writes space, tab, newline and backslash as octal."""
    return (
        text.encode("latin-1", "replace").decode("unicode_escape").encode("latin-1").decode("utf-8", "surrogateescape")
        if "\\" in text
        else text
    )
