from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.errors import ProtocolError
from blockrepl.frontends.iscsi import text
from blockrepl.frontends.iscsi.negotiate import KEYS, Parameters, conclude, in_order, negotiate


def test_pairs_are_read_as_they_were_written() -> None:
    pairs = [("InitiatorName", "iqn.x"), ("X-com.example.key", "a=b,c"), ("SessionType", "")]
    assert text.decode(text.encode(pairs)) == pairs
    assert text.decode(b"A=1\0\0\0") == [("A", "1")]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"A=1\0A=2\0", "twice"),
        (b"novalue\0", "no key=value"),
        (b"=1\0", "no key=value"),
        (b"a=1\0", "no key=value"),
        (b"A" * 64 + b"=1\0", "no key=value"),
        (b"A=" + b"x" * 256 + b"\0", "too long"),
        (b"A=\xff\0", "UTF-8"),
        (b"".join(b"K%d=1\0" % n for n in range(65)), "too many"),
        (bytes(text.MAX_TEXT_BYTES + 1), "bytes of text"),
    ],
)
def test_text_that_is_wrong_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        text.decode(raw)


@given(st.binary(max_size=300))
def test_any_text_is_pairs_or_a_protocol_error(raw: bytes) -> None:
    try:
        pairs = text.decode(raw)
    except ProtocolError:
        return
    assert text.decode(text.encode(pairs)) == pairs


@pytest.mark.parametrize(
    ("value", "number"),
    [("0", 0), ("0x10", 16), ("0Xff", 255), ("-1", None), ("", None), ("1 ", None), ("1" * 30, None)],
)
def test_numbers(value: str, number: int | None) -> None:
    assert text.parse_number(value) == number


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("0x0aff", b"\x0a\xff"), ("0xaff", b"\x0a\xff"), ("0bCv8=", b"\x0a\xff"), ("0BCv8=", b"\x0a\xff"),
        ("0x", None), ("0b", None), ("12", None), ("0xzz", None), ("0x 12", None), ("0b!", None),
        ("0x" + "00" * 1025, None),
    ],
)  # fmt: skip
def test_binary_values(value: str, found: bytes | None) -> None:
    assert text.parse_binary(value) == found


@pytest.mark.parametrize(
    ("key", "value", "answer", "field", "outcome"),
    [
        ("HeaderDigest", "CRC32C,None", "CRC32C", "header_digest", True),
        ("HeaderDigest", "None,CRC32C", "None", "header_digest", False),
        ("DataDigest", "SHA9,CRC32C", "CRC32C", "data_digest", True),
        ("DataDigest", "SHA9", "Reject", "data_digest", False),
        ("InitialR2T", "No", "No", "initial_r2t", False),
        ("InitialR2T", "Yes", "Yes", "initial_r2t", True),
        ("ImmediateData", "No", "No", "immediate_data", False),
        ("ImmediateData", "Maybe", "Reject", "immediate_data", True),
        ("MaxRecvDataSegmentLength", "65536", None, "max_send_bytes", 65536),
        ("MaxBurstLength", "16776192", "1048576", "max_burst_bytes", 1 << 20),
        ("MaxBurstLength", "511", "Reject", "max_burst_bytes", 262144),
        ("FirstBurstLength", "0x2000", "8192", "first_burst_bytes", 8192),
        ("FirstBurstLength", "1048576", "262144", "first_burst_bytes", 262144),
        ("MaxConnections", "8", "1", "max_connections", 1),
        ("MaxOutstandingR2T", "1", "1", "max_outstanding_r2t", 1),
        ("DefaultTime2Wait", "2", "2", "time2wait_s", 2),
        ("DefaultTime2Retain", "20", "0", "time2retain_s", 0),
        ("ErrorRecoveryLevel", "2", "0", "error_recovery_level", 0),
        ("DataPDUInOrder", "No", "Yes", "data_pdu_in_order", True),
        ("DataSequenceInOrder", "No", "Yes", "data_sequence_in_order", True),
        ("iSCSIProtocolLevel", "2", "1", "protocol_level", 1),
        ("TaskReporting", "RFC3720,FastAbort", "RFC3720", "protocol_level", 1),
        ("IFMarker", "No", "No", "protocol_level", 1),
        ("OFMarkInt", "2048", "Reject", "protocol_level", 1),
        ("X-org.example", "1", "NotUnderstood", "protocol_level", 1),
        ("InitiatorAlias", "me", None, "protocol_level", 1),
    ],
)
def test_each_key_is_negotiated_by_its_rule(
    key: str, value: str, answer: str | None, field: str, outcome: object
) -> None:
    parameters = Parameters()
    assert negotiate(key, value, parameters, discovery=False) == answer
    assert getattr(parameters, field) == outcome


def test_keys_without_meaning_in_discovery_are_irrelevant_there() -> None:
    answers = {
        key: negotiate(key, "1", Parameters(), discovery=True) for key in KEYS if key != "MaxRecvDataSegmentLength"
    }
    assert {key for key, answer in answers.items() if answer == "Irrelevant"} == {
        "MaxConnections", "InitialR2T", "ImmediateData", "MaxBurstLength", "FirstBurstLength", "MaxOutstandingR2T",
        "DataPDUInOrder", "DataSequenceInOrder", "iSCSIProtocolLevel", "TaskReporting",
    }  # fmt: skip


def test_a_receive_limit_out_of_range_cannot_be_answered() -> None:
    for value in ("511", "16777216", "x"):
        with pytest.raises(ProtocolError, match="out of range"):
            negotiate("MaxRecvDataSegmentLength", value, Parameters(), discovery=False)


def test_the_first_burst_is_never_longer_than_a_burst() -> None:
    parameters = Parameters()
    pairs = [("FirstBurstLength", "65536"), ("MaxBurstLength", "4096")]
    answers = {key: negotiate(key, value, parameters, discovery=False) for key, value in in_order(pairs)}
    assert answers == {"MaxBurstLength": "4096", "FirstBurstLength": "4096"}
    late = Parameters(max_burst_bytes=1024)
    conclude(late)
    assert late.first_burst_bytes == 1024
