"""Simulated files that lose power, and a disk thread over them."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from blockrepl.block import Buffer, Op, WriteBatch
from blockrepl.errors import DamagedError
from blockrepl.formats.slots import SLOTS_BYTES
from blockrepl.storage.image import block_error
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.slot_file import SlotFile
from blockrepl.storage.undo import Write
from blockrepl.storage.undo_file import UndoFile

if TYPE_CHECKING:
    from tests.sim.process import Process

HEAD_BYTES = 4096 * 4  # slots, superblocks, bitmaps lie below

_numbers = itertools.count(100)


class SimFile:
    """Bytes as processes see them (page cache), and as the platter has them.

    What was written since the last sync reaches the platter in any subset of its units when the power goes. A sync
    covers what was written before it began. After a sync that failed, what it should have covered is clean in the cache
    and not on the platter: no later sync brings it there (PROTOCOL, rule 11).
    """

    def __init__(self, size_bytes: int) -> None:
        self.fd = next(_numbers)
        self.cache = bytearray(size_bytes)
        self.platter = bytearray(size_bytes)
        self.pending: list[tuple[int, int, bytes]] = []  # (serial, offset, data)
        self.serial = 0
        self.metadata = b""  # beside it, always durable
        self.head_changes = 0  # how often something below `HEAD_BYTES` reached the platter
        self._faults: dict[str, list[int]] = {}  # "write" or "sync" → [operations that still work, that fail, errno]

    def fail(self, kind: str, *, after: int = 0, times: int = 1, code: int = errno.EIO) -> None:
        """``times`` operations of a kind fail, behind ``after`` that work."""
        self._faults[kind] = [after, times, code]

    def mend(self) -> None:
        """No error any more."""
        self._faults.clear()

    def _trip(self, kind: str) -> None:
        fault = self._faults.get(kind)
        if fault is None:
            return
        if fault[0]:
            fault[0] -= 1
            return
        fault[1] -= 1
        if not fault[1]:
            del self._faults[kind]
        raise OSError(fault[2], f"injected {kind} error")

    def flip(self, offset: int, bit: int) -> None:
        """A bit of the platter changes by itself; for a file that no process has open."""
        self.platter[offset] ^= 1 << bit
        self.cache[offset] ^= 1 << bit

    def written_back(self) -> None:
        """Time has passed: the kernel has brought to the platter what was written."""
        for _, offset, data in self.pending:
            self.platter[offset : offset + len(data)] = data
        self.pending.clear()

    def copy(self) -> SimFile:
        """Another file of the same content and fate."""
        other = SimFile(0)
        other.cache, other.platter = bytearray(self.cache), bytearray(self.platter)
        other.pending, other.serial, other.metadata = list(self.pending), self.serial, self.metadata
        return other

    def write(self, offset: int, data: Buffer) -> None:
        """Into the cache. Raises OSError when one was asked for."""
        assert offset >= 0
        assert offset + len(data) <= len(self.cache)
        self._trip("write")
        self.cache[offset : offset + len(data)] = data
        self.serial += 1
        self.pending.append((self.serial, offset, bytes(data)))

    def read(self, offset: int, length: int) -> bytes:
        """From the cache."""
        if offset + length > len(self.cache):
            raise DamagedError(f"the file ends at {len(self.cache)}")
        return bytes(self.cache[offset : offset + length])

    def sync_end(self, serial: int) -> None:
        """A sync that began at ``serial`` is done. Raises OSError when one was asked for."""
        covered = [each for each in self.pending if each[0] <= serial]
        self.pending = [each for each in self.pending if each[0] > serial]
        self._trip("sync")
        for _, offset, data in covered:
            self.platter[offset : offset + len(data)] = data
            self.head_changes += offset < HEAD_BYTES

    def write_durably(self, offset: int, data: Buffer) -> None:
        """As pwritev2 with RWF_DSYNC: this and nothing else becomes durable. Raises OSError."""
        self.write(offset, data)
        serial, _, whole = self.pending.pop()
        self._trip("sync")
        self.serial = serial
        # What is still pending there is older, and must not come back over it.
        end = offset + len(whole)
        self.pending = [each for each in self.pending if not (each[1] < end and offset < each[1] + len(each[2]))]
        self.platter[offset:end] = whole
        self.head_changes += offset < HEAD_BYTES

    def sync(self) -> None:
        """All at once."""
        self.sync_end(self.serial)

    def power_cut(self, random: Random, unit: int) -> None:
        """Each unit of each unsynced write is on the platter or is not."""
        style = random.choice(["any", "whole writes", "nothing", "everything", "prefix"])
        left = random.randrange(len(self.pending) + 1)
        for _, offset, data in self.pending:
            whole = random.random() < 0.5
            left -= 1
            for start in range(0, len(data), unit):
                kept = {
                    "any": random.random() < 0.5, "whole writes": whole, "nothing": False, "everything": True,
                    "prefix": left >= 0,
                }[style]  # fmt: skip
                if kept:
                    piece = data[start : start + unit]
                    self.platter[offset + start : offset + start + len(piece)] = piece
        self.pending.clear()
        self.head_changes += 1
        self.cache[:] = self.platter


class SimImage:
    """`ports.Image` over a file; every store is an effect between which the process may die."""

    def __init__(self, file: SimFile, process: Process) -> None:
        self.file = file
        self.fd = file.fd
        self.size_bytes = len(file.cache)
        self._process = process

    def pwrite(self, offset_bytes: int, data: memoryview) -> None:
        """See `ports.Image`."""
        self._process.effect()
        self.file.write(offset_bytes, data)

    def store(self, batch: WriteBatch) -> None:
        """See `ports.Image`."""
        for index, (offset, length, payload) in enumerate(
            zip(batch.offsets, batch.lengths, batch.payloads, strict=True)
        ):
            try:
                if batch.ops[index] == Op.METADATA:
                    assert payload is not None
                    self.set_metadata(payload)
                elif payload is None:
                    self.zero(offset, length, allocate=batch.ops[index] == Op.ZERO)
                else:
                    self.pwrite(offset, payload)
            except OSError as error:
                batch.errors = batch.errors or [None] * len(batch.offsets)
                batch.errors[index] = block_error(error)

    def zero(self, offset_bytes: int, length_bytes: int, *, allocate: bool) -> None:
        """See `ports.Image`."""
        self._process.effect()
        self.file.write(offset_bytes, bytes(length_bytes))

    def trim(self, offset_bytes: int, length_bytes: int) -> None:
        """See `ports.Image`."""
        self.zero(offset_bytes, length_bytes, allocate=False)

    def metadata(self) -> bytes:
        """See `ports.Image`."""
        return self.file.metadata

    def set_metadata(self, data: Buffer) -> None:
        """See `ports.Image`: durable when it returns."""
        self._process.effect()
        self.file.metadata = bytes(data)

    def read_cached(self, offset_bytes: int, view: memoryview) -> bool:
        """See `ports.Image`: sometimes it is not in the cache."""
        if self._process.world.random.random() < 0.3:
            return False
        self.read(offset_bytes, view)
        return True

    def read(self, offset_bytes: int, view: memoryview) -> None:
        """See `ports.Image`."""
        view[:] = self.file.read(offset_bytes, len(view))

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]]:
        """All data."""
        return [(offset_bytes, length_bytes, True)]


class SimDisk:
    """`storage.executor.DiskThread`: writes in order, syncs grouped, both some time later."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._files = {file.fd: file for file in process.machine.files.values()}
        self._queue: list[tuple[int, int, Any, Any]] = []
        self._busy = False
        self._failed: dict[int, OSError] = {}
        self.slow_until_s = 0.0

    def write(
        self, fd: int, offset: int, buffers: Sequence[Buffer], done: Callable[[OSError | None], None] | None = None
    ) -> None:
        """See `DiskThread.write`."""
        self._put((fd, offset, list(buffers), done))

    def sync(self, fd: int, done: Callable[[OSError | None], None]) -> None:
        """See `DiskThread.sync`."""
        self._put((fd, -1, None, done))

    def sync_through(self, fd: int, position: int, done: Callable[[int, OSError | None], None]) -> None:
        """See `DiskThread.sync_through`."""
        self._put((fd, position, None, done))

    def _put(self, operation: tuple[int, int, Any, Any]) -> None:
        self._process.effect()
        self._queue.append(operation)
        if not self._busy:
            self._busy = True
            self._world.after(self._world.random.uniform(0, 0.001), self._round, self._process)

    def _round(self) -> None:
        """What is queued, then its syncs, each file once."""
        random = self._world.random
        count = random.randint(1, len(self._queue))
        part, self._queue = self._queue[:count], self._queue[count:]
        syncs: dict[int, list[Callable[[OSError | None], None]]] = {}
        throughs: dict[int, tuple[int, Callable[[int, OSError | None], None]]] = {}
        for fd, offset, buffers, done in part:
            if buffers is None:
                if offset < 0:
                    syncs.setdefault(fd, []).append(done)
                else:
                    throughs[fd] = offset, done
                    syncs.setdefault(fd, [])
                continue
            error = self._write(fd, offset, buffers)
            if error is not None:
                self._failed[fd] = error
            if done is not None:
                self._post(partial(done, error))
        serials = {fd: self._files[fd].serial for fd in syncs}
        delay = random.choice([0.0005, 0.002, 0.01])
        if self._world.now_s < self.slow_until_s:
            delay = random.uniform(0.05, 0.4)

        def synced() -> None:
            for fd, dones in syncs.items():
                error = self._failed.pop(fd, None) or self._sync(fd, serials[fd])
                if fd in throughs:
                    self._post(partial(throughs[fd][1], throughs[fd][0], error))
                for done in dones:
                    self._post(partial(done, error))
            self._busy = bool(self._queue)
            if self._queue:
                self._round()

        self._world.after(delay if syncs else 0.0, synced, self._process)

    def _write(self, fd: int, offset: int, buffers: list[Buffer]) -> OSError | None:
        try:
            self._files[fd].write(offset, b"".join(buffers))
        except OSError as error:
            return error
        return None

    def _sync(self, fd: int, serial: int) -> OSError | None:
        try:
            self._files[fd].sync_end(serial)
        except OSError as error:
            return error
        return None

    def _post(self, result: Callable[[], None]) -> None:
        self._world.after(self._world.random.choice([0.0, 0.0003]), result, self._process)


