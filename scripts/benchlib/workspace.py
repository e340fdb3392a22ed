"""Where a run keeps its files: one temporary directory, so that every system lies on the same file system."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.works import MIB
from scripts.interrupts import uninterrupted

# Of ours: nbd, loop, iscsi, P and S; of the peers: nbdkit, qemu-nbd, two of the mirror, two loops, tgt; the disk.
# And journals.
_IMAGES = 13
_JOURNALS = 3
_COMMAND_TIMEOUT_S = 180.0
_LAST_LINES = 3


@dataclass(frozen=True)
class Workspace:
    directory: Path
    image_bytes: int
    journal_bytes: int = 256 * MIB

    def image(self, name: str) -> Path:
        """A written, synced image: nobody measures allocation."""
        path = self.directory / f"{name}.img"
        write_image(path, self.image_bytes)
        return path

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"


def write_image(path: Path, size_bytes: int) -> None:
    # Random once, repeated: no file system or disk that looks for zeros or equal sectors can cheat within a MiB.
    block = os.urandom(MIB)
    with path.open("wb", buffering=0) as image:
        for start_bytes in range(0, size_bytes, MIB):
            image.write(block[: min(MIB, size_bytes - start_bytes)])
        os.fsync(image.fileno())


@contextmanager
def workspace(parent: Path, image_bytes: int, journal_bytes: int = 256 * MIB) -> Iterator[Workspace]:
    parent.mkdir(parents=True, exist_ok=True)
    needed_bytes = _IMAGES * image_bytes + _JOURNALS * journal_bytes
    free_bytes = shutil.disk_usage(parent).free
    if free_bytes < needed_bytes:
        have, need = free_bytes // MIB, needed_bytes // MIB
        raise NotAvailableError(f"{parent} has {have} MiB free, a run needs {need}: give --dir or a smaller --size")
    directory = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
    try:
        yield Workspace(directory, image_bytes, journal_bytes)
    finally:
        with uninterrupted():
            shutil.rmtree(directory, ignore_errors=True)


def file_system(path: Path, mountinfo: str | None = None) -> str:
    """Its type, such as ``ext4``, from the mount table: proc_pid_mountinfo(5)."""
    text = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    kinds: dict[Path, str] = {}
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        kinds[Path(left.split()[4])] = right.split()[0]  # a later mount hides an earlier one
    path = path.resolve()
    return next((kinds[place] for place in (path, *path.parents) if place in kinds), "unknown")


def command(argv: list[str], *, timeout_s: float = _COMMAND_TIMEOUT_S, env: dict[str, str] | None = None) -> str:
    """Run a program to its end and return its output. Raises NotAvailableError with what it said."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, env=env, check=False
        )
    except FileNotFoundError as error:
        raise NotAvailableError(f"{argv[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise NotAvailableError(f"{' '.join(argv[:6])} did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        words = " / ".join(
            (done.stderr.strip() or done.stdout.strip() or "it says nothing").splitlines()[-_LAST_LINES:]
        )
        raise NotAvailableError(f"{Path(argv[0]).name} ended with {done.returncode}: {words}")
    return done.stdout
