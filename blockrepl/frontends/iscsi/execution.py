"""Tasks on their way through the device server: when they are executed, answered, and when reading stops.

What is answered at once leaves in one gathered send. Memory is bounded: nothing is executed while the initiator does
not take what is queued, and Data-In is begun in helpings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk
from blockrepl.frontends.iscsi.answers import MASK, Answers
from blockrepl.frontends.iscsi.task import DeviceServer, Task

QUEUED_LIMIT_BYTES = 1 << 18  # bytes the initiator did not take yet: above, nothing is executed and nothing received
HELPING_BYTES = 1 << 20  # of Data-In begun at once
IN_FLIGHT_BYTES = 16 << 20  # of Data-In that tasks may be about to bring


class Output(Protocol):
    """What a session needs of `blockrepl.stream.Stream`."""

    queued_bytes: int
    closed: bool

    def send(self, buffers: Sequence[Buffer], chunk: Chunk | None = None) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class Execution:
    """The tasks of one session.

    Invariants: ``active`` has the tag of every task received and not answered; of these, a task is in exactly one of
    the transfers, ``ready``, the device server, or ``_completed``.
    """

    def __init__(self, device: DeviceServer, answers: Answers, stream: Output) -> None:
        self.active: dict[int, Task] = {}
        self.immediate: set[int] = set()  # tags of immediate commands among the active
        self.ready: deque[Task] = deque()
        self.ready_in_bytes = 0
        self.commands = 0
        self.inside = False  # completions are collected: whoever set it settles when done
        self.paused = False
        self.over = False
        self._device = device
        self._answers = answers
        self._stream = stream
        self._executing_bytes = 0  # Data-In that tasks in the device server may bring
        self._completed: list[Task] = []
        self._out: list[Buffer] = []
        self._awaits_relief = False

    # in

    def add(self, task: Task) -> None:
        """All its data is here."""
        self.ready.append(task)
        self.ready_in_bytes += task.expected_in_bytes

    def run(self) -> None:
        """Hand tasks over, as long as the initiator takes what they bring."""
        ready = self.ready
        while ready and not self.over:
            if self._stream.queued_bytes >= QUEUED_LIMIT_BYTES or self._executing_bytes >= IN_FLIGHT_BYTES:
                return
            if self.ready_in_bytes <= HELPING_BYTES:
                helping: Sequence[Task] = list(ready)
                ready.clear()
                size, self.ready_in_bytes = self.ready_in_bytes, 0
            else:
                helping, size = self._helping()
            self._executing_bytes += size
            self.commands += len(helping)
            inside, self.inside = self.inside, True
            self._device.execute(helping)
            self.inside = inside
            self._answer()

    def _helping(self) -> tuple[list[Task], int]:
        """As many tasks as bring about `HELPING_BYTES`; one at least."""
        helping: list[Task] = []
        size = 0
        while self.ready and size < HELPING_BYTES:
            task = self.ready.popleft()
            size += task.expected_in_bytes
            helping.append(task)
        self.ready_in_bytes -= size
        return helping, size

    def drop_ready(self, wanted: Callable[[Task], bool]) -> list[Task]:
        """Take back tasks that were not handed over, their data released."""
        dropped = [task for task in self.ready if wanted(task)]
        for task in dropped:
            self.ready.remove(task)
            self.ready_in_bytes -= task.expected_in_bytes
            task.release_out()
        return dropped

    # out

    def done(self, tasks: Sequence[Task]) -> None:
        """Of the device server: these are complete."""
        self._completed += tasks
        if not self.inside:
            self.settle()

    def done_without(self, tasks: Sequence[Task]) -> None:
        """These are complete, and the device server never had them."""
        for task in tasks:
            self._executing_bytes += task.expected_in_bytes
        self.done(tasks)

    def settle(self) -> None:
        """Execute what may be executed, answer what is complete, send what is queued, and see to the flow."""
        self.run()
        self._answer()
        if self.paused or self._stream.queued_bytes >= QUEUED_LIMIT_BYTES or self._device.congested:
            self._regulate()

    def _answer(self) -> None:
        """One gathered send for each buffer that holds Data-In; nearly always one for all."""
        tasks, self._completed = self._completed, []
        if not tasks:
            self.flush()
            return
        active, answers = self.active, self._answers
        answers.max_cmd_sn = answers.max_cmd_sn + len(tasks) & MASK
        if self.immediate:
            self._settle_immediate(tasks)
        held: Chunk | None = None
        for task in tasks:
            del active[task.tag]
            self._executing_bytes -= task.expected_in_bytes
            chunk = task.in_chunk
            if task.aborted or self.over:
                if chunk is not None:
                    chunk.release()
                continue
            if chunk is not None and chunk is not held:
                if held is not None:
                    self._send(answers.take(), held)
                held = chunk
            elif chunk is not None:
                chunk.release()  # `held` has a use already
            answers.task(task)
        self._send(answers.take(), held)

    def _settle_immediate(self, tasks: Sequence[Task]) -> None:
        """Immediate commands take no place in the window."""
        for task in tasks:
            if task.tag in self.immediate:
                self.immediate.discard(task.tag)
                self._answers.max_cmd_sn = self._answers.max_cmd_sn - 1 & MASK

    def queue(self, buffers: list[Buffer]) -> None:
        """Send PDUs with what else this chunk of input brings about, or now."""
        self._out += buffers
        if not self.inside:
            self.flush()

    def flush(self) -> None:
        """Send what is queued."""
        if self._out:
            self._send([], None)

    def _send(self, buffers: list[Buffer], chunk: Chunk | None) -> None:
        if self._out:
            buffers = self._out + buffers
            self._out = []
        if buffers or chunk is not None:
            self._stream.send(buffers, chunk)

    # flow

    def _regulate(self) -> None:
        """Read from the initiator only while there is room for what it may ask."""
        if self.over:
            return
        congested = self._device.congested
        if congested and not self._awaits_relief:
            self._awaits_relief = True
            self._device.when_relieved(self._relieved)
        full = congested or self._stream.queued_bytes >= QUEUED_LIMIT_BYTES
        if full != self.paused:
            self.paused = full
            if full:
                self._stream.pause()
            else:
                self._stream.resume()

    def _relieved(self) -> None:
        self._awaits_relief = False
        if not self.over:
            self.settle()
