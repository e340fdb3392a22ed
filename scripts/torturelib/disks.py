"""The nodes' disks: plain directories, or file systems on platters that can lose power."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockrepl.frontends.loop import device as loop_device
from scripts.demolib.errors import DemoError
from scripts.demolib.group import ROOT
from scripts.demolib.process import environment, run
from scripts.torturelib.errors import TortureError

Kill = Callable[[], Callable[[], None]]
"""Sends the signals; what it returns waits until they are gone."""
MKFS = ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-J", "size=8")
DISK_BYTES = 1 << 30  # of each node; sparse


_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def _begin_write_back(directory: Path) -> None:
    """As the kernel does whenever it likes: dirty pages go to the disk, in any order, and without a flush."""
    for path in directory.iterdir():
        if path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
            finally:
                os.close(fd)


class Disks:
    """Directories of the file system that is there. kill -9 is all that they can be put through."""

    kind = "page cache"
    lose_power = False
    # Nodes serve loop devices that hosts mount: see `enclosure.leave_mounts`.
    prefix: tuple[str, ...] = ("unshare", "--mount") if os.geteuid() == 0 else ()

    def __init__(self, home: Path, nodes: Iterable[str]) -> None:
        self.home = home
        self.nodes = list(nodes)

    def make(self) -> None:
        """Empty directories."""
        for node in self.nodes:
            (self.home / node).mkdir()

    def cut_power(self, nodes: Sequence[str], kill: Kill, seed: str) -> dict[str, int]:
        """Cut it for ``nodes``; ``kill`` ends their processes. Their directories are there again when it returns."""
        raise AssertionError("these disks never lose power")

    def close(self) -> None:
        """Let go of everything. Never raises."""


class Platters(Disks):
    """ext4 on a loop device per node, over a file layer that drops or tears what was not flushed: see platter.py."""

    kind = "platters"
    lose_power = True
    prefix = ()  # a node's directory is unmounted and mounted under it

    def __init__(self, home: Path, nodes: Iterable[str]) -> None:
        super().__init__(home, nodes)
        self._folder = home / "platters"
        self._devices: dict[str, str] = {}
        self._mounted: set[str] = set()
        self._process: subprocess.Popen[str] | None = None

    def make(self) -> None:
        super().make()
        self._folder.mkdir()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scripts.torturelib.platter_server", str(self._folder)], cwd=ROOT, text=True,
            bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(self.home / "platters.log").open("ab"),
            env=environment(PYTHONPATH=str(ROOT)), start_new_session=True,
        )  # fmt: skip
        devices = self._ask("attach", self.nodes, DISK_BYTES)
        self._devices = dict(zip(self.nodes, devices, strict=True))
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda device: run([*MKFS, device]), devices))
        for node in self.nodes:
            self._mount(node)

    def _ask(self, *command: Any) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps(command), file=process.stdin)
        line = process.stdout.readline()
        if not line:
            raise TortureError(f"the platters ended: {(self.home / 'platters.log').read_text()[-1000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise TortureError(f"platters: {command[0]}: {answer['error']}")
        return answer["result"]

    def _mount(self, node: str) -> None:
        run(["mount", "-t", "ext4", "-o", "nodiscard", self._devices[node], str(self.home / node)])
        self._mounted.add(node)
        # In use, so it frees itself with the mount: nobody else does when we are killed, and all of ours with us.
        loop_device.free(self._devices[node])

    def _unmount(self, node: str) -> None:
        for nested in (self.home / node / "loop").glob("*"):
            if os.path.ismount(nested):
                run(["umount", "-l", str(nested)])
        loop_device.keep(self._devices[node])
        run(["umount", str(self.home / node)])
        self._mounted.discard(node)

    def cut_power(self, nodes: Sequence[str], kill: Kill, seed: str) -> dict[str, int]:
        for node in nodes:
            _begin_write_back(self.home / node)
        self._ask("freeze", nodes)
        gone = kill()  # those that wait for the disk die when it answers, before they learn of it
        loss: dict[str, int] = self._ask("lose", nodes, seed)
        gone()
        for node in nodes:
            self._unmount(node)
            run(["blockdev", "--flushbufs", self._devices[node]])
        self._ask("revive", nodes)
        for node in nodes:
            self._mount(node)
        return loss

    def close(self) -> None:
        for node in list(self._mounted):
            with suppress(DemoError, TortureError):
                self._unmount(node)
        process = self._process
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
