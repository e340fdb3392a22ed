"""Volumes as kernel loop devices: attach, detach, and the end of it all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import blockrepl
from blockrepl import errors
from blockrepl.block import Volume
from blockrepl.errors import BlockreplError, EnvironmentLacksError, UsageError
from blockrepl.frontends.loop import leftovers, system
from blockrepl.frontends.loop.device import backing_file
from blockrepl.frontends.loop.leftovers import DIRECTORY
from blockrepl.frontends.loop.server import FuseServer, Memory

FUSE_DEVICE = "/dev/fuse"
CONTROL = "/dev/loop-control"
ABANDON_TIMEOUT_S = 5.0  # then the connection is ended first, and everything that waited for it fails

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Attached:
    server: FuseServer
    path: str
    read_only: bool
    device: str = ""
    ending: bool = False  # by us: that the kernel ends the connection is then no news


class LoopFrontend:
    """The loop devices of one node.

    ``runtime_dir``/loop/NAME is where the file of volume NAME is mounted; ``runtime_dir`` exists. Methods run
    on the event loop, which also serves the devices: nothing on it may open a device or its file.
    """

    def __init__(self, volumes: Callable[[], Mapping[str, Volume]], runtime_dir: Path) -> None:
        self._volumes = volumes
        self._runtime_dir = runtime_dir
        self._memory = Memory()
        self._attached: dict[str, _Attached] = {}
        self._changing = asyncio.Lock()
        self._lock_fd = -1
        self._resizing: asyncio.Task[None] | None = None  # kept: a task that nobody holds may vanish

    def attached(self) -> dict[str, str]:
        """Volume name to device."""
        return {name: entry.device for name, entry in self._attached.items() if entry.device}

    async def attach(self, name: str, *, read_only: bool = False) -> str:
        """A loop device over the volume, such as "/dev/loop3"; the same again if it is attached already.

        A volume that is not writable gets a read-only device. Raises UsageError (no such volume; attached the other
        way), EnvironmentLacksError (no /dev/fuse, no loop devices, no privilege), InUseError (another process owns
        ``runtime_dir``/loop).
        """
        async with self._changing:
            volume = self._volumes().get(name)
            if volume is None:
                raise UsageError(f"no volume {name} here", hint="see: blockrepl status")
            read_only = read_only or not volume.writable
            present = self._attached.get(name)
            if present is not None and (present.server.closed or backing_file(present.device) != present.path):
                await self._abandon(name, present)
                present = None
            if present is not None:
                if present.read_only != read_only:
                    how = "read-only" if present.read_only else "read-write"
                    raise UsageError(f"{name} is attached {how} as {present.device}", hint=f"detach {name} first")
                return present.device
            await self._own_directory()
            entry = self._mount(name, volume, read_only)
            self._attached[name] = entry
            try:
                answer = await _helper("attach", entry.path, str(volume.block_size_bytes), "ro" if read_only else "rw")
            except BaseException:
                await asyncio.shield(self._abandon(name, entry))
                raise
            entry.device = answer["device"]
            return entry.device

    async def detach(self, name: str) -> None:
        """Undo `attach`. Raises UsageError when the volume is not attached, or in use (it names by whom)."""
        async with self._changing:
            entry = self._attached.get(name)
            if entry is None:
                raise UsageError(f"{name} is not attached")
            if entry.server.closed:
                await self._abandon(name, entry)
                return
            entry.ending = True
            try:
                await _helper("detach", entry.device, entry.path)
            except BaseException:
                entry.ending = False
                raise
            self._forget(name, entry)

    def resize(self, name: str) -> None:
        """The volume has grown: so does its loop device, if it has one, soon."""
        entry = self._attached.get(name)
        if entry is not None and entry.device:
            entry.server.resize()
            self._resizing = asyncio.get_running_loop().create_task(self._resize(name, entry))

    async def _resize(self, name: str, entry: _Attached) -> None:
        async with self._changing:
            try:
                await _helper("resize", entry.device, entry.path)
            except (BlockreplError, OSError) as error:
                log.error("loop front end: %s keeps its old size until it is attached again: %s", entry.device, error)

    async def cut_off(self, name: str) -> None:
        """Undo `attach` also of what is in use, as `close` does: the volume is not served here any more."""
        async with self._changing:
            entry = self._attached.get(name)
            if entry is not None:
                await self._abandon(name, entry)

    async def close(self) -> None:
        """Undo everything, also what is in use: users get EIO; the kernel frees the device with the last of them."""
        async with self._changing:
            for name, entry in list(self._attached.items()):
                await self._abandon(name, entry)
            if self._lock_fd >= 0:
                os.close(self._lock_fd)
                self._lock_fd = -1

    async def _own_directory(self) -> None:
        if self._lock_fd < 0:
            self._lock_fd = leftovers.lock(self._runtime_dir)
            for phrase in await asyncio.to_thread(leftovers.clean_locked, self._runtime_dir):
                log.warning("loop front end: a killed process left something behind: %s", phrase)
            failure = system.mark_io_flusher()
            if failure is not None:
                log.info("loop front end: not marked as I/O flusher: %s", failure)

    def _mount(self, name: str, volume: Volume, read_only: bool) -> _Attached:
        path = os.path.realpath(self._runtime_dir / DIRECTORY / name)
        _require(FUSE_DEVICE, "modprobe fuse")
        _require(CONTROL, "modprobe loop")
        fuse_fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            system.mount_fuse(f"blockrepl:{name}", path, fuse_fd, stat.S_IFREG)
        except PermissionError as error:
            os.close(fuse_fd)
            raise EnvironmentLacksError(
                f"may not mount {path}: {error.strerror}", hint="run the node as root"
            ) from error
        except OSError:
            os.close(fuse_fd)
            raise
        server = FuseServer(
            fuse_fd, volume, self._memory, read_only=read_only, lost=lambda error: self._lost(name, error)
        )
        return _Attached(server, path, read_only)

    def _lost(self, name: str, error: Exception) -> None:
        entry = self._attached.get(name)
        if entry is None or not entry.ending:
            log.error("loop front end: volume %s: the connection has ended, its users get EIO: %s", name, error)

    async def _abandon(self, name: str, entry: _Attached) -> None:
        entry.ending = True
        arguments = ("abandon", entry.device or "-", entry.path)
        try:
            await asyncio.wait_for(_helper(*arguments), ABANDON_TIMEOUT_S)
        except (TimeoutError, BlockreplError, OSError) as error:
            log.warning("loop front end: volume %s: ending with requests in flight: %s", name, error or "timeout")
            entry.server.close()
            with contextlib.suppress(TimeoutError, BlockreplError, OSError):
                await asyncio.wait_for(_helper(*arguments), ABANDON_TIMEOUT_S)
        self._forget(name, entry)

    def _forget(self, name: str, entry: _Attached) -> None:
        entry.server.close()
        del self._attached[name]
        with contextlib.suppress(OSError):
            os.unlink(entry.path)


def _require(path: str, hint: str) -> None:
    reason = _why_not(path)
    if reason:
        raise EnvironmentLacksError(f"{path}: {reason}", hint="run the node as root" if "ermission" in reason else hint)


def _why_not(path: str) -> str:
    """Why a device cannot be opened for reading and writing; empty if it can."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.strerror or str(error)
    return ""


