"""State that is written twice, so that one copy is always whole. Pure: emits writes, is told when they are durable."""

from __future__ import annotations

from typing import NamedTuple

from crc32c import crc32c

from blockrepl.errors import DamagedError, IdentityError, MissingError
from blockrepl.formats.slots import (
    SLOT_BYTES,
    SLOT_HEADER_BYTES,
    SLOT_MAGIC,
    SLOT_PAYLOAD_BYTES,
    SLOT_VERSION,
    SLOTS_BYTES,
    SlotKind,
    slot_header,
)

SECTOR_BYTES = 4096  # slot writes are whole sectors of the largest usual size


class Identity(NamedTuple):
    """Whose the slots are."""

    group: bytes  # UUID, 16 bytes
    node_id: int
    kind: SlotKind

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} of node {self.node_id} of group {self.group.hex()}"


class Slots:
    """Two slots, written in turn with a rising generation.

    Invariant: the slot of `generation` is durable, and only the other one is ever being written. Therefore at most
    one write is in the air: `encode` asserts it, `stored` ends it. After a failed write there is no way on but a new
    start, which writes the newest slot again (`again`) and syncs it before anything else: what kill -9 or a failed
    sync left behind may be in the page cache only.
    """

    def __init__(self, identity: Identity, generation: int = 0) -> None:
        assert len(identity.group) == 16
        self.identity = identity
        self.generation = generation
        self.in_flight = False

    def encode(self, payload: bytes) -> tuple[int, bytes]:
        """The next write as (offset, bytes). Call `stored` when it is durable."""
        assert not self.in_flight, "both slots would be open at once"
        assert len(payload) <= SLOT_PAYLOAD_BYTES, f"state of {len(payload)} bytes"
        self.in_flight = True
        return self._image(self.generation + 1, payload)

    def stored(self) -> None:
        """What the last `encode` returned is durable."""
        assert self.in_flight
        self.in_flight = False
        self.generation += 1

    def again(self, payload: bytes) -> tuple[int, bytes]:
        """The write that repeats the slot just loaded, same place and bytes."""
        assert self.generation
        assert not self.in_flight
        return self._image(self.generation, payload)

    def _image(self, generation: int, payload: bytes) -> tuple[int, bytes]:
        group, node_id, kind = self.identity
        header = {
            "magic": SLOT_MAGIC,
            "version": SLOT_VERSION,
            "kind": kind,
            "generation": generation,
            "group": group,
            "node": node_id,
            "reserved": 0,
            "payload_bytes": len(payload),
            "crc": 0,
        }
        unsigned = bytes(slot_header.build(header))[:-4]
        raw = unsigned + crc32c(payload, crc32c(unsigned)).to_bytes(4, "big") + payload
        return generation % 2 * SLOT_BYTES, raw + bytes(-len(raw) % SECTOR_BYTES)

    @classmethod
    def load(cls, raw: bytes, identity: Identity) -> tuple[Slots, bytes]:
        """Pick the newest valid slot of the 32 KiB ``raw``; return the state and its payload.

        Raises MissingError (never written), DamagedError (no slot is whole), IdentityError (somebody else's, or of
        another version).
        """
        found = [each for each in (_parse(raw, index) for index in (0, 1)) if each is not None]
        if not found:
            if not any(raw):
                raise MissingError(f"{identity}: never written", hint="`blockrepl create` makes it")
            raise DamagedError(
                f"{identity}: neither copy of its header is whole",
                hint="keep a copy of the file; restore it from a backup",
            )
        generation, version, owner, payload = max(found, key=lambda each: each[0])
        if version != SLOT_VERSION:
            raise IdentityError(f"{identity}: has format version {version}, this program knows {SLOT_VERSION}")
        if owner != tuple(identity):
            raise IdentityError(
                f"expected the {identity}, found kind {owner[2]} of node {owner[1]} of group {owner[0].hex()}",
                hint="compare the directory in the definition with where the disk is mounted",
            )
        return cls(identity, generation), payload


def _parse(raw: bytes, index: int) -> tuple[int, int, tuple[bytes, int, int], bytes] | None:
    """(generation, version, owner, payload) of slot ``index``, or None when it is not whole."""
    assert len(raw) == SLOTS_BYTES
    slot = raw[index * SLOT_BYTES : (index + 1) * SLOT_BYTES]
    header = slot_header.parse(slot)
    if header.magic != SLOT_MAGIC or header.payload_bytes > SLOT_PAYLOAD_BYTES:
        return None
    payload = slot[SLOT_HEADER_BYTES : SLOT_HEADER_BYTES + header.payload_bytes]
    if header.crc != crc32c(payload, crc32c(slot[: SLOT_HEADER_BYTES - 4])) or header.generation % 2 != index:
        return None
    return header.generation, header.version, (header.group, header.node, header.kind), payload
