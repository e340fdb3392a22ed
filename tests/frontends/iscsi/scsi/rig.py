"""A target over volumes in memory, and an initiator that is one function call."""

from __future__ import annotations

import errno
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from blockrepl.block import Op, Volume, WriteBatch
from blockrepl.chunks import ChunkPool
from blockrepl.errors import BlockError
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.target import Target
from blockrepl.frontends.iscsi.scsi.unit import LogicalUnit
from blockrepl.frontends.iscsi.task import Nexus, Task, TaskResponse

BLOCK = 512
BLOCKS = 4096
GROUP = uuid.UUID(int=7)
NAME = "iqn.2026-11.org.blockrepl:test"
PAGE = 4096


class MemoryVolume(Volume):
    """Completes at once, or, while ``slow``, when `complete` is called; reads of ``cold`` volumes wait too."""

    def __init__(self, blocks: int = BLOCKS, block: int = BLOCK) -> None:
        self.name = "memory"
        self.size_bytes = blocks * block
        self.block_size_bytes = block
        self.writable = True
        self.max_write_bytes = 1 << 20
        self.atomic_bytes = 1 << 20
        self.data = bytearray(self.size_bytes)
        self.mapped: set[int] = set()
        self.kept = b""
        self.slow = False
        self.cold = False
        self.write_error: BlockError | None = None
        self.read_error: BlockError | None = None
        self.batches: list[tuple[list[int], list[int], list[int], list[int]]] = []
        self.waiting: deque[WriteBatch] = deque()
        self.reads: deque[Callable[[], None]] = deque()
        self.flushes = 0
        self.full = False

    def submit(self, batch: WriteBatch) -> bool:
        columns = (batch.ops, batch.offsets, batch.lengths, batch.flags, batch.cookies, batch.payloads)
        assert {len(column) for column in columns} == {len(batch)}
        assert batch.size_bytes == sum(len(p) for p in batch.payloads if p is not None) <= self.max_write_bytes
        if self.slow:
            self.waiting.append(batch)
            return False
        self._store(batch)
        return True

    def _store(self, batch: WriteBatch) -> None:
        columns = (batch.ops, batch.offsets, batch.lengths, batch.flags)
        self.batches.append(tuple(map(list, columns)))  # type: ignore[arg-type]
        if self.write_error is not None:
            batch.fail(self.write_error)
            batch.release()
            return
        for op, start, length, payload in zip(
            batch.ops, batch.offsets, batch.lengths, batch.payloads, strict=True
        ):  # fmt: skip
            assert 0 <= start <= start + length <= self.size_bytes
            if op == Op.METADATA:
                assert payload is not None
                self.kept = bytes(payload)
                continue
            self.data[start : start + length] = payload if payload is not None else bytes(length)
            pages = range(start // PAGE, -(-(start + length) // PAGE))
            if op == Op.TRIM:
                self.mapped -= {page for page in pages if start <= page * PAGE and (page + 1) * PAGE <= start + length}
            else:
                self.mapped |= set(pages)
        batch.release()

    def complete(self, count: int = 1) -> None:
        """The oldest batches are done."""
        for _ in range(count):
            batch = self.waiting.popleft()
            self._store(batch)
            batch.done(batch)

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        if self.read_error is not None and not self.cold:
            raise self.read_error

        def fill() -> None:
            view[:] = self.data[offset_bytes : offset_bytes + len(view)]

        def read_cold() -> None:
            fill()
            done(self.read_error)

        if self.cold:
            self.reads.append(read_cold)
            return False
        fill()
        return True

    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        self.flushes += 1
        done(self.write_error)

    @property
    def congested(self) -> bool:
        return self.full

    def when_relieved(self, resume: Callable[[], None]) -> None:
        self.resume = resume

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]] | None:
        found, at, end = [], offset_bytes, offset_bytes + length_bytes
        while at < end:
            after = min((at // PAGE + 1) * PAGE, end)
            found.append((at, after - at, at // PAGE in self.mapped))
            at = after
        return found

    def metadata(self) -> bytes:
        return self.kept


class Initiator:
    """One nexus."""

    def __init__(self, rig: Rig, name: str, *, ready: bool = True) -> None:
        self.rig = rig
        self.nexus = Nexus(f"iqn.2026-11.org.blockrepl:{name}", b"\x80\0\0\0\0\1", NAME, rig.target.port_group)
        rig.target.nexus_begun(self.nexus)
        self.done: list[Task] = []
        self.tag = 0
        if ready:
            self.clear()

    def clear(self) -> None:
        """Hear out the unit attentions."""
        for lun in self.rig.target.units:
            for _ in range(9):
                if self.send("00" + "00" * 5, lun=lun).status == 0:
                    break

    def task(
        self, cdb: str | bytes, data: bytes = b"", *, room: int = 0, lun: int = 0, attribute: int = 1, cuts: int = 1,
        announced: int | None = None,
    ) -> Task:  # fmt: skip
        """``cuts``: into how many pieces the Data-Out comes. ``room``: expected Data-In."""
        raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
        self.tag += 1
        size = len(data) if announced is None else announced
        task = Task(self.nexus, lun, raw.ljust(16, b"\0"), attribute, self.tag, room, size, self._done)
        step = -(-len(data) // cuts) if data else 1
        for start in range(0, len(data), step):
            chunk = self.rig.pool.take(step)
            piece = data[start : start + step]
            chunk.view[: len(piece)] = piece
            task.chunks.append(chunk)
            task.data_out.append(chunk.view[: len(piece)])
            self.rig.out_chunks.append(chunk)
        return task

    def _done(self, tasks: Sequence[Task]) -> None:
        self.done += tasks

    def send(self, cdb: str | bytes, data: bytes = b"", **how: Any) -> Task:
        """Execute one command; it need not be complete."""
        task = self.task(cdb, data, **how)
        self.rig.target.execute([task])
        self.rig.turn()
        return task

    def ok(self, cdb: str | bytes, data: bytes = b"", **how: Any) -> bytes:
        """The Data-In of a command that ends well."""
        task = self.send(cdb, data, **how)
        assert task in self.done, "the command did not end"
        assert task.status == 0, f"status {task.status:#x} sense {task.sense.hex()}"
        answer = b"".join(bytes(piece) for piece in task.data_in)
        if task.in_chunk is not None:
            task.in_chunk.release()
        return answer

    def refused(self, cdb: str | bytes, data: bytes = b"", **how: Any) -> tuple[int, int]:
        """(sense key, additional sense code) of a command that does not."""
        task = self.send(cdb, data, **how)
        assert task in self.done, "the command did not end"
        assert task.status == 2, f"status {task.status:#x}"
        return task.sense[2] & 0xF, int.from_bytes(task.sense[12:14], "big")

    def abort(self, function: int, lun: int = 0, tag: int | None = None) -> list[TaskResponse]:
        """A task management function; its response comes into the list."""
        responses: list[TaskResponse] = []
        self.rig.target.abort(self.nexus, function, lun, tag, responses.append)
        self.rig.turn()
        return responses


class Rig:
    """One target, LUN 0 served from memory."""

    def __init__(self, block: int = BLOCK, blocks: int = BLOCKS) -> None:
        self.pool = ChunkPool()
        self.timers: deque[tuple[float, Callable[[], None]]] = deque()
        self.target = Target(self.pool, lambda delay_s, call: self.timers.append((delay_s, call)), 1)
        self.out_chunks: list[Any] = []
        self.volume = MemoryVolume(blocks, block)
        self.unit = self.add(0, self.volume)

    def add(self, lun: int, volume: MemoryVolume) -> LogicalUnit:
        """Another LUN."""
        identity = UnitIdentity(GROUP, lun, f"volume{lun}", volume.size_bytes, volume.block_size_bytes)
        unit = self.target.add(lun, identity, {2: 2})
        unit.serve(volume)
        return unit

    def turn(self) -> None:
        """The loop goes round until nothing is left to do at once; what has to wait longer waits."""
        for _ in range(100_000):
            now = [timer for timer in self.timers if timer[0] == 0]
            if not now:
                return
            for timer in now:
                self.timers.remove(timer)
                timer[1]()
        raise AssertionError("the loop does not come to rest")

    def pass_time(self) -> None:
        """Everything that waits for time to pass happens."""
        while self.timers:
            self.timers.popleft()[1]()


def io_error() -> BlockError:
    return BlockError(errno.EIO)
