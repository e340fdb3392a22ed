"""What hosts may find in a P-VOL: per block, what was completed last, or anything submitted after that.

Writes to one volume win in the order in which they were submitted (PROTOCOL, rule 3), whether the group numbered them
or the primary took them alone.
"""

from __future__ import annotations

from blockrepl.block import Op
from tests.sim.write import Write

BLOCK = 512


class HostTruth:
    """One volume."""

    def __init__(self, size_bytes: int, content: bytes = b"") -> None:
        """``content``: what is there at the beginning; zeroes by default."""
        content = content or bytes(size_bytes)
        self._blocks: list[list[tuple[int, bytes]]] = [
            [(0, content[at : at + BLOCK])] for at in range(0, size_bytes, BLOCK)
        ]
        self._count = 0
        self._volatile: dict[int, list[tuple[int, bytes]]] = {}  # what unsynced writes taken alone have replaced
        self._serials: dict[int, int] = {}  # id(write) → its place in the order

    def submitted(self, write: Write) -> None:
        """From now on its blocks may be there."""
        self._count += 1
        self._serials[id(write)] = self._count
        for block, content in _blocks(write):
            self._blocks[block].append((self._count, content))

    def completed(self, write: Write, *, alone: bool = False) -> None:
        """From now on nothing older than it may be there; of what completed alone, until the power goes."""
        serial = self._serials.pop(id(write))
        for block, _ in _blocks(write):
            entries = self._blocks[block]
            # A write that overlaps itself: its last content counts.
            own = [each for each in entries if each[0] == serial][-1:]
            if alone:  # a batch may be torn between its writes, too
                self._volatile.setdefault(block, []).extend(each for each in entries if each[0] <= serial)
            entries[:] = own + [each for each in entries if each[0] > serial]

    def power_lost(self) -> None:
        """No journal has what was completed alone and not flushed: what it replaced may be there again."""
        for block, entries in self._volatile.items():
            self._blocks[block][:0] = entries
        self._volatile.clear()

    def wrong(self, found: bytes | bytearray) -> int:
        """The first block that is none of these; -1 when there is none."""
        for block, entries in enumerate(self._blocks):
            content = found[block * BLOCK : (block + 1) * BLOCK]
            if all(content != each for _, each in entries):
                return block
        return -1


def _blocks(write: Write) -> list[tuple[int, bytes]]:
    found = []
    for op, offset, length, payload in zip(write.ops, write.offsets, write.lengths, write.payloads, strict=True):
        for at in range(0, length, BLOCK):
            content = payload[at : at + BLOCK] if op == Op.WRITE else bytes(BLOCK)
            found.append(((offset + at) // BLOCK, content))
    return found
