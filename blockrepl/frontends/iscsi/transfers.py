"""Data-Out of commands that did not bring all of it along: unsolicited data, then R2T by R2T.

Source: RFC 7143, 4.2.5.2 (what may come unasked), 11.7 and 11.8 (Data-Out, R2T), 11.4.7.2 (sense of faults). We agree
on DataPDUInOrder and DataSequenceInOrder, so data may come in one way only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk
from blockrepl.formats.iscsi import NO_TAG
from blockrepl.frontends.iscsi.answers import Answers
from blockrepl.frontends.iscsi.negotiate import Parameters
from blockrepl.frontends.iscsi.task import Task

MAX_SOLICITED_BYTES = 16 << 20  # that one session may be asked for at a time
MAX_ENDED = 1024  # tags of commands whose late Data-Out is let pass
CHECK_CONDITION = 2


def sense(code: int, qualifier: int) -> bytes:
    """Fixed format sense data, ABORTED COMMAND (SPC-4, 4.5.3)."""
    return bytes([0x70, 0, 0x0B, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0])


UNEXPECTED_DATA = sense(0x0C, 0x0C)
WRONG_AMOUNT = sense(0x0C, 0x0D)
DIGEST_WRONG = sense(0x47, 0x05)


class Burst:
    """A run of Data-Out PDUs: one R2T's, or the unsolicited one (target tag NO_TAG)."""

    __slots__ = ("data_sn", "end", "target_tag")

    def __init__(self, target_tag: int, end: int) -> None:
        self.target_tag = target_tag
        self.end = end
        self.data_sn = 0


class Transfer:
    """One command that waits for data. ``at`` bytes are here, ``asked`` bytes were solicited or may come unasked.

    Invariant: at <= asked <= the end of the last burst; bursts are served in order.
    """

    __slots__ = ("admitted", "asked", "at", "bursts", "needed", "r2t_sn", "task")

    def __init__(self, task: Task, needed_bytes: int) -> None:
        self.task = task
        self.needed = needed_bytes
        self.at = 0
        self.asked = 0
        self.bursts: deque[Burst] = deque()
        self.r2t_sn = 0
        self.admitted = False

    def keep(self, chunk: Chunk, view: memoryview) -> None:
        """Data that came in order. What exceeds the need of the command is dropped."""
        wanted = view[: max(0, self.needed - self.at)]
        if wanted:
            chunk.hold()
            self.task.chunks.append(chunk)
            self.task.data_out.append(wanted)
        self.at += len(view)