async def _helper(*arguments: str) -> dict[str, str]:
    """Run helper.py; its answer, or its error raised here. Ends it when cancelled."""
    package_parent = str(Path(blockrepl.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH", "")]))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "blockrepl.frontends.loop.helper", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C for the node must not kill what cleans up after it
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    try:
        answer: dict[str, dict[str, str]] = json.loads(out)
    except ValueError as error:
        raise BlockreplError(f"the loop helper failed: {err.decode(errors='replace')[-500:].strip()}") from error
    failure = answer.get("error")
    if failure is None:
        return answer  # type: ignore[return-value]
    kind = getattr(errors, failure["kind"], BlockreplError)
    raise kind(failure["message"], hint=failure["hint"])


def capabilities() -> dict[str, dict[str, object]]:
    """What this machine can do, for `doctor`: name to {"ok": bool, "why": str, "hint": str, "needed": bool}."""
    result: dict[str, dict[str, object]] = {}

    def note(name: str, why: str, hint: str, *, needed: bool = True) -> None:
        result[name] = {"ok": not why, "why": why, "hint": hint if why else "", "needed": needed}

    note("fuse", _why_not(FUSE_DEVICE), "modprobe fuse; run as root")
    note("loop", _why_not(CONTROL), "modprobe loop; run as root")
    effective = _effective_capabilities()
    note("mount", "" if effective & 1 << 21 else "no CAP_SYS_ADMIN", "run the node as root")
    flusher = "" if effective & 1 << 24 else "no CAP_SYS_RESOURCE"
    note("io_flusher", flusher, "works without, but may stall on a machine short of memory", needed=False)
    return result


def _effective_capabilities() -> int:
    """proc_pid_status(5), CapEff; bit numbers are those of linux/include/uapi/linux/capability.h."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return 0
