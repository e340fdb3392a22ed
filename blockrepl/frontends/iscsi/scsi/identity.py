"""Who a logical unit is: names that are the same on every node that ever publishes the volume."""

from __future__ import annotations

import uuid

from blockrepl.formats.scsi_inquiry import NAA_LOCALLY_ASSIGNED


class UnitIdentity:
    """Derived from the group's and the volume's identity, so that paths through either site are seen as one disk."""

    __slots__ = ("block_bytes", "naa", "name", "physical_bytes", "product", "serial", "size_bytes")

    def __init__(
        self, group: uuid.UUID, volume_id: int, name: str, size_bytes: int, block_bytes: int,
        physical_bytes: int = 0,
    ) -> None:  # fmt: skip
        unique = uuid.uuid5(group, f"volume {volume_id}")
        self.name = name
        self.product = name.encode("ascii", "replace")[:16].ljust(16)
        self.serial = unique.hex.encode()
        self.naa = (NAA_LOCALLY_ASSIGNED << 60 | unique.int >> 68).to_bytes(8, "big")
        self.size_bytes = size_bytes
        self.block_bytes = block_bytes
        self.physical_bytes = max(physical_bytes, block_bytes)
