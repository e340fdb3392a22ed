"""What a logical unit keeps for one I_T nexus."""

from __future__ import annotations

from collections import deque

from blockrepl.formats.scsi import Asc
from blockrepl.frontends.iscsi.task import Nexus

MAX_ATTENTIONS = 8


class NexusState:
    """``plain_reads`` and ``plain_writes`` say that READs and WRITEs need no look at anything but their CDB."""

    __slots__ = ("attentions", "nexus", "plain_reads", "plain_writes", "prevents_removal")

    def __init__(self, nexus: Nexus) -> None:
        self.nexus = nexus
        self.attentions: deque[int] = deque()  # additional sense codes of unit attentions
        self.plain_reads = False
        self.plain_writes = False
        self.prevents_removal = False

    def attend(self, asc: int) -> None:
        """Establish a unit attention condition; a reset makes older ones moot (SAM-5, 5.14.4)."""
        if asc == Asc.POWER_ON_OR_RESET:
            self.attentions.clear()
        if asc not in self.attentions and len(self.attentions) < MAX_ATTENTIONS:
            self.attentions.append(asc)
