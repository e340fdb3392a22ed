"""The task set of a logical unit (SAM-5, section 8): order, completion, abortion."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence

from blockrepl.formats.scsi import Asc, SenseKey, Status, sense_data
from blockrepl.frontends.iscsi.scsi.mode import ModePages
from blockrepl.frontends.iscsi.scsi.nexus_state import NexusState
from blockrepl.frontends.iscsi.scsi.refusal import Refusal
from blockrepl.frontends.iscsi.scsi.work import TaskBatch
from blockrepl.frontends.iscsi.task import Attribute, Nexus, Task

_ORDERED, _HEAD_OF_QUEUE, _ACA = int(Attribute.ORDERED), int(Attribute.HEAD_OF_QUEUE), int(Attribute.ACA)


class TaskSet(ABC):
    """One for all nexuses (TST 000b).

    Invariant: every task that was taken and is not finished is in ``_pending``, in ``_held``, or in the ``tasks`` of a
    batch in ``_in_flight``.
    """

    def __init__(self, deliver: Callable[[Sequence[Task]], None]) -> None:
        self.mode = ModePages()
        self.nexuses: dict[Nexus, NexusState] = {}
        self._deliver = deliver
        self._in_flight: dict[TaskBatch, None] = {}
        self._pending: dict[Task, None] = {}
        self._held: deque[Task] = deque()  # behind an ORDERED task
        self._ordered: Task | None = None  # runs alone
        self._watchers: list[tuple[set[Task], Callable[[], None]]] = []

    @abstractmethod
    def _dispatch(self, task: Task, state: NexusState) -> None:
        """Perform a task whose turn it is."""

    @abstractmethod
    def _forget(self, tasks: Collection[Task]) -> None:
        """End what goes on without its task when that is aborted."""

    def _take(self, task: Task, state: NexusState) -> None:
        """Respect ORDERED (SAM-5, 8.6): it waits for all earlier tasks, all later ones for it."""
        if task.attribute == _ACA:
            self.refuse(task, Refusal(SenseKey.ILLEGAL_REQUEST, Asc.INVALID_FIELD_IN_COMMAND_INFORMATION_UNIT))
            return
        if task.attribute != _HEAD_OF_QUEUE:
            busy = self._held or self._ordered is not None
            if busy or (task.attribute == _ORDERED and (self._pending or self._in_flight)):
                self._held.append(task)
                return
            if task.attribute == _ORDERED:
                self._ordered = task
        self._dispatch(task, state)

    # completion

    def set_sense(self, task: Task, refusal: Refusal) -> None:
        """What a refused task ends with."""
        task.status = refusal.status
        if refusal.status == Status.CHECK_CONDITION:
            task.sense = sense_data(
                refusal.key, refusal.asc, information=refusal.information, specific=refusal.specific,
                descriptor=self.mode.descriptor_sense,
            )  # fmt: skip

    def refuse(self, task: Task, refusal: Refusal) -> None:
        """End a task without success."""
        self.set_sense(task, refusal)
        self.finish(task)

    def finish(self, task: Task) -> None:
        """End a task; its status is set."""
        self._pending.pop(task, None)
        task.release_out()
        self._deliver([task])
        if self._watchers or self._held or self._ordered is not None:
            self._ended((task,))

    def _ended(self, tasks: Sequence[Task]) -> None:
        if self._watchers:
            watchers, self._watchers = self._watchers, []
            for waiting, done in watchers:
                waiting.difference_update(tasks)
                if waiting:
                    self._watchers.append((waiting, done))
                else:
                    done()
        if self._ordered in tasks:
            self._ordered = None
        while self._held and self._ordered is None:
            task = self._held[0]
            if task.attribute == _ORDERED and (self._pending or self._in_flight):
                break
            self._held.popleft()
            state = self.nexuses.get(task.nexus)
            if state is None:
                continue
            if task.attribute == _ORDERED:
                self._ordered = task
            self._dispatch(task, state)

    # abort

    def outstanding(self) -> list[Task]:
        """Tasks that were taken and are not finished."""
        return [*self._pending, *(task for batch in self._in_flight for task in batch.tasks), *self._held]

    def abort(self, tasks: Sequence[Task], by: Nexus | None, done: Callable[[], None]) -> None:
        """End tasks. What a volume has taken cannot be taken back: ``done`` is called when the last of them is over.

        ``by`` None: the nexus is lost.
        """
        waiting = set(tasks)
        for task in tasks:
            if by is not None and task.nexus is not by and self.mode.task_aborted_status:
                task.status = Status.TASK_ABORTED
            else:
                task.aborted = True
        for task in [task for task in self._held if task in waiting]:
            self._held.remove(task)
            waiting.discard(task)
            task.release_out()
            self._deliver([task])
        if not waiting:
            done()
            return
        self._watchers.append((waiting, done))
        self._forget(waiting)
