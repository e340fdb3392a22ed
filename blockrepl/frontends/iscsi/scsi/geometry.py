"""Where and how much: the addresses that the CDBs of block commands carry, and what Data-Out they need."""

from __future__ import annotations

from collections.abc import Callable

from blockrepl.formats.scsi import CDB_10, CDB_12, CDB_16, Asc, Opcode
from blockrepl.frontends.iscsi.scsi.refusal import illegal

_READ_6_ALL = 256


def address(cdb: bytes) -> tuple[int, int]:
    """(LBA, number of blocks) of a block command."""
    opcode = cdb[0]
    if opcode < 0x20:
        return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or _READ_6_ALL
    if opcode < 0x60:
        _, _, lba, _, blocks, _ = CDB_10.unpack_from(cdb)
        return lba, blocks
    if opcode == Opcode.COMPARE_AND_WRITE:
        return int.from_bytes(cdb[2:10], "big"), cdb[13]
    if opcode == Opcode.WRITE_ATOMIC_16:
        return int.from_bytes(cdb[2:10], "big"), int.from_bytes(cdb[12:14], "big")
    if opcode < 0xA0:
        _, _, lba, blocks, _, _ = CDB_16.unpack_from(cdb)
        return lba, blocks
    _, _, lba, blocks, _, _ = CDB_12.unpack_from(cdb)
    return lba, blocks


def check_range(lba: int, count: int, blocks: int) -> None:
    """Raises Refusal: LBA OUT OF RANGE."""
    if lba + count > blocks or lba > blocks:
        raise illegal(Asc.LBA_OUT_OF_RANGE)


def _blocks(cdb: bytes, block_bytes: int) -> int:
    return address(cdb)[1] * block_bytes


def _twice(cdb: bytes, block_bytes: int) -> int:
    return 2 * cdb[13] * block_bytes


def _verify(cdb: bytes, block_bytes: int) -> int:
    """BYTCHK says whether there is data: all of it, or one block for all."""
    check = cdb[1] >> 1 & 3
    blocks = address(cdb)[1]
    return {0: 0, 1: blocks * block_bytes, 3: block_bytes if blocks else 0}.get(check, 0)


def _write_same(cdb: bytes, block_bytes: int) -> int:
    return 0 if cdb[0] == Opcode.WRITE_SAME_16 and cdb[1] & 0x01 else block_bytes  # NDOB


def _list_4(cdb: bytes, _: int) -> int:
    return cdb[4]


def _list_7(cdb: bytes, _: int) -> int:
    return int.from_bytes(cdb[7:9], "big")


def _list_5(cdb: bytes, _: int) -> int:
    return int.from_bytes(cdb[5:9], "big")


def _list_10(cdb: bytes, _: int) -> int:
    return int.from_bytes(cdb[10:14], "big")


DATA_OUT: dict[int, Callable[[bytes, int], int]] = {
    Opcode.WRITE_6: _blocks,
    Opcode.WRITE_10: _blocks,
    Opcode.WRITE_12: _blocks,
    Opcode.WRITE_16: _blocks,
    Opcode.WRITE_AND_VERIFY_10: _blocks,
    Opcode.WRITE_AND_VERIFY_12: _blocks,
    Opcode.WRITE_AND_VERIFY_16: _blocks,
    Opcode.WRITE_ATOMIC_16: _blocks,
    Opcode.ORWRITE_16: _blocks,
    Opcode.COMPARE_AND_WRITE: _twice,
    Opcode.VERIFY_10: _verify,
    Opcode.VERIFY_12: _verify,
    Opcode.VERIFY_16: _verify,
    Opcode.WRITE_SAME_10: _write_same,
    Opcode.WRITE_SAME_16: _write_same,
    Opcode.MODE_SELECT_6: _list_4,
    Opcode.MODE_SELECT_10: _list_7,
    Opcode.UNMAP: _list_7,
    Opcode.SANITIZE: _list_7,
    Opcode.PERSISTENT_RESERVE_OUT: _list_5,
    Opcode.EXTENDED_COPY: _list_10,
}
"""Operation code → Data-Out that the CDB asks for, in bytes; the others take none."""


def data_out_bytes(cdb: bytes, block_bytes: int) -> int:
    """How much Data-Out a command takes, by its CDB."""
    count = DATA_OUT.get(cdb[0])
    return count(cdb, block_bytes) if count is not None else 0
