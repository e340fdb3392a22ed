"""What suspension and resync must keep: bits before writes, nothing numbered that depends on a write taken alone.

That a bitmap says enough (invariant 7) is looked at in `superset.py`; and after a resync the volumes are equal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.bitmap import Bitmap
from blockrepl.formats.record import RecordFlag, RecordHead, RecordKind
from tests.sim.bits import BITMAP_BLOCK
from tests.sim.truth import HostTruth
from tests.sim.world import Violation
from tests.sim.write import Write

if TYPE_CHECKING:
    from tests.sim.process import Layout, Process


class PairTruth:
    """Of one group."""

    def __init__(self, layout: Layout) -> None:
        self.volumes = {volume: HostTruth(size) for volume, (_, _, size) in layout.volumes.items()}
        self.alone = 0  # writes completed alone that no resync has taken up
        self._generation = 1  # one more at every START and END
        self.alone_ever: set[str] = set()  # primaries that ever stored one, told or not yet
        self.copying = False  # between a START and its ENDs
        self._windows: list[list[int]] = []  # [START, END] of every resync, by number
        self.resyncs = 0  # that came to their END

    def submitted(self, write: Write) -> None:
        """A host's write is about to be taken."""
        write.alone = self._generation if self.alone else 0
        self.volumes[write.volume].submitted(write)

    def completed(self, process: Process, write: Write) -> bool:
        """A host was told; whether the primary took the write alone. Raises Violation."""
        self.volumes[write.volume].completed(write, alone=write.solo)
        if not write.solo:
            return False
        self.alone += 1
        return True

    def storing_alone(self, process: Process, batch: Any, volume: int) -> None:
        """A primary is about to store a host's batch alone: its bits must be on the platter (rule 17)."""
        self.alone_ever.add(process.name)
        size = process.layout.volumes[volume][2]
        durable = Bitmap(size, BITMAP_BLOCK, bytes(process.machine.files[f"bits {volume}"].platter))
        for offset, length in zip(batch.offsets, batch.lengths, strict=True):
            if durable.mark(offset, length):
                raise Violation(
                    f"17: {process.name} stores [{offset}, +{length}) of volume {volume}, no bit is durable"
                )

    def numbered(self, head: RecordHead, write: Write | None) -> None:
        """A record was given its numbers. Raises Violation."""
        if head.kind == RecordKind.START:
            if not self.copying:
                self._windows.append([head.first, 1 << 62])
            self.copying, self.alone = True, 0
            self._generation += 1
        elif head.kind == RecordKind.END:
            self.resyncs += self.copying
            self._windows[-1][1] = head.last
            self.copying, self.alone = False, 0
            self._generation += 1
        elif (
            write is not None
            and not self.copying
            and write.alone == self._generation
            and not head.flags & RecordFlag.COPY
        ):
            raise Violation(f"16: {head.first} was numbered, and depends on a write that a primary took alone")

    def consistent_at(self, number: int) -> bool:
        """Whether the secondaries are at a prefix of their own at a number."""
        return not any(start <= number < end for start, end in self._windows)

    def check_volume(self, process: Process, volume: int) -> None:
        """Raises Violation when a P-VOL holds what no host may find."""
        block = self.volumes[volume].wrong(process.machine.files[f"volume {volume}"].cache)
        if block >= 0:
            raise Violation(f"{process.name}: block {block} of P-VOL {volume} is nothing that a host may find there")
