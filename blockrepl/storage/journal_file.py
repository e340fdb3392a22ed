"""A journal volume in a file, over a disk thread: group commit, saves in turn, fail-stop."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockrepl.block import Buffer
from blockrepl.errors import StorageError, UsageError
from blockrepl.storage.executor import DiskThread, write_all, write_durably
from blockrepl.storage.files import create_file, fill_zeros, open_locked, read_at, storage_error
from blockrepl.storage.journal import Journal, Write
from blockrepl.storage.recovery import CheckBody, Recovered, recover
from blockrepl.storage.slots import Identity

Saved = Callable[[], None]
Truncated = Callable[[int, int], None]
"""Called with how many sequence numbers and body bytes were discarded."""
INLINE_BYTES = 1 << 18  # larger commits go to the thread: their copying runs beside the loop
INLINE_SYNC_S = 0.004  # on a slower disk all commits do
IOV_JOIN = 512  # frames that follow each other go into one write, up to about so many buffers


@dataclass(slots=True)
class _Save:
    """What the next superblock is to say. Later saves join it while another one is in the air."""

    state: bytes = b""
    trim_to: int = 0
    truncate_to: int | None = None
    done: list[Saved] = field(default_factory=list)
    truncated: Truncated | None = None


class _OpenFile:
    """A descriptor that is closed when nobody reads through it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, length: int) -> bytes:
        return read_at(self.fd, offset, length)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class JournalFile:
    """An open, locked journal volume.

    `append` and then `commit`: ``on_durable(position)`` follows when everything below ``position`` is durable, once per
    fdatasync. Buffers stay unchanged until then.

    Fail-stop: after a failed write or sync nothing is reported durable any more, ``on_failed`` is called once, and
    every later call raises (PROTOCOL, rule 11). The way on is a new process, whose recovery writes again what may
    not have reached the disk.
    """

    def __init__(self, path: Path, fd: int, thread: DiskThread, recovered: Recovered) -> None:
        self.path = path
        self.recovered = recovered
        self.journal: Journal = recovered.journal
        self.failed: StorageError | None = None
        self.on_durable: Callable[[int], None] = lambda _position: None
        self.on_failed: Callable[[StorageError], None] = lambda _error: None
        self._file = _OpenFile(fd)
        self._fd = fd
        self._thread = thread
        self._holding = False  # about to be moved: nothing is appended or saved
        self._writes: list[Write] = []
        self._write_end = -1  # file offset where the last of `_writes` ends
        self.inline_bytes = INLINE_BYTES  # commits up to this size may run on the loop
        self._bytes = 0  # in `_writes`
        self._asked = 0  # the position of the newest sync that the thread was asked for
        self._sync_s = 0.0  # how long a commit takes, smoothed
        self._flying: _Save | None = None
        self._next: _Save | None = None

    @classmethod
    def create(cls, path: Path, identity: Identity, ring_bytes: int, state: bytes = b"") -> None:
        """Make an empty journal volume: allocated, written, synced.

        Raises UsageError (it exists), NoSpaceError, StorageError.
        """
        journal = Journal.format(identity, ring_bytes, secrets.randbits(32))

        def fill(fd: int) -> None:
            fill_zeros(fd, journal.file_bytes)
            write_all(fd, *journal.superblock(state))

        create_file(path, fill)

    @classmethod
    def open(
        cls, path: Path, identity: Identity, check_body: CheckBody, thread: DiskThread, ring_bytes: int | None = None
    ) -> JournalFile:
        """Open, lock, recover, and make durable what was recovered. Blocks: for the start.

        Raises MissingError, IdentityError, InUseError, DamagedError, StorageError.
        """
        fd = open_locked(path)
        try:
            recovered = recover(lambda offset, length: read_at(fd, offset, length), check_body, identity, ring_bytes)
            for offset, buffers in recovered.writes:
                write_all(fd, offset, buffers)
            os.fdatasync(fd)
        except OSError as error:
            os.close(fd)
            raise storage_error(f"cannot recover {path}", error) from error
        except BaseException:
            os.close(fd)
            raise
        recovered.journal.synced(recovered.journal.tail)
        return cls(path, fd, thread, recovered)

    def append(
        self,
        kind: int,
        first: int,
        count: int,
        stream: int,
        sender: int,
        body_crc: int,
        buffers: Sequence[Buffer],
        body_bytes: int,
    ) -> int:
        """Add a frame; return the position that is durable when it is. See `Journal.append`. Raises StorageError."""
        self._check()
        self._put(self.journal.append(kind, first, count, stream, sender, body_crc, buffers, body_bytes))
        return self.journal.tail

    def append_note(self, number: int) -> int:
        """Add a note; return the position that is durable when it is. Raises StorageError."""
        self._check()
        self._put(self.journal.append_note(number))
        return self.journal.tail

    def commit(self) -> None:
        """Write and sync what was appended. Raises StorageError.

        Small commits run here and now while the disk answers fast and the thread has nothing of ours: no thread is
        woken, and what arrives meanwhile waits in the sockets and is the next group. ``on_durable`` is then called
        before this returns.
        """
        self._check()
        if self._holding and not self._writes:
            return  # a sync that is asked for now would answer when this is another file
        # Not beside a sync of the thread's: the kernel tells a write-back error once per open file, and the other of
        # two syncs would take its own lost frames for durable.
        idle = self._asked <= self.journal.durable and self._flying is None
        if idle and self._bytes <= self.inline_bytes and self._sync_s <= INLINE_SYNC_S:
            self._commit_here()
            return
        if idle:
            self._sync_s *= 0.99  # so that a disk that was slow for a while is tried again
        self._flush()
        self._asked = self.journal.tail
        self._thread.sync_through(self._fd, self.journal.tail, self._synced)

    def _commit_here(self) -> None:
        started_s = time.monotonic()
        try:
            for offset, buffers in self._writes:
                write_durably(self._fd, offset, buffers)
        except OSError as error:
            self._fail(error)
            return
        self._sync_s += (time.monotonic() - started_s - self._sync_s) / 16
        self._drop_writes()
        self._synced(self.journal.tail, None)

    def save(self, state: bytes, trim_to: int = 0, done: Saved | None = None) -> None:
        """Make ``state`` durable, and give up the frames below ``trim_to``; ``done()`` when both are durable.

        Saves that wait for their turn become one. A later state covers an earlier trim. Raises StorageError.
        """
        self._check()
        save = self._next = self._next or _Save()
        save.state = state
        save.trim_to = max(save.trim_to, trim_to)
        if done is not None:
            save.done.append(done)
        if self._flying is None and not self._holding:
            self._start_save()

    def truncate(self, position: int, state: bytes, done: Truncated) -> None:
        """Discard the frames from ``position`` on, with one save; nothing is appended before ``done``.

        Raises StorageError.
        """
        save = self._next = self._next or _Save()
        assert save.truncate_to is None
        save.truncate_to = position
        save.truncated = done
        self.save(state)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file, from the disk if need be. Blocks: for a worker. Raises DamagedError, StorageError."""
        return read_at(self._fd, offset, length)

    def reader(self) -> Callable[[int, int], bytes]:
        """`read` of the file as it is now: for a worker that is given places in it, and may run after a move."""
        return self._file.read

    # a move

    def hold(self) -> None:
        """Append and save nothing any more until `release`; what is asked meanwhile waits."""
        self._check()
        if self._holding:
            raise UsageError("the journal is being moved already", hint="wait for it")
        self._holding = True
        self.journal.hold(held=True)

    @property
    def quiet(self) -> bool:
        """Held, and nothing is on its way to the disk. Raises StorageError."""
        self._check()
        return self.journal.durable == self.journal.tail and self._flying is None and not self._writes

    def last_words(self, done: Saved) -> None:
        """``done`` when nothing that was asked of the disk thread before has an answer to come. Raises StorageError."""
        self._check()

        def answered(error: OSError | None) -> None:
            if error is not None:
                self._fail(error)
            done()

        self._thread.sync(self._fd, answered)

    def press(self) -> None:
        """Commit what was appended before `hold`. Raises StorageError."""
        if self._writes:
            self.commit()

    def adopt(self, fd: int, journal: Journal, path: Path, position_of: Callable[[int], int]) -> None:
        """The file behind ``fd`` is the journal from now on, durably. ``position_of``: old positions to new ones."""
        assert self._holding
        assert self.quiet
        self._file, self._fd, self.journal, self.path = _OpenFile(fd), fd, journal, path
        self._asked = journal.durable
        save = self._next
        if save is not None:
            save.trim_to = position_of(save.trim_to)
            save.truncate_to = None if save.truncate_to is None else position_of(save.truncate_to)

    def release(self) -> None:
        """The end of `hold`, wherever the journal is now."""
        self._holding = False
        self.journal.hold(held=False)
        if self._next is not None and self._flying is None and self.failed is None:
            self._start_save()

    def stop(self, error: StorageError) -> None:
        """It may not be the journal any more: nothing is durable here from now on."""
        if self.failed is None:
            self.failed = error
            self.on_failed(error)

    def read_cached(self, offset: int, view: memoryview) -> bool:
        """Fill ``view`` from the page cache. False: it is not all there, `read` in a worker. Raises StorageError."""
        try:
            return os.preadv(self._fd, [view], offset, os.RWF_NOWAIT) == len(view)
        except BlockingIOError:
            return False
        except OSError as error:
            raise storage_error(f"cannot read {self.path}", error) from error

    def close(self) -> None:
        """Close and unlock. The thread must have finished what was queued."""
        self._file.fd = -1
        os.close(self._fd)

    def _put(self, writes: list[Write]) -> None:
        for offset, buffers in writes:
            if offset == self._write_end and len(self._writes[-1][1]) < IOV_JOIN:
                self._writes[-1][1].extend(buffers)
            else:
                self._writes.append((offset, buffers))
            size = sum(map(len, buffers))
            self._write_end = offset + size
            self._bytes += size

    def _flush(self) -> None:
        for offset, buffers in self._writes:
            self._thread.write(self._fd, offset, buffers)
        self._drop_writes()

    def _drop_writes(self) -> None:
        self._writes.clear()
        self._write_end = -1
        self._bytes = 0

    def _synced(self, position: int, error: OSError | None) -> None:
        if error is not None:
            self._fail(error)
        elif self.failed is None:
            self.journal.synced(position)
            self.on_durable(self.journal.durable)  # less than ``position`` when that was truncated meanwhile
            if self._next is not None and self._flying is None and not self._holding:
                self._start_save()

    def _start_save(self) -> None:
        save = self._next
        assert save is not None
        if save.truncate_to is not None and save.truncate_to > self.journal.durable:
            self.commit()  # what stays must be durable first; `_synced` comes back here
            return
        self._flying, self._next = save, None
        if save.trim_to > self.journal.head:
            self.journal.trim(save.trim_to)
        dropped = (0, 0)
        if save.truncate_to is not None:
            self._flush()  # all of it goes: it is voided by its tag
            dropped = self.journal.truncate(save.truncate_to)
        offset, buffers = self.journal.superblock(save.state)
        self._thread.write(self._fd, offset, buffers)
        self._thread.sync(self._fd, lambda error: self._saved(save, dropped, error))

    def _saved(self, save: _Save, dropped: tuple[int, int], error: OSError | None) -> None:
        if error is not None:
            self._fail(error)
            return
        if self.failed is not None:
            return
        self.journal.superblock_synced()
        self._flying = None
        if self._next is not None and not self._holding:
            self._start_save()
        if save.truncated is not None:
            save.truncated(*dropped)
        for done in save.done:
            done()

    def _fail(self, error: OSError) -> None:
        if self.failed is None:
            self.failed = storage_error(f"journal {self.path} failed and takes nothing more", error)
            self.on_failed(self.failed)

    def _check(self) -> None:
        if self.failed is not None:
            raise self.failed
