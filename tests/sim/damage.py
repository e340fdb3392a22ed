"""What becomes of a file in which a bit changed: it is refused, or nothing is lost, or one of two known ambiguities.

A bad slot is taken for a torn one, so the older of two counts; a bad frame that no later one shows to have been durable
is taken for a torn tail (PROTOCOL, rule 9; what was acknowledged of it the peers know, rule 10). Else it is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockrepl.errors import BlockreplError
from blockrepl.formats.slots import SlotKind
from blockrepl.node.journal_reading import JournalReading
from blockrepl.storage.recovery import recover
from blockrepl.storage.slots import Identity, Slots
from tests.sim.disk import SimFile
from tests.sim.world import GROUP, Violation

if TYPE_CHECKING:
    from tests.sim.process import Process

HARMLESS = "nothing is lost"
REFUSED = "refused"
OLDER_SLOT = "taken for a torn slot"
TORN_TAIL = "taken for a torn tail"


def verdict_of(process: Process, name: str, before: SimFile) -> str:
    """One of the four. Raises Violation."""
    file = process.machine.files[name]
    read = _journal if name == "journal" else _state
    whole = read(before, process.node_id)
    try:
        found = read(file, process.node_id)
    except BlockreplError:
        return REFUSED
    if found == whole:
        return HARMLESS
    (payload, frames), (old_payload, old_frames) = found, whole
    older_head = len(frames) > len(old_frames) and frames[len(frames) - len(old_frames) :] == old_frames
    if payload != old_payload or older_head:
        return OLDER_SLOT
    if frames != old_frames[: len(frames)]:
        raise Violation(f"{process.name}: a flipped bit of {name} changed what is recovered")
    cut = old_frames[len(frames)]
    shown = [later for later in old_frames[len(frames) + 1 :] if later[1] > cut[0]]
    if shown:
        raise Violation(
            f"{process.name}: frame {cut} of {name} is damaged and was cut, though {shown[0]} speaks for it"
        )
    return TORN_TAIL


def _state(file: SimFile, node_id: int) -> Any:
    _, payload = Slots.load(file.read(0, 32 << 10), Identity(GROUP, node_id, SlotKind.STATE))
    return payload, []


def _journal(file: SimFile, node_id: int) -> Any:
    frames: list[tuple[int, int, int]] = []  # position, what it shows to be durable, checksum
    reading = JournalReading()

    def check(header: Any, body: memoryview) -> bool:
        good = reading.check(header, body)
        if good:
            frames.append((header.position, header.durable_through, header.body_crc))
        return good

    recovered = recover(file.read, check, Identity(GROUP, node_id, SlotKind.JOURNAL))
    return recovered.state, frames
