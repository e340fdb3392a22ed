"""The SCSI device server of the fuzzer: some logical units over volumes in memory; its time passes in `complete`."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from random import Random

from blockrepl.chunks import ChunkPool
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.target import Target
from tests.iscsi.memory_volume import MemoryVolume

LUNS = (0, 1, 2, 51)
SIZE_BYTES, BLOCK_BYTES = 4 << 20, 512


class Device:
    def __init__(self, random: Random, pool: ChunkPool) -> None:
        self._later: list[Callable[[], None]] = []
        self.server = Target(pool, self._call_later, 1)
        self.volumes: dict[int, MemoryVolume] = {}
        for lun in LUNS:
            volume = MemoryVolume(f"v{lun}", SIZE_BYTES, BLOCK_BYTES, random)
            identity = UnitIdentity(uuid.UUID(int=5), lun, volume.name, SIZE_BYTES, BLOCK_BYTES)
            self.server.add(lun, identity, {}).serve(volume)
            self.volumes[lun] = volume

    def complete(self) -> bool:
        """Let happen what waits for the disk or for time; False when there was nothing."""
        due, self._later = self._later, []
        for each in due:
            each()
        completed = [volume.complete() for volume in self.volumes.values()]
        return bool(due) or any(completed)

    def _call_later(self, _delay_s: float, action: Callable[[], None]) -> None:
        self._later.append(action)
