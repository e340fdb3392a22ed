"""Dirty bitmaps that survive: changed pages are written and synced before the writes that they cover go on."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from construct.core import ConstructError

from blockrepl.bitmap import Bitmap
from blockrepl.errors import DamagedError, IdentityError, MissingError, StorageError
from blockrepl.formats.bitmap import (
    PAGE_BITS_BYTES,
    PAGE_BYTES,
    bitmap_header,
    decode_page,
    encode_header,
    encode_page,
    header_is_whole,
)
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.files import create_file, open_locked, read_at, storage_error, sync_directory, write_at

Saved = Callable[[], None]


@dataclass(frozen=True, slots=True)
class BitmapIdentity:
    """Whose bits a file holds. ``group``: 16 bytes; sizes in bytes."""

    group: bytes
    volume: int
    node: int
    size_bytes: int
    block_bytes: int


class BitmapFile:
    """An open, locked bitmap. ``bitmap`` is what was stored; who changes it calls `save`.

    Fail-stop: after an error every later save raises, and ``on_failed`` was called once (PROTOCOL, rule 11).
    """

    def __init__(self, path: Path, fd: int, bitmap: Bitmap) -> None:
        self.path = path
        self.bitmap = bitmap
        self.failed: StorageError | None = None
        self.on_failed: Callable[[StorageError], None] = lambda _error: None
        self._fd = fd
        self._flying = False
        self._waiting: list[Saved] = []
        self._old_fds: list[int] = []  # of smaller files that a save was under way in

    @classmethod
    def create(cls, path: Path, identity: BitmapIdentity, bitmap: Bitmap | None = None) -> None:
        """Make the file, with no bit set unless a bitmap is given. Raises UsageError (it exists), StorageError."""
        bitmap = bitmap or Bitmap(identity.size_bytes, identity.block_bytes)

        create_file(path, lambda fd: _write_whole(fd, identity, bitmap))

    @classmethod
    def open(cls, path: Path, identity: BitmapIdentity) -> BitmapFile:
        """Open, lock and read. What was read is written and synced again: a killed process may have left it in the
        page cache only. Raises MissingError, IdentityError, InUseError, DamagedError, StorageError.
        """
        fd = open_locked(path)
        try:
            bitmap = cls._read(path, fd, identity)
            for number in range(_pages(bitmap)):
                write_at(fd, PAGE_BYTES * (1 + number), encode_page(number, _page_of(bitmap, number)))
            os.fdatasync(fd)
        except OSError as error:
            os.close(fd)
            raise storage_error(f"cannot open {path}", error) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, bitmap)

    @classmethod
    def read(cls, path: Path, identity: BitmapIdentity) -> Bitmap:
        """What a file says, unlocked: for looking at it. Raises MissingError, IdentityError, DamagedError."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingError(f"{path} is missing", hint="`blockrepl create` makes it, once") from None
        except OSError as error:
            raise storage_error(f"cannot open {path}", error) from error
        try:
            return cls._read(path, fd, identity)
        finally:
            os.close(fd)

    @staticmethod
    def _read(path: Path, fd: int, identity: BitmapIdentity) -> Bitmap:
        raw = read_at(fd, 0, PAGE_BYTES)
        try:
            header = bitmap_header.parse(raw)
        except ConstructError as error:
            raise DamagedError(
                f"{path} is not a bitmap", hint="`blockrepl pair resync --verify` makes up for it"
            ) from error
        if not header_is_whole(raw):
            raise DamagedError(f"{path}: the header is damaged", hint="`blockrepl replace` makes this node anew")
        found = BitmapIdentity(header.group, header.volume, header.node, header.size_bytes, header.block_bytes)
        if found != identity:
            raise IdentityError(
                f"{path} is the bitmap of volume {found.volume}, node {found.node}, {found.size_bytes} bytes; "
                f"expected volume {identity.volume}, node {identity.node}, {identity.size_bytes} bytes",
                hint="was it copied from another group, or the volume's size changed?",
            )
        bitmap = Bitmap(identity.size_bytes, identity.block_bytes)
        pages = []
        for number in range(_pages(bitmap)):
            bits = decode_page(number, read_at(fd, PAGE_BYTES * (1 + number), PAGE_BYTES))
            pages.append(b"\xff" * PAGE_BITS_BYTES if bits is None else bits)
        return Bitmap(identity.size_bytes, identity.block_bytes, b"".join(pages)[: len(bitmap.bits)])

    @classmethod
    def enlarge(cls, path: Path, identity: BitmapIdentity) -> None:
        """Finish a growth that a crash cut short: nothing when the file is as large already. Blocks: for the start.

        Raises what `open` does.
        """
        try:
            header = bitmap_header.parse(path.read_bytes()[:PAGE_BYTES])
        except (ConstructError, OSError):
            return  # `open` says what is wrong
        if header.size_bytes < identity.size_bytes:
            file = cls.open(path, replace(identity, size_bytes=header.size_bytes))
            try:
                file.grow(identity)
            finally:
                file.close()

    def grow(self, identity: BitmapIdentity) -> None:
        """Make room for a larger volume, durably: a larger file, with all that is set now, takes the place of this one.

        Short enough for the loop. Can be repeated. Raises StorageError; then nothing has changed.
        """
        if self.failed is not None:
            raise self.failed
        if identity.size_bytes <= self.bitmap.size_bytes:
            return
        larger = Bitmap(identity.size_bytes, identity.block_bytes)
        larger.bits[: len(self.bitmap.bits)] = self.bitmap.bits
        draft = self.path.with_name(f".{self.path.name}.new")
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write_whole(fd, identity, larger)
                os.fsync(fd)
                draft.rename(self.path)
                sync_directory(self.path.parent)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise storage_error(f"cannot enlarge {self.path}", error) from error
        self._fd, old = fd, self._fd
        self.bitmap.grow(identity.size_bytes)
        if self._flying:
            self._old_fds.append(old)
        else:
            os.close(old)

    def save(self, thread: DiskThread, done: Saved) -> None:
        """Make the bits durable as they are now, then ``done()`` on the loop. Raises StorageError."""
        if self.failed is not None:
            raise self.failed
        self._waiting.append(done)
        if not self._flying:
            self._start(thread)

    def _start(self, thread: DiskThread) -> None:
        waiting, self._waiting = self._waiting, []
        pages, bitmap = sorted(self.bitmap.changed), self.bitmap
        bitmap.changed.clear()
        self._flying = True
        for number in pages:
            thread.write(self._fd, PAGE_BYTES * (1 + number), [encode_page(number, _page_of(bitmap, number))])

        def synced(error: OSError | None) -> None:
            self._flying = False
            while self._old_fds:
                os.close(self._old_fds.pop())
            if error is not None:
                self._fail(error)
                return
            if self._waiting:
                self._start(thread)
            for done in waiting:
                done()

        thread.sync(self._fd, synced)

    def _fail(self, error: OSError) -> None:
        if self.failed is None:
            self.failed = storage_error(f"bitmap {self.path} failed", error)
            self.on_failed(self.failed)

    def close(self) -> None:
        """Close and unlock; nothing may be in the air."""
        os.close(self._fd)


def _write_whole(fd: int, identity: BitmapIdentity, bitmap: Bitmap) -> None:
    header = encode_header(identity.group, identity.volume, identity.node, identity.size_bytes, identity.block_bytes)
    pages = [encode_page(number, _page_of(bitmap, number)) for number in range(_pages(bitmap))]
    write_at(fd, 0, header + b"".join(pages))


def _pages(bitmap: Bitmap) -> int:
    return -(-len(bitmap.bits) // PAGE_BITS_BYTES)


def _page_of(bitmap: Bitmap, number: int) -> bytearray:
    return bitmap.bits[number * PAGE_BITS_BYTES : (number + 1) * PAGE_BITS_BYTES]
