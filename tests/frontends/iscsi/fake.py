"""A device server of the tests: one disk in memory, as little of SCSI as initiators need to find and use it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from blockrepl.frontends.iscsi.task import Event, Nexus, Task, TaskFunction, TaskResponse

BLOCK = 512
ILLEGAL = bytes([0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0])


class FakeDevice:
    """LUN 0 is a disk. ``hold`` True keeps tasks until `let_go`."""

    def __init__(self, blocks: int = 1 << 16) -> None:
        self.disk = bytearray(blocks * BLOCK)
        self.hold = False
        self.held: list[Task] = []
        self.executed: list[list[Task]] = []
        self.begun: list[Nexus] = []
        self.lost: list[Nexus] = []
        self.aborts: list[tuple[int, int, int | None]] = []
        self.on_event: Callable[[Sequence[Nexus], Event], None] = lambda nexuses, event: None
        self.congested = False
        self.resumes: list[Callable[[], None]] = []

    def execute(self, tasks: Sequence[Task]) -> None:
        self.executed.append(list(tasks))
        if self.hold:
            self.held += tasks
            return
        for task in tasks:
            self._do(task)
        tasks[0].done(tasks)

    def let_go(self) -> None:
        tasks, self.held = self.held, []
        for task in tasks:
            self._do(task)
        for task in tasks:
            task.done([task])

    def _do(self, task: Task) -> None:
        cdb, data = task.cdb, b"".join(task.data_out)
        task.release_out()
        operation = cdb[0]
        if operation == 0x12:
            task.data_in = [bytes([0, 0, 6, 2, 31, 0, 0, 2]) + b"FAKE    " + b"disk            " + b"1   "]
            task.data_in = [task.data_in[0][: cdb[4]]]
        elif operation == 0xA0:
            task.data_in = [struct.pack(">IIQ", 8, 0, 0)]
        elif operation == 0x25:
            task.data_in = [struct.pack(">II", len(self.disk) // BLOCK - 1, BLOCK)]
        elif operation == 0x9E:
            task.data_in = [struct.pack(">QI20x", len(self.disk) // BLOCK - 1, BLOCK)]
        elif operation in (0x28, 0x88):
            at, length = extent(cdb)
            task.data_in = [memoryview(bytes(self.disk[at : at + length]))]
        elif operation in (0x2A, 0x8A):
            at, length = extent(cdb)
            task.needed_out_bytes = length
            part = data[:length]
            self.disk[at : at + len(part)] = part
        elif operation == 0x1A:
            task.data_in = [bytes([3, 0, 0, 0])]
        elif operation not in (0x00, 0x35, 0x91):
            task.status, task.sense = 2, ILLEGAL
        task.data_in = [buffer for buffer in task.data_in if len(buffer)]

    def data_out_bytes(self, lun: int, cdb: bytes) -> int:
        if lun == 0 and cdb[0] in (0x2A, 0x8A):
            return extent(cdb)[1]
        return 0

    def abort(
        self, nexus: Nexus, function: int, lun: int, tag: int | None, done: Callable[[TaskResponse], None]
    ) -> None:  # fmt: skip
        self.aborts.append((function, lun, tag))
        whole = function in (TaskFunction.TARGET_WARM_RESET, TaskFunction.TARGET_COLD_RESET)
        if lun != 0 and not whole:
            done(TaskResponse.NO_LUN)
            return
        ended = [task for task in self.held if tag is None or task.tag == tag]
        self.held = [task for task in self.held if task not in ended]
        for task in ended:
            task.release_out()
            task.aborted = True
        if ended:
            ended[0].done(ended)
        done(TaskResponse.COMPLETE if ended or tag is None else TaskResponse.NO_TASK)

    def nexus_begun(self, nexus: Nexus) -> None:
        self.begun.append(nexus)

    def nexus_lost(self, nexus: Nexus) -> None:
        self.lost.append(nexus)
        ended = [task for task in self.held if task.nexus is nexus]
        self.held = [task for task in self.held if task.nexus is not nexus]
        for task in ended:
            task.release_out()
            task.aborted = True
        if ended:
            ended[0].done(ended)

    def when_relieved(self, resume: Callable[[], None]) -> None:
        self.resumes.append(resume)


def extent(cdb: bytes) -> tuple[int, int]:
    """Of READ and WRITE (10) and (16), in bytes."""
    if cdb[0] in (0x28, 0x2A):
        lba, count = struct.unpack_from(">xxIxH", cdb)
    else:
        lba, count = struct.unpack_from(">xxQI", cdb)
    return lba * BLOCK, count * BLOCK
