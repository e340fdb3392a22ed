"""What each role keeps durably beside its records: the blob in the journal's superblock, or a primary's state file.

Source: PROTOCOL rules 1, 9, 22. Big-endian; numbers are sequence numbers. All watermarks are durable ones: what was
numbered but never synced is not in here, because it may be numbered again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from construct import Const, Construct, Flag, Int8ub, Int16ub, Int32ub, Int64ub, PrefixedArray, Struct
from construct.core import ConstructError

from blockrepl.errors import DamagedError
from blockrepl.formats.link import NO_EPOCH, Epoch, Pair, epoch_id

STATE_VERSION = 2
REFORMS_MAX = 16  # promised ones that are remembered
HISTORY_MAX = 64  # openings remembered; older ones explain nothing any more

_history = PrefixedArray(Int16ub, Struct("epoch" / epoch_id, "last" / Int64ub))
_primary = Struct(
    "version" / Const(STATE_VERSION, Int8ub),
    "epoch" / epoch_id,
    "promised" / epoch_id,
    "incarnation" / Int32ub,
    "checkpoint" / Int64ub,
    "direction" / Int8ub,
    "suspended" / Int8ub,
    "alone" / Flag,
    "detached" / Flag,
    "trusted" / Flag,
    "clean" / Flag,
    "resync" / Int64ub,
    "cursor_volume" / Int16ub,
    "cursor_block" / Int64ub,
)
_intermediate = Struct(
    "version" / Const(STATE_VERSION, Int8ub),
    "epoch" / epoch_id,
    "promised" / epoch_id,
    "history" / _history,
    "incarnation" / Int32ub,
    "durable" / Int64ub,
    "validated" / Int64ub,
    "primaries"
    / PrefixedArray(
        Int16ub,
        Struct(
            "node" / Int16ub,
            "incarnation" / Int32ub,
            "batch" / Int64ub,
            "last" / Int64ub,
            "checkpoint" / Int64ub,
        ),
    ),
    "streams" / PrefixedArray(Int16ub, Struct("node" / Int16ub, "last" / Int64ub)),
    "direction" / Int8ub,
    "pair" / Int8ub,
    "numbering" / Flag,
    "limited" / Flag,
    "auto" / Flag,
    "at" / Int64ub,
    "start" / Int64ub,
    "starts" / PrefixedArray(Int16ub, Struct("node" / Int16ub, "last" / Int64ub)),
    "end" / Int64ub,
    "resynced" / Int64ub,
    "verify" / Flag,
    "initial" / Flag,
    "excluded" / PrefixedArray(Int16ub, Int16ub),
    "spilled" / PrefixedArray(Int16ub, Struct("node" / Int16ub, "last" / Int64ub)),
    "volumes" / Flag,
    "filled" / Flag,
    "filling" / Flag,
    "reforms" / PrefixedArray(Int16ub, epoch_id),
    "config" / Int64ub,
    "config_number" / Int64ub,
    "configured" / Flag,
)
_secondary = Struct(
    "version" / Const(STATE_VERSION, Int8ub),
    "epoch" / epoch_id,
    "promised" / epoch_id,
    "history" / _history,
    "number" / Int64ub,
    "members" / PrefixedArray(Int8ub, Int16ub),
    "rolling" / Flag,
    "active" / Flag,
    "writable" / Flag,
    "held" / Int64ub,
    "prepared" / Int64ub,
    "validated" / Int64ub,
    "applied" / Int64ub,
    "direction" / Int8ub,
    "copying" / Flag,
    "copy_from" / Int64ub,
    "initial" / Flag,
    "start" / Int64ub,
    "end" / Int64ub,
    "split" / Flag,
    "split_writable" / Flag,
    "pair" / Int8ub,
)


@dataclass(slots=True)
class PrimaryState:
    """A primary's state file."""

    epoch: Epoch = NO_EPOCH
    promised: Epoch = NO_EPOCH
    incarnation: int = 0  # raised durably by every process
    checkpoint: int = 0  # everything of this primary up to it is durable in its P-VOLs
    direction: int = 0  # 0: as the definition has it; 1: swapped
    suspended: int = 0  # Pair (PSUE, SSWS) while its P-VOLs are the truth and its bitmap counts; it never replays then
    alone: bool = False  # suspended: may complete writes without an intermediate
    detached: bool = False  # SSWS: there is no intermediate for it until the group is formed anew
    trusted: bool = True  # its bitmap says all that may differ
    clean: bool = True  # it stopped with its bits stored
    resync: int = 0  # the resync it works on; bits of the intermediate are merged
    cursor_volume: int = 0  # everything before it is copied, and acknowledged
    cursor_block: int = 0


@dataclass(slots=True)
class PrimaryRow:
    """What the intermediate keeps of one primary."""

    node: int
    incarnation: int = 0
    batch: int = 0  # last durable batch of that incarnation
    last: int = 0  # its last durable number
    checkpoint: int = 0