class Transfers:
    """All of a session. ``complete`` gets a task when its data is there, ``refuse`` one that went wrong, with sense;
    ``send`` the PDUs that ask for more."""

    def __init__(
        self,
        parameters: Parameters,
        answers: Answers,
        complete: Callable[[Task], None],
        refuse: Callable[[Task, bytes], None],
        send: Callable[[list[Buffer]], None],
    ) -> None:
        self._parameters = parameters
        self._answers = answers
        self._complete = complete
        self._refuse = refuse
        self._send = send
        self._open: dict[int, Transfer] = {}
        self._waiting: deque[Transfer] = deque()  # not admitted: their need does not fit yet
        self._solicited_bytes = 0
        self._ended: dict[int, None] = {}
        self._target_tag = 0

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, tag: int) -> bool:
        return tag in self._open

    def tasks(self) -> Iterator[Task]:
        """Those that wait."""
        return (transfer.task for transfer in self._open.values())

    # commands

    def begin(self, task: Task, needed_bytes: int, chunk: Chunk, immediate: memoryview, *, final: bool) -> None:
        """A command with data to come. ``final`` False: more comes unasked."""
        self._ended.pop(task.tag, None)
        first_burst = min(self._parameters.first_burst_bytes, task.expected_out_bytes)
        if len(immediate) > first_burst or (not final and self._parameters.initial_r2t):
            self._end_tag(task.tag)
            self._refuse(task, UNEXPECTED_DATA)
            return
        transfer = Transfer(task, needed_bytes)
        if immediate:
            transfer.keep(chunk, immediate)
        transfer.asked = transfer.at
        more = not final and transfer.at < first_burst
        if transfer.at >= needed_bytes:
            if more:
                self._end_tag(task.tag)
            self._complete(task)
            return
        self._open[task.tag] = transfer
        if more:
            transfer.asked = first_burst
            transfer.bursts.append(Burst(NO_TAG, first_burst))
        else:
            self._proceed(transfer)

    def data(
        self, tag: int, target_tag: int, data_sn: int, offset_bytes: int, final: bool, chunk: Chunk, view: memoryview,
        *, intact: bool,
    ) -> bool:  # fmt: skip
        """One Data-Out. False: it belongs to nothing that is or lately was here."""
        transfer = self._open.get(tag)
        if transfer is None:
            return tag in self._ended
        burst = transfer.bursts[0] if transfer.bursts else None
        if burst is None or burst.target_tag != target_tag:
            if target_tag != NO_TAG:
                return False
            self._fail(transfer, UNEXPECTED_DATA)
        elif not intact:
            self._fail(transfer, DIGEST_WRONG)
        elif data_sn != burst.data_sn or offset_bytes != transfer.at or transfer.at + len(view) > burst.end:
            self._fail(transfer, WRONG_AMOUNT)
        else:
            burst.data_sn += 1
            transfer.keep(chunk, view)
            if final or transfer.at == burst.end:
                if target_tag != NO_TAG and transfer.at != burst.end:
                    self._fail(transfer, WRONG_AMOUNT)
                else:
                    transfer.bursts.popleft()
                    if target_tag == NO_TAG:
                        transfer.asked = transfer.at
                    self._proceed(transfer)
        return True

    def _proceed(self, transfer: Transfer) -> None:
        if transfer.at >= transfer.needed:
            self._close(transfer)
            self._complete(transfer.task)
            self._admit()
        elif transfer.admitted:
            self._ask(transfer)
        else:
            self._waiting.append(transfer)
            self._admit()

    def _admit(self) -> None:
        """Let those ask whose whole need fits; a single one always does."""
        while self._waiting:
            first = self._waiting[0]
            if self._solicited_bytes and self._solicited_bytes + first.needed > MAX_SOLICITED_BYTES:
                return
            self._waiting.popleft()
            first.admitted = True
            self._solicited_bytes += first.needed
            self._ask(first)

    def _ask(self, transfer: Transfer) -> None:
        most = self._parameters.max_outstanding_r2t
        while len(transfer.bursts) < most and transfer.asked < transfer.needed:
            size = min(self._parameters.max_burst_bytes, transfer.needed - transfer.asked)
            self._target_tag = (self._target_tag + 1) % NO_TAG
            burst = Burst(self._target_tag, transfer.asked + size)
            transfer.bursts.append(burst)
            task = transfer.task
            self._send(
                self._answers.r2t(task.lun, task.tag, burst.target_tag, transfer.r2t_sn, transfer.asked, size)
            )  # fmt: skip
            transfer.r2t_sn += 1
            transfer.asked += size

    # ends

    def _fail(self, transfer: Transfer, reason: bytes) -> None:
        self._close(transfer)
        self._end_tag(transfer.task.tag)
        transfer.task.release_out()
        self._refuse(transfer.task, reason)
        self._admit()

    def _close(self, transfer: Transfer) -> None:
        del self._open[transfer.task.tag]
        if transfer.admitted:
            self._solicited_bytes -= transfer.needed
        elif transfer in self._waiting:
            self._waiting.remove(transfer)

    def _end_tag(self, tag: int) -> None:
        """Data of this tag may still be on its way."""
        self._ended[tag] = None
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def begins(self, tag: int) -> None:
        """A command with this tag came: what is late of an older one cannot come any more."""
        if self._ended:
            self._ended.pop(tag, None)

    def ignore(self, tag: int) -> None:
        """Data of this command may come, and is of no use: it was completed without."""
        self._end_tag(tag)

    def drop(self, wanted: Callable[[Task], bool]) -> list[Task]:
        """Forget tasks (task management); they are given back, their data released."""
        dropped = [transfer for transfer in self._open.values() if wanted(transfer.task)]
        for transfer in dropped:
            self._close(transfer)
            self._end_tag(transfer.task.tag)
            transfer.task.release_out()
        if dropped:
            self._admit()
        return [transfer.task for transfer in dropped]