class SimJournalFile(JournalFile):
    """The real one; only what reads from the operating system reads from the simulated file."""

    file: SimFile
    process: Process

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._file.fd = -1  # a simulated descriptor is not the system's to close

    def read(self, offset: int, length: int) -> bytes:
        return self.file.read(offset, length)

    def reader(self) -> Callable[[int, int], bytes]:
        return self.read

    def read_cached(self, offset: int, view: memoryview) -> bool:
        if self.process.world.random.random() < 0.3:
            return False
        view[:] = self.file.read(offset, len(view))
        return True

    def _commit_here(self) -> None:
        random = self.process.world.random
        try:
            for offset, buffers in self._writes:
                self.process.effect()
                self.file.write_durably(offset, b"".join(buffers))
        except OSError as error:
            self._fail(error)
            return
        self._sync_s = random.choice([0.0, 0.0, 1.0])  # the real one takes the time
        self._drop_writes()
        self._synced(self.journal.tail, None)


class SimSlotFile(SlotFile):
    """As `SimJournalFile`."""

    file: SimFile

    def save_now(self, payload: bytes) -> None:
        offset, raw = self._slots.encode(payload)
        self.file.write(offset, raw)
        self.file.sync()
        self._slots.stored()
        self.payload = payload


class SimUndoFile(UndoFile):
    """As `SimJournalFile`. The file has all its bytes from the start: what an older copy left stands behind the new."""

    file: SimFile
    process: Process

    def _read(self, offset: int, length: int) -> bytes:
        return self.file.read(offset, length)

    def _size(self) -> int:
        return len(self.file.cache)

    def _resize(self, size_bytes: int) -> None:
        self.process.effect()
        self.file.write(0, bytes(512))  # of the header: what is truncated may come back with the power

    def _draw(self) -> int:
        return self.process.world.random.getrandbits(64)

    def _write_now(self, writes: list[Write]) -> None:
        for offset, buffers in writes:
            self.process.effect()
            self.file.write(offset, b"".join(buffers))
        self.file.sync()


SLOT_FILE_BYTES = SLOTS_BYTES


class SimSpills:
    """`ports.Spills` of a machine: what is kept beside the ring for primaries that are away; durable once appended."""

    def __init__(self) -> None:
        self._records: dict[int, list[tuple[int, bytes]]] = {}

    def append(self, sender: int, records: Sequence[tuple[int, bytes]]) -> None:
        """See `ports.Spills`."""
        known = self._records.setdefault(sender, [])
        known += [each for each in records if not known or each[0] > known[-1][0]]

    def after(self, sender: int, number: int, limit_bytes: int) -> list[SpilledRecord]:
        """See `ports.Spills`."""
        return [SpilledRecord(*each) for each in self._records.get(sender, []) if each[0] > number]

    def read(self, sender: int, wanted: Sequence[Any]) -> list[bytes]:
        """See `ports.Spills`."""
        return [each.record for each in wanted]

    def drop(self, sender: int) -> None:
        """See `ports.Spills`."""
        self._records.pop(sender, None)


class SpilledRecord(NamedTuple):
    """One of them."""

    last: int
    record: bytes