@dataclass(slots=True)
class IntermediateState:
    """The blob in the intermediate's journal."""

    epoch: Epoch = NO_EPOCH
    promised: Epoch = NO_EPOCH
    history: list[tuple[Epoch, int]] = field(default_factory=list)
    incarnation: int = 0
    durable: int = 0
    validated: int = 0
    primaries: list[PrimaryRow] = field(default_factory=list)
    streams: list[tuple[int, int]] = field(default_factory=list)  # (secondary, its last durable number)
    direction: int = 0
    pair: int = int(Pair.PAIR)  # Pair; PFUL is not stored
    numbering: bool = True  # False: hop 1 is suspended
    limited: bool = False  # hop 2 is suspended: nothing above ``at`` is sent
    auto: bool = False  # suspended: resync without being asked, as soon as all are there
    at: int = 0  # suspended or copying: the number that the secondaries are at, or would go back to
    start: int = 0  # the resync under way: number of its first START
    starts: list[tuple[int, int]] = field(default_factory=list)  # (secondary, the number before its START)
    end: int = 0  # number of the last END given
    resynced: int = 0  # the last resync that ended well
    verify: bool = False
    initial: bool = False
    excluded: list[int] = field(default_factory=list)  # primaries known to be dead
    spilled: list[tuple[int, int]] = field(default_factory=list)  # (primary, its records up to it lie beside the ring)
    volumes: bool = False  # volumes mode, when it last ran
    filled: bool = False  # the intermediate volumes lack nothing but what bits of primaries say
    filling: bool = False  # the resync under way compares all of them
    reforms: list[Epoch] = field(default_factory=list)  # promised for a swap or replacement: some may have stored them
    config: int = 0  # digest of the configuration in effect, or on its way
    config_number: int = 0  # of the last of its records
    configured: bool = False  # validated: in effect whatever happens


@dataclass(slots=True)
class SecondaryState:
    """The blob in a secondary's journal."""

    epoch: Epoch = NO_EPOCH
    promised: Epoch = NO_EPOCH
    history: list[tuple[Epoch, int]] = field(default_factory=list)
    number: int = 0  # the last number before the stored epoch
    members: list[int] = field(default_factory=list)
    rolling: bool = False  # the stored epoch came from a takeover: go to its number, wait to be activated
    active: bool = False
    writable: bool = False
    held: int = 0  # last record's number, durable here
    prepared: int = 0  # greatest note
    validated: int = 0
    applied: int = 0  # durable in the S-VOLs up to here
    direction: int = 0
    copying: bool = False  # between START and END: overwritten blocks are saved first
    copy_from: int = 0  # a takeover goes back to it
    initial: bool = False  # copying: nothing is saved, there is nothing to go back to
    start: int = 0  # number of the START
    end: int = 0  # number of the END held, for the copy under way
    split: bool = False  # split on purpose: waits for REJOIN
    split_writable: bool = False
    pair: int = int(Pair.PAIR)


def _build(layout: Construct, state: Any) -> bytes:
    values = asdict(state)
    for name in ("epoch", "promised"):
        values[name] = getattr(state, name)._asdict()
    if "history" in values:
        newest = state.history[-HISTORY_MAX:]
        values["history"] = [{"epoch": epoch._asdict(), "last": last} for epoch, last in newest]
    if "streams" in values:
        for name in ("streams", "starts", "spilled"):
            values[name] = [{"node": node, "last": last} for node, last in getattr(state, name)]
        values["reforms"] = [epoch._asdict() for epoch in state.reforms[-REFORMS_MAX:]]
    built: bytes = layout.build(values)
    return built


def _parse(layout: Construct, blob: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = layout.parse(blob)
    except ConstructError as error:
        raise DamagedError(f"{what}: not a state of version {STATE_VERSION}: {error}") from error
    values = {name: value for name, value in parsed.items() if name not in ("_io", "version")}
    for name in ("epoch", "promised"):
        values[name] = Epoch(values[name]["number"], values[name]["id"])
    if "history" in values:
        values["history"] = [(Epoch(row.epoch.number, row.epoch.id), row.last) for row in values["history"]]
    return values


def encode_primary(state: PrimaryState) -> bytes:
    """Bytes for the state file."""
    return _build(_primary, state)


def decode_primary(blob: bytes) -> PrimaryState:
    """Raises DamagedError."""
    return PrimaryState(**_parse(_primary, blob, "primary state"))


def encode_intermediate(state: IntermediateState) -> bytes:
    """Bytes for the superblock's blob."""
    return _build(_intermediate, state)


def decode_intermediate(blob: bytes) -> IntermediateState:
    """Raises DamagedError."""
    values = _parse(_intermediate, blob, "intermediate state")
    values["primaries"] = [
        PrimaryRow(row.node, row.incarnation, row.batch, row.last, row.checkpoint) for row in values["primaries"]
    ]
    for name in ("streams", "starts", "spilled"):
        values[name] = [(row.node, row.last) for row in values[name]]
    values["excluded"] = list(values["excluded"])
    values["reforms"] = [Epoch(row.number, row.id) for row in values["reforms"]]
    return IntermediateState(**values)


def encode_secondary(state: SecondaryState) -> bytes:
    """Bytes for the superblock's blob."""
    return _build(_secondary, state)


def decode_secondary(blob: bytes) -> SecondaryState:
    """Raises DamagedError."""
    values = _parse(_secondary, blob, "secondary state")
    values["members"] = list(values["members"])
    return SecondaryState(**values)
