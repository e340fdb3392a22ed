"""Why a command is refused: status and sense data, and what a volume's errors become."""

from __future__ import annotations

import errno

from blockrepl.errors import BlockError
from blockrepl.formats.scsi import Asc, SenseKey, Status, field_pointer


class Refusal(Exception):  # noqa: N818 - an answer, no error
    """A command ends with this status; CHECK CONDITION carries sense data."""

    def __init__(
        self,
        key: int,
        asc: int,
        *,
        status: int = Status.CHECK_CONDITION,
        information: int | None = None,
        specific: bytes = b"",
    ) -> None:
        super().__init__(f"status {status:#04x}, sense {key:#x}, {asc >> 8:02x}h/{asc & 0xFF:02x}h")
        self.status = status
        self.key = key
        self.asc = asc
        self.information = information
        self.specific = specific


def illegal(asc: int, specific: bytes = b"") -> Refusal:
    """ILLEGAL REQUEST."""
    return Refusal(SenseKey.ILLEGAL_REQUEST, asc, specific=specific)


def bad_cdb(byte: int, bit: int | None = None) -> Refusal:
    """INVALID FIELD IN CDB, pointing at ``byte`` (and its ``bit``)."""
    return illegal(Asc.INVALID_FIELD_IN_CDB, field_pointer(byte, bit, in_cdb=True))


def bad_parameter(byte: int, bit: int | None = None) -> Refusal:
    """INVALID FIELD IN PARAMETER LIST."""
    return illegal(Asc.INVALID_FIELD_IN_PARAMETER_LIST, field_pointer(byte, bit, in_cdb=False))


def conflict() -> Refusal:
    """RESERVATION CONFLICT has no sense data."""
    return Refusal(SenseKey.NO_SENSE, Asc.NONE, status=Status.RESERVATION_CONFLICT)


def not_ready(asc: int, specific: bytes = b"") -> Refusal:
    """NOT READY."""
    return Refusal(SenseKey.NOT_READY, asc, specific=specific)


_WRITE_ERRORS: dict[int, tuple[int, int]] = {
    errno.ENOSPC: (SenseKey.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED),
    errno.EDQUOT: (SenseKey.DATA_PROTECT, Asc.SPACE_ALLOCATION_FAILED),
    errno.EROFS: (SenseKey.DATA_PROTECT, Asc.WRITE_PROTECTED),
    errno.EPERM: (SenseKey.DATA_PROTECT, Asc.WRITE_PROTECTED),
}


def write_refusal(error: BlockError) -> Refusal:
    """A write, or a flush, that failed. What only the fence holds back is no fault of the medium, but SPC has no code
    for it: WRITE ERROR makes every initiator try another path or report an I/O error, as they should."""
    key, asc = _WRITE_ERRORS.get(error.errno_code, (SenseKey.MEDIUM_ERROR, Asc.WRITE_ERROR))
    return Refusal(key, asc)


def read_refusal(error: BlockError) -> Refusal:
    """A read that failed."""
    return Refusal(SenseKey.MEDIUM_ERROR, Asc.UNRECOVERED_READ_ERROR)
