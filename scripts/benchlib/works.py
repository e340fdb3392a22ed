"""The works that are measured, and which systems do them.

A work is one fio job file of the same name in ``scripts/fio``; a test keeps the two equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FIO_DIRECTORY = Path(__file__).resolve().parent.parent / "fio"


@dataclass(frozen=True)
class Work:
    """One kind of load. ``rw`` is fio's word; ``fsync`` means a flush after every write."""

    name: str
    rw: str
    block_bytes: int
    depth: int
    fsync: bool = False

    @property
    def writes(self) -> bool:
        return self.rw in ("randwrite", "write")

    @property
    def job_file(self) -> Path:
        return FIO_DIRECTORY / f"{self.name}.fio"


KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

WORKS = {
    work.name: work
    for work in (
        Work("randwrite-4k-qd1", "randwrite", 4 * KIB, 1),
        Work("randwrite-4k-qd32", "randwrite", 4 * KIB, 32),
        Work("randwrite-4k-qd128", "randwrite", 4 * KIB, 128),
        Work("randread-4k-qd32", "randread", 4 * KIB, 32),
        Work("write-1m-qd8", "write", MIB, 8),
        Work("read-1m-qd8", "read", MIB, 8),
        Work("randwrite-4k-qd1-fsync", "randwrite", 4 * KIB, 1, fsync=True),
    )
}

NBD_SYSTEMS = ("blockrepl-nbd", "nbdkit", "qemu-nbd")
REPLICATED_SYSTEMS = ("blockrepl-replicated", "qemu-mirror")
LOOP_SYSTEMS = ("blockrepl-loop", "loop-qemu-fuse", "loop-nbdfuse")
ISCSI_SYSTEMS = ("blockrepl-iscsi", "tgt")
SYSTEMS = (*NBD_SYSTEMS, *REPLICATED_SYSTEMS, *LOOP_SYSTEMS, *ISCSI_SYSTEMS, "disk")

# Who is compared with whom: the first of each family is ours.
FAMILIES = (NBD_SYSTEMS, REPLICATED_SYSTEMS, LOOP_SYSTEMS, ISCSI_SYSTEMS)

# Reading back from the page cache says nothing about a disk.
_DISK_WORKS = frozenset({"randwrite-4k-qd1", "randwrite-4k-qd32", "write-1m-qd8", "randwrite-4k-qd1-fsync"})

# --quick measures only what the table of aims needs: (works, systems that do them).
_QUICK = (
    (
        "randwrite-4k-qd32",
        (*NBD_SYSTEMS, *REPLICATED_SYSTEMS, "blockrepl-loop", "loop-qemu-fuse", *ISCSI_SYSTEMS, "disk"),
    ),
    ("randread-4k-qd32", (*NBD_SYSTEMS, *ISCSI_SYSTEMS)),
    (
        "write-1m-qd8",
        ("blockrepl-nbd", "nbdkit", *REPLICATED_SYSTEMS, "blockrepl-loop", "loop-qemu-fuse", *ISCSI_SYSTEMS, "disk"),
    ),
    ("read-1m-qd8", ("blockrepl-nbd", "nbdkit", *ISCSI_SYSTEMS)),
    ("randwrite-4k-qd1", ("blockrepl-replicated", *ISCSI_SYSTEMS, "disk")),
)
QUICK_CELLS = frozenset((work, system) for work, systems in _QUICK for system in systems)


def cells(works: list[str], systems: list[str], *, quick: bool) -> list[tuple[str, str]]:
    """The (work, system) pairs to measure, in the order of ``works`` and ``systems``."""
    pairs = [(work, system) for work in works for system in systems]
    pairs = [(work, system) for work, system in pairs if system != "disk" or work in _DISK_WORKS]
    return [pair for pair in pairs if pair in QUICK_CELLS] if quick else pairs
