"""A small state that is kept durably in a file of two slots: a primary's `state`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from blockrepl.errors import StorageError
from blockrepl.formats.slots import SLOTS_BYTES
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.files import create_file, fill_zeros, open_locked, read_at, storage_error, write_at
from blockrepl.storage.slots import Identity, Slots

Saved = Callable[[], None]


class SlotFile:
    """An open, locked file of two slots. `payload` is what it held when opened, or what was saved last.

    Fail-stop: after an error every later save raises, and ``on_failed`` was called once (PROTOCOL, rule 11).
    """

    def __init__(self, path: Path, fd: int, slots: Slots, payload: bytes) -> None:
        self.path = path
        self.payload = payload
        self.failed: StorageError | None = None
        self.on_failed: Callable[[StorageError], None] = lambda _error: None
        self._fd = fd
        self._slots = slots
        self._flying: list[Saved] = []
        self._waiting: list[Saved] = []
        self._next: bytes | None = None

    @classmethod
    def create(cls, path: Path, identity: Identity, payload: bytes) -> None:
        """Make the file. Raises UsageError (it exists), NoSpaceError, StorageError."""

        def fill(fd: int) -> None:
            fill_zeros(fd, SLOTS_BYTES)
            write_at(fd, *Slots(identity).encode(payload))

        create_file(path, fill)

    @classmethod
    def open(cls, path: Path, identity: Identity) -> SlotFile:
        """Open and lock. Raises MissingError, IdentityError, InUseError, DamagedError, StorageError."""
        fd = open_locked(path)
        try:
            slots, payload = Slots.load(read_at(fd, 0, SLOTS_BYTES), identity)
            write_at(fd, *slots.again(payload))
            os.fdatasync(fd)
        except OSError as error:
            os.close(fd)
            raise storage_error(f"cannot open {path}", error) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, slots, payload)

    def save_now(self, payload: bytes) -> None:
        """Write and sync, blocking: for the start. Raises StorageError."""
        self._check()
        try:
            write_at(self._fd, *self._slots.encode(payload))
            os.fdatasync(self._fd)
        except OSError as error:
            self.failed = storage_error(f"cannot write {self.path}", error)
            raise self.failed from error
        self._slots.stored()
        self.payload = payload

    def save(self, thread: DiskThread, payload: bytes, done: Saved) -> None:
        """Write and sync on ``thread``; ``done()`` when this or a newer payload is durable. Raises StorageError."""
        self._check()
        self._next = payload
        self._waiting.append(done)
        if not self._slots.in_flight:
            self._start(thread)

    def close(self) -> None:
        """Close and unlock; nothing may be in the air."""
        os.close(self._fd)

    def _start(self, thread: DiskThread) -> None:
        assert self._next is not None
        payload, self._next = self._next, None
        self._flying, self._waiting = self._waiting, []
        offset, raw = self._slots.encode(payload)
        thread.write(self._fd, offset, [raw])
        thread.sync(self._fd, lambda error: self._synced(thread, payload, error))

    def _synced(self, thread: DiskThread, payload: bytes, error: OSError | None) -> None:
        if error is not None:
            self.failed = storage_error(f"cannot write {self.path}", error)
            self.on_failed(self.failed)
            return
        self._slots.stored()
        self.payload = payload
        done, self._flying = self._flying, []
        if self._next is not None:
            self._start(thread)
        for each in done:
            each()

    def _check(self) -> None:
        if self.failed is not None:
            raise self.failed
