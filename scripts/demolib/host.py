"""The host at either site: what uses the volumes, over loop devices with file systems, or raw over NBD.

Volume A is the first of the pair, B the second: different primaries, different secondaries.
"""

from __future__ import annotations

import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from scripts.demolib.errors import DemoError
from scripts.demolib.group import ROOT
from scripts.demolib.process import Background, attempt, environment, run
from tests.demo.nbd_client import NbdVolume
from tests.demo.records import RECORD_BYTES, Ledger, Verdict, blocks, found, judge

VOLUMES = ("data", "log")  # A and B, as targets/demo.toml names them
FILE_SYSTEMS = {"data": "ext4", "log": "xfs"}
FIO_BYTES = 24 << 20
LOAD_IOPS = 250  # of each volume: a load, not a benchmark
LOAD_LIMIT_S = 600
NBD_RECORDS_BYTES = 64 << 20  # where records lie on a raw volume; fio's part follows
NBD_CHUNK_BYTES = 1 << 20
PATIENCE_S = 20.0


@cache
def _verify_options() -> tuple[str, ...]:
    """Blocks of the first pass and of the load differ in seed and number: newer versions of fio must be told."""
    known = attempt(["fio", "--cmdhelp=verify_header_seed"])
    newer = "No such" not in known.stdout + known.stderr
    return ("--verify_header_seed=0", "--verify_write_sequence=0") if newer else ()


class Served(Protocol):
    """A group, as its hosts know it."""

    home: Path

    def attach(self, volume: str) -> str:
        """The volume's loop device, where it is active."""

    def nbd_uri(self, volume: str, *, secondary: bool) -> str:
        """Where hosts find it."""


class Host(ABC):
    """Uses both volumes at the primary site, and after the takeover at the secondary site."""

    load_patience_s = PATIENCE_S

    def __init__(self, group: Served, say: Callable[[str], None]) -> None:
        self.group = group
        self.say = say
        self.run_id = os.urandom(16)
        self.ledger = Ledger(group.home / "ledger", fresh=True)
        self._writer: Background | None = None
        self._load: Background | None = None

    # the primary site

    @abstractmethod
    def settle_in(self) -> None:
        """Make both volumes usable at the primary site."""

    @abstractmethod
    def record_targets(self) -> list[str]:
        """Where the ordered writer puts its records, at the primary site."""

    @abstractmethod
    def fio_jobs(self, *, secondary: bool) -> list[str]:
        """fio's arguments that say where it works: one job for each volume."""

    def verified_write(self) -> None:
        """fio writes a part of each volume, reads it back and compares checksums. Raises DemoError."""
        if self.has_fio():
            self.say(f"fio: {FIO_BYTES >> 20} MiB random writes on each, then read back and verified (crc32c)")
            self._fio(["--rw=randwrite", "--do_verify=1"], secondary=False)

    def has_fio(self) -> bool:
        """Without it the story goes on with the writer alone."""
        return shutil.which("fio", path=environment()["PATH"]) is not None

    def _fio(self, what: Sequence[str], *, secondary: bool) -> None:
        run([*self._fio_command(what), *self.fio_jobs(secondary=secondary)])

    def _fio_command(self, what: Sequence[str]) -> list[str]:
        common = [
            f"--size={FIO_BYTES}",
            "--bs=4k",
            "--iodepth=8",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--thread",
            "--verify_state_save=0",
        ]
        return ["fio", *common, *_verify_options(), *what]

    def begin_load(self) -> None:
        """fio goes on writing, and the ordered writer begins; both until the disk dies."""
        if self.has_fio():
            what = [
                "--rw=randwrite",
                "--do_verify=0",
                "--time_based",
                f"--runtime={LOAD_LIMIT_S}",
                f"--rate_iops={LOAD_IOPS}",
            ]
            argv = [*self._fio_command(what), *self.fio_jobs(secondary=False)]
            self._load = Background(argv, self.group.home / "fio.log")
        arguments = [str(self.group.home / "ledger"), self.run_id.hex(), *self.record_targets()]
        env = environment(PYTHONPATH=str(ROOT))
        self._writer = Background(
            [sys.executable, "-m", "tests.demo.writer", *arguments], self.group.home / "writer.log", env=env
        )

    def check_load(self) -> None:
        """Raises DemoError when the load ended by itself."""
        for name, process in (("the ordered writer", self._writer), ("fio", self._load)):
            if process is not None and process.ended():
                raise DemoError(f"{name} ended before the disaster: {process.words()}")

    def end_load(self) -> None:
        """The disk is dead: whoever does not notice soon is ended."""
        for process, patience_s in ((self._writer, PATIENCE_S), (self._load, self.load_patience_s)):
            if process is not None:
                process.finish(patience_s)
        self._writer = self._load = None

    # the secondary site

    @abstractmethod
    def move(self) -> None:
        """Open both volumes at the secondary site, read-write: with this the recovery is over."""

    @abstractmethod
    def check_file_systems(self) -> dict[str, Any]:
        """fsck of both, by volume; then they are usable."""

    @abstractmethod
    def records(self, volume: str) -> Iterable[bytes]:
        """The blocks where records lie, at the secondary site."""

    def verify_fio(self) -> str | None:
        """Every block of fio's must be whole: "clean", or what fio says; None when there is no fio."""
        if not self.has_fio():
            return None
        try:
            self._fio(["--rw=read"], secondary=True)
        except DemoError as error:
            return str(error)
        return "clean"

    def judge(self) -> Verdict:
        """What both volumes hold now, against what was acknowledged."""
        on_a, on_b = (found(self.run_id, self.records(volume)) for volume in VOLUMES)
        return judge(on_a, on_b, *self.ledger.read())

    def leave(self) -> None:
        """Let go of everything, in whatever state it is. Never raises."""
        for process in (self._writer, self._load):
            if process is not None:
                process.kill()
        self._writer = self._load = None
        Background.kill_all()  # one that was interrupted before it had a name here


