"""What the tests of journal and recovery share."""

from __future__ import annotations

from crc32c import crc32c

from blockrepl.formats.journal import FrameHeader, FrameKind
from blockrepl.formats.slots import SlotKind
from blockrepl.storage.journal import Journal, Write
from blockrepl.storage.recovery import Recovered, recover
from blockrepl.storage.slots import Identity
from tests.storage.sim_disk import SimDisk

RING_BYTES = 1 << 20
GROUP = bytes(range(16))
IDENTITY = Identity(GROUP, 2, SlotKind.JOURNAL)


def body_of(number: int, size: int, salt: int = 0) -> bytes:
    """A body that says whose it is, all through."""
    word = b"%08d.%07d" % (number, salt)
    return (word * (size // len(word) + 1))[:size]


def good_body(header: FrameHeader, body: memoryview) -> bool:
    return crc32c(body) == header.body_crc


class Rig:
    """A journal on a simulated disk."""

    def __init__(self, ring_bytes: int = RING_BYTES, tag: int = 7) -> None:
        self.journal = Journal.format(IDENTITY, ring_bytes, tag)
        self.disk = SimDisk(self.journal.file_bytes)
        self.save(b"")

    def perform(self, writes: list[Write]) -> None:
        for offset, buffers in writes:
            self.disk.write(offset, buffers)

    def append(
        self, number: int, size: int = 100, count: int = 1, stream: int = 3, sender: int = 1, salt: int = 0
    ) -> int:
        """Append a record; return its position."""
        body = body_of(number, size, salt)
        self.perform(
            self.journal.append(FrameKind.RECORD, number, count, stream, sender, crc32c(body), [body], len(body))
        )
        return self.journal.tail - frame_size(size)

    def note(self, number: int) -> None:
        self.perform(self.journal.append_note(number))

    def sync(self) -> None:
        self.disk.sync()
        self.journal.synced(self.journal.tail)

    def begin_save(self, state: bytes) -> None:
        self.perform([self.journal.superblock(state)])

    def end_save(self) -> None:
        self.disk.sync()
        self.journal.superblock_synced()

    def save(self, state: bytes) -> None:
        self.begin_save(state)
        self.end_save()

    def examine(self) -> Recovered:
        """Recover, change nothing."""
        return recover(self.disk.read, good_body, IDENTITY, self.journal.ring_bytes)

    def restart(self) -> Recovered:
        """Recover, settle, go on."""
        recovered = self.examine()
        self.perform(list(recovered.writes))
        self.journal = recovered.journal
        self.sync()
        return recovered

    def numbers(self) -> list[int]:
        return [ref.first for ref in self.journal.frames()]


def frame_size(body_bytes: int) -> int:
    """Independent of the code under test: 64 bytes of header, whole blocks of 4 KiB."""
    return -(-(64 + body_bytes) // 4096) * 4096
