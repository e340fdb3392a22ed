"""The SCSI target device of one node: logical units by LUN, and the task router in front of them (SAM-5, 4.6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from blockrepl.block import Volume
from blockrepl.chunks import ChunkPool
from blockrepl.formats.scsi import Asc, Opcode, SenseKey, Status, sense_data
from blockrepl.formats.scsi_inquiry import NO_DEVICE
from blockrepl.frontends.iscsi.scsi.control import lun_inventory
from blockrepl.frontends.iscsi.scsi.geometry import data_out_bytes
from blockrepl.frontends.iscsi.scsi.handlers import HANDLERS
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.inquire import standard_data
from blockrepl.frontends.iscsi.scsi.refusal import Refusal, bad_cdb, illegal
from blockrepl.frontends.iscsi.scsi.unit import LogicalUnit, PathState
from blockrepl.frontends.iscsi.task import Event, EventKind, Nexus, Task, TaskFunction, TaskResponse

Later = Callable[[float, Callable[[], None]], object]
"""Call a function on the loop after so many seconds."""


class Target:
    """A `task.DeviceServer`. ``port_group`` is the tag of this node's target port group."""

    handlers = HANDLERS

    def __init__(self, pool: ChunkPool, later: Later, port_group: int) -> None:
        self.pool = pool
        self.later = later
        self.port_group = port_group
        self.units: dict[int, LogicalUnit] = {}
        self.on_event: Callable[[Sequence[Nexus], Event], None] = lambda _nexuses, _event: None
        self._nexuses: dict[Nexus, None] = {}
        self._executing: Nexus | None = None
        self._finished: list[Task] = []

    # units

    def add(self, lun: int, identity: UnitIdentity, other_paths: Mapping[int, int]) -> LogicalUnit:
        """Publish a volume; it can be reached when `LogicalUnit.serve` is called. ``other_paths``: target port group of
        another node → its state, as far as it is known here."""
        unit = LogicalUnit(self, lun, identity, PathState.STANDBY)
        unit.other_paths = dict(other_paths)
        self.units[lun] = unit
        for nexus in self._nexuses:
            unit.begin(nexus)
        self._inventory_changed()
        return unit

    def remove(self, lun: int) -> None:
        """The volume is no longer published."""
        unit = self.units.pop(lun)
        unit.withdraw(PathState.UNAVAILABLE)
        self._inventory_changed()

    def _inventory_changed(self) -> None:
        for unit in self.units.values():
            unit.attend_all(Asc.REPORTED_LUNS_DATA_HAS_CHANGED)

    # `task.DeviceServer`

    def execute(self, tasks: Sequence[Task]) -> None:
        """See `task.DeviceServer`."""
        assert self._executing is None
        self._executing = tasks[0].nexus
        try:
            self._route(tasks)
        finally:
            finished, self._finished = self._finished, []
            self._executing = None
        if finished:
            finished[0].done(finished)

    def _route(self, tasks: Sequence[Task]) -> None:
        start, count = 0, len(tasks)
        while start < count:
            lun = tasks[start].lun
            end = start + 1
            while end < count and tasks[end].lun == lun:
                end += 1
            run = tasks if end - start == count else tasks[start:end]
            unit = self.units.get(lun)
            state = unit.nexuses.get(tasks[start].nexus) if unit is not None else None
            if unit is None or state is None:
                for task in run:
                    self._no_unit(task)
            else:
                unit.execute(run, state)
            start = end

    def _no_unit(self, task: Task) -> None:
        """What a LUN answers behind which nothing is (SPC-4, 6.6.2, 6.33, 6.39)."""
        cdb = task.cdb
        task.needed_out_bytes = 0
        try:
            task.data_in = (self._of_no_unit(cdb),)
        except Refusal as refusal:
            task.status = Status.CHECK_CONDITION
            task.sense = sense_data(refusal.key, refusal.asc, specific=refusal.specific, descriptor=False)
        task.release_out()
        self.deliver([task])

    def _of_no_unit(self, cdb: bytes) -> bytes:
        if cdb[0] == Opcode.INQUIRY:
            if cdb[1] & 0x01:
                raise bad_cdb(1, 0)
            return standard_data(bytes(16), NO_DEVICE)[: int.from_bytes(cdb[3:5], "big")]
        if cdb[0] == Opcode.REPORT_LUNS:
            return lun_inventory(self.units, cdb)
        if cdb[0] == Opcode.REQUEST_SENSE:
            asc = Asc.LOGICAL_UNIT_NOT_SUPPORTED
            return sense_data(SenseKey.ILLEGAL_REQUEST, asc, descriptor=bool(cdb[1] & 0x01))[: cdb[4]]
        raise illegal(Asc.LOGICAL_UNIT_NOT_SUPPORTED)

    def deliver(self, tasks: Sequence[Task]) -> None:
        """Give finished tasks of one nexus back: those of the batch under way all at once."""
        if tasks[0].nexus is self._executing:
            self._finished += tasks
        else:
            tasks[0].done(tasks)

    def data_out_bytes(self, lun: int, cdb: bytes) -> int:
        """See `task.DeviceServer`."""
        unit = self.units.get(lun)
        return data_out_bytes(cdb, unit.block_bytes) if unit is not None else 0

    def nexus_begun(self, nexus: Nexus) -> None:
        """See `task.DeviceServer`."""
        self._nexuses[nexus] = None
        for unit in self.units.values():
            unit.begin(nexus)

    def nexus_lost(self, nexus: Nexus) -> None:
        """See `task.DeviceServer`."""
        self._nexuses.pop(nexus, None)
        for unit in self.units.values():
            unit.abort([task for task in unit.outstanding() if task.nexus is nexus], None, lambda: None)
            unit.lose(nexus)

    @property
    def congested(self) -> bool:
        """See `task.DeviceServer`."""
        return any(unit.volume is not None and unit.volume.congested for unit in self.units.values())

    def when_relieved(self, resume: Callable[[], None]) -> None:
        """See `task.DeviceServer`."""

        def relieved() -> None:
            if self.congested:
                self.when_relieved(resume)
            else:
                resume()

        volumes: list[Volume] = [unit.volume for unit in self.units.values() if unit.volume is not None]
        for volume in volumes:
            if volume.congested:
                volume.when_relieved(relieved)
                return
        self.later(0.0, resume)

    # task management (SAM-5, section 7)

    def abort(
        self, nexus: Nexus, function: int, lun: int, tag: int | None, done: Callable[[TaskResponse], None]
    ) -> None:
        """See `task.DeviceServer`."""
        if function in (TaskFunction.TARGET_WARM_RESET, TaskFunction.TARGET_COLD_RESET):
            self._reset(list(self.units.values()), None, nexus, done)
            return
        unit = self.units.get(lun)
        if unit is None:
            done(TaskResponse.NO_LUN)
        elif function == TaskFunction.ABORT_TASK:
            found = [task for task in unit.outstanding() if task.nexus is nexus and task.tag == tag]
            if found:
                unit.abort(found, nexus, lambda: done(TaskResponse.COMPLETE))
            else:
                done(TaskResponse.NO_TASK)
        elif function == TaskFunction.ABORT_TASK_SET:
            self.on_event([nexus], Event(EventKind.TASKS_CLEARED, lun))
            own = [task for task in unit.outstanding() if task.nexus is nexus]
            unit.abort(own, nexus, lambda: done(TaskResponse.COMPLETE))
        elif function == TaskFunction.CLEAR_TASK_SET:
            self._clear(unit, nexus, done)
        elif function == TaskFunction.LOGICAL_UNIT_RESET:
            self._reset([unit], lun, nexus, done)
        else:
            done(TaskResponse.NOT_SUPPORTED)

    def _clear(self, unit: LogicalUnit, nexus: Nexus, done: Callable[[TaskResponse], None]) -> None:
        tasks = unit.outstanding()
        self.on_event(list(self._nexuses), Event(EventKind.TASKS_CLEARED, unit.lun))
        for other in {task.nexus for task in tasks} - {nexus}:
            state = unit.nexuses.get(other)
            if state is not None and not unit.mode.task_aborted_status:
                state.attend(Asc.COMMANDS_CLEARED_BY_ANOTHER_INITIATOR)
        unit.regulate()
        unit.abort(tasks, nexus, lambda: done(TaskResponse.COMPLETE))

    def _reset(
        self, units: list[LogicalUnit], lun: int | None, nexus: Nexus, done: Callable[[TaskResponse], None]
    ) -> None:
        self.on_event(list(self._nexuses), Event(EventKind.TASKS_CLEARED, lun))
        left = len(units)

        def ended(unit: LogicalUnit) -> None:
            nonlocal left
            unit.reset()
            left -= 1
            if not left:
                done(TaskResponse.COMPLETE)

        if not units:
            done(TaskResponse.COMPLETE)
        for unit in units:
            unit.abort(unit.outstanding(), nexus, lambda unit=unit: ended(unit))  # type: ignore[misc]
