"""What a starting node learns from its journal: the frames, checked, and the role told of them.

The simulator starts its nodes through here too: what is recovered, and in which order a role hears of it, is one code.
"""

from __future__ import annotations

from blockrepl.errors import DamagedError
from blockrepl.formats.journal import FrameHeader, FrameKind
from blockrepl.formats.record import RecordHead, RecordKind, check_record, control_number, marker_name
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.secondary import Secondary
from blockrepl.storage.journal import Journal


class JournalReading:
    """Collects records and notes while `storage.recovery` walks the ring; `check` is its ``check_body``."""

    def __init__(self) -> None:
        self.heads: list[RecordHead] = []
        self.notes: list[tuple[int, int]] = []  # (number, epoch)
        self.markers: dict[str, tuple[int, int]] = {}  # name → (number of its record, where a takeover would stop)
        self.controls: dict[int, int] = {}  # number of a START or END → the number in it

    def check(self, header: FrameHeader, body: memoryview) -> bool:
        """Whether a frame's body is what was appended."""
        if header.kind == FrameKind.NOTE:
            self.notes.append((header.first, header.body_crc))
        elif header.kind == FrameKind.RECORD:
            try:
                head = check_record(body)
            except DamagedError:
                return False
            self.heads.append(head)
            if head.kind in (RecordKind.START, RecordKind.END):
                self.controls[head.first] = control_number(body)
            elif head.kind == RecordKind.MARKER:
                self.markers[marker_name(body).decode(errors="replace")] = head.first, control_number(body)
        return True

    def tell_intermediate(self, role: Intermediate) -> None:
        """In the order of the journal. All of it is durable by now."""
        for head in self.heads:
            role.recovered(head)
        role.markers.update({name: number for name, (_, number) in self.markers.items() if number <= role.numbered})
        role.start()

    def tell_secondary(self, role: Secondary, journal: Journal) -> list[tuple[RecordHead, int]]:
        """Notes first, then records; the records still to be applied, each with its place in the file."""
        for number, epoch in self.notes:
            role.recovered_note(number, epoch)
        for name, (_, number) in self.markers.items():
            role.hear_marker(name, number)
        frames = [frame for frame in journal.frames() if frame.kind == FrameKind.RECORD]
        return [
            (head, frame.body_offset)
            for head, frame in zip(self.heads, frames, strict=True)
            if role.recovered(head, self.controls.get(head.first, 0)) and head.last > role.state.applied
        ]
