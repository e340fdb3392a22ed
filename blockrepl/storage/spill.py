"""Records of a primary that is away, kept beside the ring so that the ring can go on without it (PROTOCOL, rule 12).

A primary that returns is repaired from here before it serves: it replays what it lacks. A file holds whole records, one
after the other; each carries its own length and checksums. What a crash left torn at the end was never counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from blockrepl.errors import DamagedError, StorageError
from blockrepl.formats.record import HEADER_BYTES, check_record, peek_size
from blockrepl.storage.files import read_at, storage_error, sync_directory, write_at


class Spilled(NamedTuple):
    """One record: its last number, and where it lies."""

    last: int
    offset: int
    size_bytes: int


class SpillDirectory:
    """The spill files of a node, one per primary: ``spill-NODE``. Methods that touch the disk block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._records: dict[int, list[Spilled]] = {}

    def _path(self, sender: int) -> Path:
        return self._directory / f"spill-{sender}"

    def load(self, sender: int, through: int) -> None:
        """Read what a file holds, at start; it must reach number ``through``. Raises DamagedError, StorageError."""
        path = self._path(sender)
        try:
            data = memoryview(path.read_bytes())
        except FileNotFoundError:
            data = memoryview(b"")
        except OSError as error:
            raise storage_error(f"cannot read {path}", error) from error
        found, at = [], 0
        while len(data) - at > HEADER_BYTES:
            try:
                size = peek_size(data[at:])
                head = check_record(data[at : at + size])
            except DamagedError:
                break
            found.append(Spilled(head.last, at, size))
            at += size
        if (found[-1].last if found else 0) < through:
            reached = found[-1].last if found else 0
            raise DamagedError(
                f"{path} ends at number {reached}, it was durable up to {through}",
                hint="the primary it was kept for must be replaced: blockrepl replace",
            )
        self._records[sender] = found

    def append(self, sender: int, records: Sequence[tuple[int, bytes]]) -> None:
        """Add (last number, record) pairs, durably. Raises StorageError."""
        path = self._path(sender)
        known = self._records.setdefault(sender, [])
        end = known[-1].offset + known[-1].size_bytes if known else 0
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, end)  # what a crash left behind
                added = []
                for last, record in records:
                    write_at(fd, end, record)
                    added.append(Spilled(last, end, len(record)))
                    end += len(record)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            if not known:
                sync_directory(self._directory)
        except OSError as error:
            raise storage_error(f"cannot write {path}", error) from error
        known += added

    def after(self, sender: int, number: int, limit_bytes: int) -> list[Spilled]:
        """Records above ``number``, until they reach ``limit_bytes`` (at least one)."""
        taken: list[Spilled] = []
        for each in self._records.get(sender, []):
            if each.last <= number:
                continue
            if limit_bytes <= 0:
                break
            taken.append(each)
            limit_bytes -= each.size_bytes
        return taken

    def read(self, sender: int, wanted: Sequence[Spilled]) -> list[bytes]:
        """Raises DamagedError, StorageError."""
        path = self._path(sender)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(f"cannot read {path}", error) from error
        try:
            return [read_at(fd, each.offset, each.size_bytes) for each in wanted]
        finally:
            os.close(fd)

    def drop(self, sender: int) -> None:
        """The primary has it all in its P-VOLs."""
        self._records.pop(sender, None)
        try:
            self._path(sender).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot remove {self._path(sender)}: {error.strerror}") from error
