"""An undo file on disk, over the disk thread. It exists, empty, when no copy is under way."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from blockrepl.bitmap import BLOCK_BYTES
from blockrepl.block import Buffer
from blockrepl.errors import BlockreplError
from blockrepl.storage.executor import DiskThread, write_all
from blockrepl.storage.files import open_locked, read_at, storage_error, sync_directory
from blockrepl.storage.undo import Saved, Undo, Write

Done = Callable[[OSError | None], None]
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT))


class UndoFile:
    """One secondary's way back. `undo` is None while there is none.

    `begin` before the copy is stored, `save` before each overwrite, `drop` when the copy has ended or was undone.
    """

    def __init__(
        self, path: Path, fd: int, thread: DiskThread, group: bytes, node: int, sizes: Mapping[int, int],
        block_bytes: int = BLOCK_BYTES,
    ) -> None:  # fmt: skip
        self.path = path
        self.undo: Undo | None = None
        self._fd = fd
        self._thread = thread
        self._group = group
        self._node = node
        self._sizes = dict(sizes)
        self._block_bytes = block_bytes

    @classmethod
    def open(
        cls, path: Path, thread: DiskThread, group: bytes, node: int, sizes: Mapping[int, int], copy: int | None
    ) -> UndoFile:
        """Open and lock. ``copy``: the START of the copy that the node's state says is under way, with a way back.

        Without one, what an ended copy left is dropped. Blocks: for the start. Raises StorageError and its kin.
        """
        try:
            if not path.exists():
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                sync_directory(path.parent)
            file = cls(path, open_locked(path), thread, group, node, sizes)
            file.recover(copy)
        except OSError as error:
            raise storage_error(f"cannot open {path}", error) from error
        except BlockreplError as error:
            raise type(error)(f"{path}: {error}", hint=error.hint) from error
        return file

    def recover(self, copy: int | None) -> None:
        """See `open`. Raises OSError, StorageError."""
        if copy is None:
            self._resize(0)
            return
        size = self._size()
        self.undo, writes = Undo.recover(self._read, size, self._group, self._node, self._sizes, copy)
        self._write_now(writes)

    # while it runs

    def begin(self, copy: int, done: Done) -> None:
        """A new way back, from the copy whose START is ``copy``; ``done`` when it is durable."""
        try:
            self._resize(0)
        except OSError as error:
            done(error)
            return
        self.undo = Undo(self._group, self._node, self._sizes, copy, self._draw(), self._block_bytes)
        offset, buffers = self.undo.header()
        self._put(offset, buffers, done)

    def save(self, blocks: list[Saved], done: Done) -> None:
        """Make ``blocks`` durable. With an error of `NO_SPACE` nothing was saved, and it may be tried again."""
        undo = self.undo
        assert undo is not None
        offset, buffers = undo.append(blocks)

        def saved(error: OSError | None) -> None:
            if error is None:
                undo.synced()
            else:
                undo.failed()
            done(error)

        self._put(offset, buffers, saved)

    def grow(self, volume: int, size_bytes: int) -> None:
        """A volume is larger from the next copy on. There is no copy (asserted): its last block may be saved short."""
        assert self.undo is None
        self._sizes[volume] = size_bytes

    def drop(self) -> None:
        """The copy has ended, durably: give the space back. A crash here leaves a file that `open` drops.

        Raises OSError.
        """
        self.undo = None
        self._resize(0)

    def entries(self) -> Iterator[Saved]:
        """What is saved. Blocks: for a worker. Raises StorageError."""
        assert self.undo is not None
        return self.undo.entries(self._read)

    @property
    def used_bytes(self) -> int:
        """What it takes on disk."""
        return self.undo.used_bytes if self.undo is not None else 0

    def close(self) -> None:
        """Unlock and close."""
        os.close(self._fd)

    def _put(self, offset: int, buffers: Sequence[Buffer], done: Done) -> None:
        failed: list[OSError] = []

        def written(error: OSError | None) -> None:
            if error is not None:
                failed.append(error)

        # A write that failed fails the sync too; its own error says why.
        self._thread.write(self._fd, offset, buffers, written)
        self._thread.sync(self._fd, lambda error: done(failed[0] if failed else error))

    # what the simulator has of its own

    def _read(self, offset: int, length: int) -> bytes:
        return read_at(self._fd, offset, length)

    def _size(self) -> int:
        return os.fstat(self._fd).st_size

    def _draw(self) -> int:
        return secrets.randbits(64)

    def _resize(self, size_bytes: int) -> None:
        os.ftruncate(self._fd, size_bytes)

    def _write_now(self, writes: list[Write]) -> None:
        for offset, buffers in writes:
            write_all(self._fd, offset, buffers)
        os.fdatasync(self._fd)
