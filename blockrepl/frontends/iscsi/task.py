"""What crosses between the iSCSI session and the SCSI device server: a nexus, a task, and who executes tasks.

A session hands over whole commands (their Data-Out has arrived) in the order of CmdSN, all that one chunk of input
brought at once. The device server completes them in any order, as many at a time as it can: cost is per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from blockrepl.block import Buffer
from blockrepl.chunks import Chunk


class Attribute(IntEnum):
    """Task attributes (RFC 7143, 11.3.1)."""

    UNTAGGED = 0
    SIMPLE = 1
    ORDERED = 2
    HEAD_OF_QUEUE = 3
    ACA = 4


class TaskFunction(IntEnum):
    """Task management functions (RFC 7143, 11.5.1) that reach the device server."""

    ABORT_TASK = 1
    ABORT_TASK_SET = 2
    CLEAR_ACA = 3
    CLEAR_TASK_SET = 4
    LOGICAL_UNIT_RESET = 5
    TARGET_WARM_RESET = 6
    TARGET_COLD_RESET = 7


class TaskResponse(IntEnum):
    """What became of a task management function (RFC 7143, 11.6.1)."""

    COMPLETE = 0
    NO_TASK = 1
    NO_LUN = 2
    STILL_ALLEGIANT = 3
    NO_REASSIGN = 4
    NOT_SUPPORTED = 5
    NOT_AUTHORIZED = 6
    REJECTED = 255


class Nexus:
    """One I_T nexus: a session between an initiator port (name and ISID) and a portal group of a target.

    Compared by identity: a session that replaces another begins a nexus of its own. Reservations outlive it by
    ``transport_id``.
    """

    __slots__ = ("initiator_name", "isid", "portal_group", "target_name", "transport_id")

    def __init__(self, initiator_name: str, isid: bytes, target_name: str, portal_group: int) -> None:
        assert len(isid) == 6
        self.initiator_name = initiator_name
        self.isid = isid
        self.target_name = target_name
        self.portal_group = portal_group  # its tag, which is the relative target port identifier too
        self.transport_id = transport_id(initiator_name, isid)

    def __repr__(self) -> str:
        return f"Nexus({self.initiator_name!r}, {self.isid.hex()}, {self.target_name!r}, {self.portal_group})"


def transport_id(initiator_name: str, isid: bytes | None = None) -> bytes:
    """A TransportID of an initiator port, or device when there is no ISID (SPC-4, 7.6.4.6)."""
    name = initiator_name.encode() + (b",i,0x" + isid.hex().encode() if isid is not None else b"")
    name += b"\0" * (4 - len(name) % 4)
    name = name.ljust(20, b"\0")
    return bytes([0x45 if isid is not None else 0x05, 0]) + len(name).to_bytes(2, "big") + name


class Task:
    """One SCSI command whose Data-Out has arrived.

    The device server sets ``status``, ``sense``, ``data_in`` with ``in_chunk``, and ``needed_out_bytes`` where the
    command wanted more or less than was expected; the session makes residuals of these. Then it passes the task to
    ``done``, once, on the loop.
    """

    __slots__ = (
        "aborted", "attribute", "cdb", "chunks", "data_in", "data_out", "done", "expected_in_bytes",
        "expected_out_bytes", "in_chunk", "lun", "needed_out_bytes", "nexus", "sense", "status", "tag",
    )  # fmt: skip

    def __init__(
        self,
        nexus: Nexus,
        lun: int,
        cdb: bytes,
        attribute: int,
        tag: int,
        expected_in_bytes: int,
        expected_out_bytes: int,
        done: Callable[[Sequence[Task]], None],
    ) -> None:
        self.nexus = nexus
        self.lun = lun  # -1 for an address that no logical unit can have
        self.cdb = cdb  # 16 bytes at least, 260 at most
        self.attribute = attribute
        self.tag = tag  # initiator task tag
        self.expected_in_bytes = expected_in_bytes
        self.expected_out_bytes = expected_out_bytes
        self.done = done  # tasks of one session, one or many at a time
        # In order; together at most expected_out_bytes, and more than the command needs if more was expected.
        self.data_out: list[memoryview] = []
        self.chunks: list[Chunk] = []  # one use each, held for data_out; `release_out` gives them back
        self.needed_out_bytes = expected_out_bytes
        self.status = 0
        self.sense = b""  # sense data without its length
        self.data_in: Sequence[Buffer] = ()
        self.in_chunk: Chunk | None = None  # one use, held for data_in: passes to the session
        self.aborted = False  # ended by task management without a status: the initiator hears nothing

    @property
    def out_bytes(self) -> int:
        """How much Data-Out there is."""
        return sum(map(len, self.data_out))

    def release_out(self) -> None:
        """The Data-Out is no longer needed. Whoever completes the task calls this before ``done``."""
        for chunk in self.chunks:
            chunk.release()
        self.chunks = []
        self.data_out = []


class EventKind(IntEnum):
    """What a device server tells sessions unasked."""

    TASKS_CLEARED = 1  # tasks of the LUN (None: all) that still wait for their Data-Out are to be forgotten
    UNIT_ATTENTION = 2  # a unit attention waits: an async message may say so; ``sense`` is its sense data


class Event:
    """One event at a logical unit; ``lun`` None is every logical unit."""

    __slots__ = ("kind", "lun", "sense")

    def __init__(self, kind: EventKind, lun: int | None, sense: bytes = b"") -> None:
        self.kind = kind
        self.lun = lun
        self.sense = sense


class DeviceServer(Protocol):
    """The SCSI target device behind the sessions (SAM-5). All methods are called on the loop."""

    on_event: Callable[[Sequence[Nexus], Event], None]  # set by the server that owns the sessions

    def execute(self, tasks: Sequence[Task]) -> None:
        """Take tasks of one nexus, in order. Never raises for what came from the wire: that ends in a status.

        ``done`` may be called from inside.
        """

    def data_out_bytes(self, lun: int, cdb: bytes) -> int:
        """How much Data-Out a command needs, by its CDB; 0 if none, or if it is going to be refused."""

    def abort(
        self, nexus: Nexus, function: int, lun: int, tag: int | None, done: Callable[[TaskResponse], None]
    ) -> None:
        """A task management function. Tasks it ends are completed with ``aborted`` set, or with TASK ABORTED where
        the control mode page says so and the nexus is another; ``done`` follows when all have ended."""

    def nexus_begun(self, nexus: Nexus) -> None:
        """A session has logged in."""

    def nexus_lost(self, nexus: Nexus) -> None:
        """Its session is over: its tasks are aborted as above, its reservations of RESERVE(6) are released."""

    @property
    def congested(self) -> bool:
        """True while the queue behind some volume is full: sessions stop reading."""

    def when_relieved(self, resume: Callable[[], None]) -> None:
        """Call ``resume`` once when `congested` has become False."""
