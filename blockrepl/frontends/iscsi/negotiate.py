"""The operational keys: what each allows, how its outcome is found, what a session then goes by.

Source: RFC 7143, section 13; obsoleted keys: 13.25. We answer; we offer nothing but our own receive limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from blockrepl.errors import ProtocolError
from blockrepl.frontends.iscsi.text import IRRELEVANT, NOT_UNDERSTOOD, REJECT, Pairs, parse_number

MAX_RECV_BYTES = 1 << 18
FIRST_BURST_BYTES = 1 << 18
MAX_BURST_BYTES = 1 << 20
MAX_R2T = 8
MAX_SEGMENT = (1 << 24) - 1


@dataclass(slots=True)
class Parameters:
    """What a session goes by. The defaults are the RFC's: they hold where nothing is negotiated."""

    header_digest: bool = False
    data_digest: bool = False
    initial_r2t: bool = True
    immediate_data: bool = True
    max_send_bytes: int = 8192  # the initiator's MaxRecvDataSegmentLength
    max_recv_bytes: int = 8192  # ours
    max_burst_bytes: int = 262144
    first_burst_bytes: int = 65536
    max_outstanding_r2t: int = 1
    time2wait_s: int = 2
    time2retain_s: int = 20
    max_connections: int = 1
    error_recovery_level: int = 0
    data_pdu_in_order: bool = True
    data_sequence_in_order: bool = True
    protocol_level: int = 1


Kind = Literal["min", "max", "or", "and", "digest", "declared", "reporting"]


@dataclass(frozen=True, slots=True)
class Key:
    """How a key is negotiated: ``ours`` is what we would have; numbers have a range."""

    field: str
    kind: Kind
    ours: int = 0
    least: int = 0
    most: int = 0
    in_discovery: bool = False


KEYS = {
    "HeaderDigest": Key("header_digest", "digest", in_discovery=True),
    "DataDigest": Key("data_digest", "digest", in_discovery=True),
    "MaxConnections": Key("max_connections", "min", 1, 1, 65535),
    "InitialR2T": Key("initial_r2t", "or", 0),
    "ImmediateData": Key("immediate_data", "and", 1),
    "MaxRecvDataSegmentLength": Key("max_send_bytes", "declared", 0, 512, MAX_SEGMENT, in_discovery=True),
    "MaxBurstLength": Key("max_burst_bytes", "min", MAX_BURST_BYTES, 512, MAX_SEGMENT),
    "FirstBurstLength": Key("first_burst_bytes", "min", FIRST_BURST_BYTES, 512, MAX_SEGMENT),
    "DefaultTime2Wait": Key("time2wait_s", "max", 0, 0, 3600, in_discovery=True),
    "DefaultTime2Retain": Key("time2retain_s", "min", 0, 0, 3600, in_discovery=True),
    "MaxOutstandingR2T": Key("max_outstanding_r2t", "min", MAX_R2T, 1, 65535),
    "DataPDUInOrder": Key("data_pdu_in_order", "or", 1),
    "DataSequenceInOrder": Key("data_sequence_in_order", "or", 1),
    "ErrorRecoveryLevel": Key("error_recovery_level", "min", 0, 0, 2, in_discovery=True),
    "iSCSIProtocolLevel": Key("protocol_level", "min", 1, 0, 31),
    "TaskReporting": Key("", "reporting"),
}
# "Reject" for the intervals, "No" for the markers: initiators of RFC 3720 take a Reject for the end (13.25).
OBSOLETE = {"IFMarker": "No", "OFMarker": "No", "IFMarkInt": REJECT, "OFMarkInt": REJECT}
DECLARED_NAMES = {"InitiatorAlias"}  # what an initiator only tells


def negotiate(key: str, value: str, parameters: Parameters, *, discovery: bool) -> str | None:
    """Apply one offered key to ``parameters``; our answer, or None where a declaration needs none.

    Raises ProtocolError for a declaration that makes no sense: there is no answer that would say so.
    """
    if key in DECLARED_NAMES:
        return None
    if key in OBSOLETE:
        return OBSOLETE[key]
    rule = KEYS.get(key)
    if rule is None:
        return NOT_UNDERSTOOD
    if discovery and not rule.in_discovery:
        return IRRELEVANT
    return _HOW[rule.kind](key, rule, value, parameters)


def in_order(pairs: Pairs) -> Pairs:
    """As they are to be negotiated: the first burst may be no longer than a burst (RFC 7143, 13.14)."""
    return sorted(pairs, key=lambda pair: pair[0] != "MaxBurstLength")


def conclude(parameters: Parameters) -> None:
    """What holds between keys, where one of them came later or not at all."""
    parameters.first_burst_bytes = min(parameters.first_burst_bytes, parameters.max_burst_bytes)


def _number(key: str, rule: Key, value: str, parameters: Parameters) -> str | None:
    offered = parse_number(value)
    fits = offered is not None and rule.least <= offered <= rule.most
    if rule.kind == "declared":
        if not fits or offered is None:
            raise ProtocolError(f"{key}={value} is out of range")
        setattr(parameters, rule.field, offered)
        return None
    if not fits or offered is None:
        return REJECT
    outcome = min(offered, rule.ours) if rule.kind == "min" else max(offered, rule.ours)
    if rule.field == "first_burst_bytes":
        outcome = min(outcome, parameters.max_burst_bytes)
    setattr(parameters, rule.field, outcome)
    return str(outcome)


def _boolean(key: str, rule: Key, value: str, parameters: Parameters) -> str | None:
    if value not in ("Yes", "No"):
        return REJECT
    offered = value == "Yes"
    outcome = offered or bool(rule.ours) if rule.kind == "or" else offered and bool(rule.ours)
    setattr(parameters, rule.field, outcome)
    return "Yes" if outcome else "No"


def _digest(key: str, rule: Key, value: str, parameters: Parameters) -> str | None:
    for offered in value.split(","):  # in the order of the initiator's preference
        if offered in ("None", "CRC32C"):
            setattr(parameters, rule.field, offered == "CRC32C")
            return offered
    return REJECT


def _reporting(key: str, rule: Key, value: str, parameters: Parameters) -> str | None:
    return "RFC3720" if "RFC3720" in value.split(",") else REJECT


_HOW: dict[str, Callable[[str, Key, str, Parameters], str | None]] = {
    "min": _number, "max": _number, "declared": _number, "or": _boolean, "and": _boolean, "digest": _digest,
    "reporting": _reporting,
}  # fmt: skip
