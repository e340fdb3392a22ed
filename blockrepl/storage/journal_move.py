"""A journal volume anew, in another file or of another size, from one that is in use.

The new ring gets every frame of the old one, in order, at positions of its own. Nothing counts before the owner says
so, by one rename: until then the old file is the journal, and afterwards the new one is (PROTOCOL, rule 9).
"""

from __future__ import annotations

import fcntl
import os
import secrets
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from blockrepl.errors import NoSpaceError, StorageError, UsageError
from blockrepl.formats.journal import FRAME_HEADER_BYTES, FRAME_STRUCT, FrameHeader
from blockrepl.formats.slots import SLOTS_BYTES
from blockrepl.storage.executor import write_all
from blockrepl.storage.files import fill_zeros, storage_error, sync_directory
from blockrepl.storage.frame_index import FrameRef
from blockrepl.storage.journal import Journal
from blockrepl.storage.slots import Identity, Slots

Read = Callable[[int, int], bytes]


class NewJournal:
    """The file that is to be the journal. All methods but `position_of` block, and raise StorageError."""

    def __init__(self, path: Path, identity: Identity, ring_bytes: int) -> None:
        """``path`` is where it will lie; until `name` it is a draft beside it, which a later attempt overwrites."""
        self.path = path
        self.journal = Journal.format(identity, ring_bytes, secrets.randbits(32))
        self.draft = path.with_name(f".{path.name}.new")
        self._old: list[int] = []  # positions of the old frames copied, ascending
        self._new: list[int] = []  # and where they are now
        try:
            self.fd = os.open(self.draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error(f"cannot make {self.draft}", error) from error
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fill_zeros(self.fd, self.journal.file_bytes)
            os.fsync(self.fd)
        except OSError as error:
            self.abandon()
            raise storage_error(f"cannot make {self.draft}", error) from error

    def abandon(self) -> None:
        """It will not be: give the space back."""
        os.close(self.fd)
        self.draft.unlink(missing_ok=True)

    def copy(self, frames: list[FrameRef], read: Read, state: bytes) -> None:
        """Every frame of the old journal, oldest first. Raises UsageError when the ring is too small for them."""
        try:
            self.save(state)
            for frame in frames:
                self._take(frame, read)
            self._sync()
        except OSError as error:
            raise storage_error(f"cannot write {self.draft}", error) from error

    def _take(self, frame: FrameRef, read: Read) -> None:
        journal = self.journal
        raw = read(frame.body_offset - FRAME_HEADER_BYTES, FRAME_HEADER_BYTES + frame.body_bytes)
        header = FrameHeader._make(FRAME_STRUCT.unpack_from(raw))
        if header.position != frame.position:
            raise StorageError(f"cannot read the frame at position {frame.position}: another stands there")
        if not journal.fits(frame.body_bytes):
            self._sync()
        if not journal.fits(frame.body_bytes):
            raise NoSpaceError(
                f"a ring of {journal.ring_bytes} bytes is too small for what the journal holds now",
                hint="wait until the secondaries have it (blockrepl status), or choose a larger one",
            )
        body = [memoryview(raw)[FRAME_HEADER_BYTES:]]
        for offset, buffers in journal.append(
            header.kind, header.first, header.count, header.stream, header.sender, header.body_crc, body,
            header.body_bytes,
        ):  # fmt: skip
            write_all(self.fd, offset, buffers)
        self._old.append(frame.position)
        self._new.append(journal.tail - header.size_bytes)

    def _sync(self) -> None:
        os.fdatasync(self.fd)
        self.journal.synced(self.journal.tail)

    def save(self, state: bytes) -> None:
        """The owner's state, durably. Raises OSError."""
        write_all(self.fd, *self.journal.superblock(state))
        os.fdatasync(self.fd)
        self.journal.superblock_synced()

    def name(self) -> None:
        """Put it at its path: in place of the old journal, when that lies there, by one rename.

        Raises UsageError (something else lies there), StorageError.
        """
        try:
            self.draft.rename(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise storage_error(f"cannot name {self.path}", error) from error

    def position_of(self, old: int) -> int:
        """Where the frame that stood at ``old``, or the next one, is now; the tail for none."""
        place = bisect_left(self._old, old)
        return self._new[place] if place < len(self._new) else self.journal.tail


def refuse_stranger(path: Path, current: Path, identity: Identity) -> None:
    """What lies at ``path`` is never overwritten, unless it is the journal, or what a crash left of a move to there.

    Raises UsageError.
    """
    if not path.parent.is_dir():
        raise UsageError(f"{path.parent} is not there", hint="is its disk mounted? make the directory first")
    if path != current and path.exists() and not _is_ours(path, identity):
        raise UsageError(
            f"{path} exists already, and is not this node's journal", hint="move it away, or choose another path"
        )


def _is_ours(path: Path, identity: Identity) -> bool:
    try:
        with path.open("rb") as file:
            Slots.load(file.read(SLOTS_BYTES).ljust(SLOTS_BYTES, b"\0"), identity)
    except (OSError, StorageError):
        return False
    return True