class FileHost(Host):
    """File systems on loop devices."""

    def __init__(self, group: Served, say: Callable[[str], None]) -> None:
        super().__init__(group, say)
        self._devices: dict[str, str] = {}

    def _mount_point(self, volume: str) -> Path:
        return _mount_point(self.group.home, volume)

    def settle_in(self) -> None:
        with ThreadPoolExecutor() as pool:
            self._devices = dict(zip(VOLUMES, pool.map(self.group.attach, VOLUMES), strict=True))
            list(pool.map(self._make, VOLUMES))

    def _make(self, volume: str) -> None:
        device, kind = self._devices[volume], FILE_SYSTEMS[volume]
        self.say(f"$ mkfs.{kind} {device}    ({volume})")
        run([f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", device])
        self._mount(volume)

    def _mount(self, volume: str) -> None:
        point = self._mount_point(volume)
        point.mkdir(parents=True, exist_ok=True)
        # nouuid: the dead original may not be quite gone.
        options = ["-o", "nouuid"] if FILE_SYSTEMS[volume] == "xfs" else []
        run(["mount", "-t", FILE_SYSTEMS[volume], *options, self._devices[volume], str(point)])

    def record_targets(self) -> list[str]:
        return [str(self._mount_point(volume) / "records") for volume in VOLUMES]

    def fio_jobs(self, *, secondary: bool) -> list[str]:
        jobs = ["--ioengine=libaio", "--direct=1"]
        for volume in VOLUMES:
            jobs += [f"--name={volume}", f"--filename={self._mount_point(volume) / 'fio'}"]
        return jobs

    def move(self) -> None:
        with ThreadPoolExecutor() as pool:
            self._devices = dict(zip(VOLUMES, pool.map(self.group.attach, VOLUMES), strict=True))

    def end_load(self) -> None:
        super().end_load()
        self.unmount_all(self.group.home)

    def check_file_systems(self) -> dict[str, Any]:
        """As after a power failure: mounted once, so that it replays its own log; then fsck, changing nothing.

        Without the replay e2fsck and xfs_repair would look at a state that no host ever gets to see.
        """
        with ThreadPoolExecutor() as pool:
            return dict(zip(VOLUMES, pool.map(self._check, VOLUMES), strict=True))

    def _check(self, volume: str) -> dict[str, Any]:
        kind, device = FILE_SYSTEMS[volume], self._devices[volume]
        self._mount(volume)
        run(["umount", str(self._mount_point(volume))])
        argv = ["e2fsck", "-f", "-n", device] if kind == "ext4" else ["xfs_repair", "-n", device]
        done = attempt(argv)
        clean = done.returncode == 0
        self.say(f"$ {' '.join(argv)}    ({volume}): {'clean' if clean else 'NOT clean'}")
        self._mount(volume)
        found: dict[str, Any] = {"command": " ".join(argv[:-1]), "exit_status": done.returncode, "clean": clean}
        return found if clean else {**found, "output": (done.stdout + done.stderr)[-2000:]}

    def records(self, volume: str) -> Iterable[bytes]:
        path = self._mount_point(volume) / "records"
        return blocks(path) if path.exists() else ()

    def leave(self) -> None:
        super().leave()
        self.unmount_all(self.group.home)

    @staticmethod
    def unmount_all(home: Path) -> None:
        """Whatever is mounted in a demo's directory. Never raises."""
        for volume in VOLUMES:
            _unmount(_mount_point(home, volume))


def _mount_point(home: Path, volume: str) -> Path:
    return home / "mnt" / volume


def _unmount(point: Path) -> None:
    """Also when the disk below is dead, or somebody is inside: then it goes with its last user."""
    for argv in (["umount", str(point)], ["umount", "-l", str(point)]):
        if not _is_mount(point):
            return
        try:
            attempt(argv)
        except DemoError:
            continue


def _is_mount(point: Path) -> bool:
    """Asks the mount table, not the file system, which may be dead."""
    return any(line.split()[4] == str(point) for line in Path("/proc/self/mountinfo").read_text().splitlines())


class NbdHost(Host):
    """Raw records on the NBD exports."""

    load_patience_s = 0.5  # fio's nbd engine waits for ever for a server that is gone

    def settle_in(self) -> None:
        for volume in VOLUMES:
            self.say(f"{volume}: {self.group.nbd_uri(volume, secondary=False)}")

    def record_targets(self) -> list[str]:
        return [self.group.nbd_uri(volume, secondary=False) for volume in VOLUMES]

    def has_fio(self) -> bool:
        return super().has_fio() and attempt(["fio", "--enghelp=nbd"]).returncode == 0

    def fio_jobs(self, *, secondary: bool) -> list[str]:
        jobs = ["--ioengine=nbd", f"--offset={NBD_RECORDS_BYTES}"]
        for volume in VOLUMES:
            jobs += [f"--name={volume}", f"--uri={self.group.nbd_uri(volume, secondary=secondary)}"]
        return jobs

    def move(self) -> None:
        for volume in VOLUMES:
            opened = NbdVolume(self.group.nbd_uri(volume, secondary=True))
            opened.write(opened.size_bytes - RECORD_BYTES, bytes(RECORD_BYTES), durable=True)
            opened.close()

    def check_file_systems(self) -> dict[str, Any]:
        """There are none."""
        return dict.fromkeys(VOLUMES)

    def records(self, volume: str) -> Iterable[bytes]:
        opened = NbdVolume(self.group.nbd_uri(volume, secondary=True))
        try:
            for start in range(0, NBD_RECORDS_BYTES, NBD_CHUNK_BYTES):
                chunk = opened.read(start, NBD_CHUNK_BYTES)
                yield from (chunk[at : at + RECORD_BYTES] for at in range(0, NBD_CHUNK_BYTES, RECORD_BYTES))
        finally:
            opened.close()


def why_no_loop() -> str:
    """Why file systems on loop devices cannot be had here; empty if they can."""
    if os.geteuid() != 0:
        return "this is not root"
    for device in ("/dev/loop-control", "/dev/fuse"):
        try:
            os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"{device}: {error.strerror}"
    path = environment()["PATH"]
    missing = [
        name for name in ("mkfs.ext4", "mkfs.xfs", "e2fsck", "xfs_repair", "mount") if not shutil.which(name, path=path)
    ]
    return f"not installed: {', '.join(missing)}" if missing else ""
