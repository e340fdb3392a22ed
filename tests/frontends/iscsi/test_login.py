"""Logins: stages, keys, authentication, access; and what each wrong one is told."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import LoginStatus
from blockrepl.frontends.iscsi import text
from blockrepl.frontends.iscsi.chap import Credentials
from blockrepl.frontends.iscsi.login import Access, Login, LoginError, Request, State, TargetDescription
from tests.frontends.iscsi.initiator import INITIATOR, TARGET, Answer, login_request, parse_answers

CHANCE = bytes(range(33))
SECRET, OWN = b"a secret of host1", b"the secret of target"
CREDENTIALS = Credentials({"host1": SECRET}, ("target", OWN))
WHO = f"InitiatorName={INITIATOR}\0TargetName={TARGET}\0".encode()
SECURITY, OPERATIONAL = 0x00, 0x04
TO_OPERATIONAL, TO_FULL = 0x81, 0x83


class Rig:
    """One login at the target."""

    def __init__(
        self, access: Access | None = None, *, loopback: bool = True, refuse: LoginStatus | None = None
    ) -> None:
        self.admitted: list[Request] = []
        self.refuse = refuse
        description = TargetDescription(TARGET, "group test", 3, access or Access())
        self.login = Login(description, self._admit, CHANCE, loopback=loopback)

    def _admit(self, request: Request) -> int:
        if self.refuse is not None:
            raise LoginError(self.refuse, "test")
        self.admitted.append(request)
        return 9

    def give(self, data: bytes = b"", **fields: Any) -> Answer:
        header, body = login_request(data, **fields)
        (answer,) = parse_answers(self.login.receive(header, body))
        return answer


def pairs(answer: Answer) -> dict[str, str]:
    return dict(text.decode(answer.data))


def test_a_login_in_two_stages() -> None:
    rig = Rig()
    answer = rig.give(WHO + b"SessionType=Normal\0AuthMethod=None\0", flags=SECURITY | TO_OPERATIONAL)
    assert pairs(answer) == {"AuthMethod": "None", "TargetPortalGroupTag": "3", "TargetAlias": "group test"}
    assert (answer.flags, answer.status, answer.stat_sn, answer.exp_cmd_sn, answer.tsih) == (0x81, 0, 500, 100, 0)
    answer = rig.give(b"HeaderDigest=None,CRC32C\0MaxBurstLength=262144\0", flags=OPERATIONAL | TO_FULL)
    assert pairs(answer) == {"HeaderDigest": "None", "MaxBurstLength": "262144", "MaxRecvDataSegmentLength": "262144"}
    assert (answer.flags, answer.tsih, answer.stat_sn) == (0x87, 9, 501)
    assert rig.login.state is State.DONE
    (request,) = rig.admitted
    assert (request.initiator_name, request.cid, request.stat_sn) == (INITIATOR, 7, 502)
    assert request.parameters.max_recv_bytes == 1 << 18


def test_a_login_straight_to_the_full_feature_phase_has_the_defaults() -> None:
    rig = Rig()
    answer = rig.give(WHO, flags=SECURITY | TO_FULL)
    assert answer.flags == 0x83
    assert rig.admitted[0].parameters.max_recv_bytes == 8192
    assert rig.admitted[0].parameters.initial_r2t


def test_text_may_go_on_over_requests() -> None:
    rig = Rig()
    answer = rig.give(WHO[:20], flags=OPERATIONAL | 0x40)
    assert (answer.flags, answer.data) == (OPERATIONAL, b"")
    assert rig.give(WHO[20:], flags=OPERATIONAL | TO_FULL).status == 0
    assert rig.login.state is State.DONE


def chap_response(secret: bytes, identifier: int, challenge: bytes, digest: str) -> str:
    return "0x" + hashlib.new(digest, bytes([identifier]) + secret + challenge).hexdigest()


@pytest.mark.parametrize(("offered", "chosen", "digest"), [("5,7,8", "8", "sha3_256"), ("5,6,7", "7", "sha256")])
def test_chap_both_ways_takes_the_strongest_algorithm(offered: str, chosen: str, digest: str) -> None:
    rig = Rig(Access(credentials=CREDENTIALS))
    answer = rig.give(WHO + b"AuthMethod=CHAP,None\0", flags=SECURITY | TO_OPERATIONAL)
    assert answer.flags == SECURITY  # not yet
    assert pairs(answer)["AuthMethod"] == "CHAP"
    found = pairs(rig.give(f"CHAP_A={offered}\0".encode(), flags=SECURITY))
    assert found["CHAP_A"] == chosen
    challenge = text.parse_binary(found["CHAP_C"])
    assert challenge == CHANCE[1:]
    proof = chap_response(SECRET, int(found["CHAP_I"]), challenge, digest)
    mine = b"m" * 32
    reply = f"CHAP_N=host1\0CHAP_R={proof}\0CHAP_I=200\0CHAP_C=0x{mine.hex()}\0".encode()
    answer = rig.give(reply, flags=SECURITY | TO_OPERATIONAL)
    assert answer.flags == 0x81
    assert pairs(answer) == {"CHAP_N": "target", "CHAP_R": chap_response(OWN, 200, mine, digest)}
    assert rig.give(flags=OPERATIONAL | TO_FULL).status == 0
    assert rig.admitted[0].user == "host1"


def test_a_response_in_base64_is_taken() -> None:
    rig = Rig(Access(credentials=CREDENTIALS))
    rig.give(WHO + b"AuthMethod=CHAP\0", flags=SECURITY)
    rig.give(b"CHAP_A=7\0", flags=SECURITY)
    proof = base64.b64encode(hashlib.sha256(CHANCE[:1] + SECRET + CHANCE[1:]).digest()).decode()
    answer = rig.give(f"CHAP_N=host1\0CHAP_R=0b{proof}\0".encode(), flags=SECURITY | TO_OPERATIONAL)
    assert (answer.status, answer.flags) == (0, 0x81)


def test_md5_only_where_it_is_allowed() -> None:
    for allowed, status in ((False, LoginStatus.AUTHENTICATION_FAILED), (True, LoginStatus.SUCCESS)):
        rig = Rig(Access(credentials=Credentials({"host1": SECRET}, None, allowed)))
        rig.give(WHO + b"AuthMethod=CHAP\0", flags=SECURITY)
        assert rig.give(b"CHAP_A=5\0", flags=SECURITY).status == status


def answer_chap(rig: Rig, reply: bytes) -> Answer:
    rig.give(WHO + b"AuthMethod=CHAP\0", flags=SECURITY)
    rig.give(b"CHAP_A=7\0", flags=SECURITY)
    return rig.give(reply, flags=SECURITY | TO_OPERATIONAL)


GOOD = chap_response(SECRET, 0, CHANCE[1:], "sha256")


@pytest.mark.parametrize(
    "reply",
    [
        f"CHAP_N=host2\0CHAP_R={GOOD}\0",
        f"CHAP_N=host1\0CHAP_R={GOOD[:-2]}00\0",
        "CHAP_N=host1\0CHAP_R=nonsense\0",
        "CHAP_N=host1\0",
        f"CHAP_N=host1\0CHAP_R={GOOD}\0CHAP_I=1\0CHAP_C=0x{CHANCE[1:].hex()}\0",  # our own challenge
        f"CHAP_N=host1\0CHAP_R={GOOD}\0CHAP_I=1\0",
        f"CHAP_N=host1\0CHAP_R={GOOD}\0CHAP_I=256\0CHAP_C=0x11\0",
        f"CHAP_N=host1\0CHAP_R={GOOD}\0CHAP_I=1\0CHAP_C=0x\0",
        # An empty proof of the secret that stands for "no such user".
        f"CHAP_N=nobody\0CHAP_R={chap_response(CHANCE[1:], 0, CHANCE[1:], 'sha256')}\0",
    ],
)
def test_a_wrong_answer_to_the_challenge_ends_the_login(reply: str) -> None:
    rig = Rig(Access(credentials=CREDENTIALS))
    answer = answer_chap(rig, reply.encode())
    assert answer.status == LoginStatus.AUTHENTICATION_FAILED
    assert rig.login.state is State.FAILED
    assert not rig.admitted


def test_mutual_authentication_without_a_secret_of_ours_or_with_the_same_is_refused() -> None:
    for mutual in (None, ("target", SECRET)):
        rig = Rig(Access(credentials=Credentials({"host1": SECRET}, mutual)))
        reply = f"CHAP_N=host1\0CHAP_R={GOOD}\0CHAP_I=1\0CHAP_C=0x1234\0".encode()
        assert answer_chap(rig, reply).status == LoginStatus.AUTHENTICATION_FAILED


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        (WHO, OPERATIONAL | TO_FULL),  # around the security stage
        (WHO + b"AuthMethod=None\0", SECURITY | TO_OPERATIONAL),
        (WHO + b"CHAP_A=7\0", SECURITY),
    ],
)
def test_there_is_no_way_around_authentication(data: bytes, flags: int) -> None:
    rig = Rig(Access(credentials=CREDENTIALS))
    assert rig.give(data, flags=flags).status == LoginStatus.AUTHENTICATION_FAILED


def test_a_stage_is_not_left_before_authentication() -> None:
    rig = Rig(Access(credentials=CREDENTIALS))
    for _ in range(5):
        answer = rig.give(WHO, flags=SECURITY | TO_FULL)
        assert (answer.status, answer.flags) == (0, 0)
    assert rig.login.state is State.GOING


def test_secrets_are_in_no_repr() -> None:
    assert "secret" not in repr(Access(credentials=CREDENTIALS)).replace("secret_", "")


@pytest.mark.parametrize(
    ("initiators", "loopback", "allowed"),
    [
        (None, True, True), (None, False, False), (("iqn.1993-08.org.debian:*",), False, True),
        (("iqn.other",), True, False), ((), True, False),
    ],
)  # fmt: skip
def test_who_may_come_from_where(initiators: tuple[str, ...] | None, loopback: bool, allowed: bool) -> None:
    rig = Rig(Access(initiators), loopback=loopback)
    status = rig.give(WHO, flags=SECURITY | TO_FULL).status
    assert status == (LoginStatus.SUCCESS if allowed else LoginStatus.NOT_AUTHORIZED)


@pytest.mark.parametrize(
    ("data", "fields", "status"),
    [
        (b"TargetName=x\0", {}, LoginStatus.MISSING_PARAMETER),
        (f"InitiatorName={INITIATOR}\0".encode(), {}, LoginStatus.MISSING_PARAMETER),
        (b"InitiatorName=a b\0", {}, LoginStatus.INITIATOR_ERROR),
        (f"InitiatorName={INITIATOR}\0TargetName=iqn.x\0".encode(), {}, LoginStatus.NOT_FOUND),
        (WHO + b"SessionType=Odd\0", {}, LoginStatus.SESSION_TYPE),
        (WHO, {"version_min": 1}, LoginStatus.UNSUPPORTED_VERSION),
        (WHO, {"flags": 0x08}, LoginStatus.INITIATOR_ERROR),  # stage 2
        (WHO, {"flags": 0x84}, LoginStatus.INITIATOR_ERROR),  # from operational to security
        (WHO, {"flags": 0x82}, LoginStatus.INITIATOR_ERROR),  # to stage 2
        (WHO, {"flags": 0xC1}, LoginStatus.INITIATOR_ERROR),  # over, and goes on
        (WHO, {"opcode": 0x01}, LoginStatus.INVALID_REQUEST),
        (b"junk", {}, LoginStatus.INITIATOR_ERROR),
        (WHO + b"MaxRecvDataSegmentLength=1\0", {}, LoginStatus.INITIATOR_ERROR),
        (WHO + b"AuthMethod=KRB5\0", {}, LoginStatus.AUTHENTICATION_FAILED),
    ],
)
def test_a_wrong_first_request_is_told_what_is_wrong(data: bytes, fields: dict[str, int], status: int) -> None:
    rig = Rig()
    answer = rig.give(data, **{"flags": SECURITY | TO_OPERATIONAL, **fields})
    assert answer.status == status
    assert not answer.flags & 0x80
    assert rig.login.state is State.FAILED
    assert rig.login.reason


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (b"", {"isid": bytes(6)}), (b"", {"cid": 8}), (b"", {"tsih": 5}), (b"", {"flags": SECURITY | TO_OPERATIONAL}),
        (b"InitiatorName=iqn.other\0", {}), (b"AuthMethod=None\0", {}),
    ],
)  # fmt: skip
def test_what_may_not_change_in_mid_login(data: bytes, fields: dict[str, Any]) -> None:
    rig = Rig()
    rig.give(WHO + b"AuthMethod=None\0", flags=SECURITY | TO_OPERATIONAL)
    assert rig.give(data, **{"flags": OPERATIONAL | TO_FULL, **fields}).status == LoginStatus.INITIATOR_ERROR


def test_a_login_that_leads_nowhere_ends() -> None:
    rig = Rig()
    rig.give(WHO, flags=SECURITY)
    while rig.login.state is State.GOING:
        answer = rig.give(flags=SECURITY)
    assert answer.status == LoginStatus.INITIATOR_ERROR


def test_the_server_may_refuse() -> None:
    rig = Rig(refuse=LoginStatus.OUT_OF_RESOURCES)
    assert rig.give(WHO, flags=SECURITY | TO_FULL).status == LoginStatus.OUT_OF_RESOURCES


def test_a_discovery_login_needs_no_target_and_has_no_tag() -> None:
    rig = Rig()
    answer = rig.give(f"InitiatorName={INITIATOR}\0SessionType=Discovery\0".encode(), flags=OPERATIONAL | TO_FULL)
    assert pairs(answer) == {"MaxRecvDataSegmentLength": "262144"}
    assert rig.admitted[0].discovery


KEYS = [b"InitiatorName=iqn.a\0", b"TargetName=" + TARGET.encode() + b"\0", b"SessionType=Discovery\0",
        b"AuthMethod=CHAP,None\0", b"CHAP_A=7\0", b"CHAP_N=host1\0", b"CHAP_R=0x12\0", b"HeaderDigest=CRC32C\0",
        b"X-a=1\0", b"MaxBurstLength=1\0", b"\xff=\0", b"A=" + b"x" * 300 + b"\0"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.lists(st.sampled_from(KEYS), max_size=5), st.integers(0, 255), st.sampled_from([67, 3, 65])),
        min_size=1, max_size=6,
    ),
)  # fmt: skip
def test_no_login_raises_and_none_gets_around_chap(
    authenticate: bool, requests: list[tuple[list[bytes], int, int]]
) -> None:  # fmt: skip
    rig = Rig(Access(credentials=CREDENTIALS if authenticate else None))
    for keys, flags, opcode in requests:
        answer = rig.give(b"".join(keys), flags=flags, opcode=opcode)
        assert answer.status != LoginStatus.TARGET_ERROR
        if rig.login.state is not State.GOING:
            break
    assert not (authenticate and rig.admitted)
    assert (rig.login.state is State.DONE) == bool(rig.admitted)
    assert iscsi.login_response.sizeof() == 48
