"""The full feature phase against a fake disk: what RFC 7143 says of data, order, management and faults."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import NO_TAG, AsyncEvent, Opcode, RejectReason
from blockrepl.frontends.iscsi.answers import WINDOW
from blockrepl.frontends.iscsi.execution import QUEUED_LIMIT_BYTES
from blockrepl.frontends.iscsi.negotiate import Parameters
from blockrepl.frontends.iscsi.session import SILENT_TICKS
from blockrepl.frontends.iscsi.task import Event, EventKind, Task, TaskFunction, TaskResponse
from tests.frontends.iscsi.initiator import INITIATOR, TARGET, Answer, Initiator, write10


def kinds(answers: list[Answer]) -> list[Opcode]:
    return [answer.kind for answer in answers]


def manage(i: Initiator, function: int, **fields: int) -> list[Answer]:
    values: dict[str, Any] = {"referenced_tag": 0, "ref_cmd_sn": 0, "exp_data_sn": 0, "immediate": True, **fields}
    return i.give(i.pdu(iscsi.task_request, function=0x80 | function, **values))


# reads


def test_reads_that_came_together_are_executed_and_answered_together() -> None:
    i = Initiator()
    i.device.disk[:2048] = random.Random(1).randbytes(2048)
    answers = i.give(i.read(0, 2) + i.read(2, 1) + i.read(3, 1))
    assert len(i.device.executed) == 1
    assert i.stream.sends == 1
    assert kinds(answers) == [Opcode.DATA_IN] * 3
    assert b"".join(answer.data for answer in answers) == i.device.disk[:2048]
    assert [answer.tag for answer in answers] == [1, 2, 3]
    assert [answer.stat_sn for answer in answers] == [500, 501, 502]
    assert all(answer.flags == 0x81 and answer.status == 0 for answer in answers)
    assert all(answer.exp_cmd_sn == 103 and answer.max_cmd_sn == 103 + WINDOW - 1 for answer in answers)
    assert i.session.in_flight == 0


def test_data_in_honours_the_segment_and_the_burst_of_the_initiator() -> None:
    i = Initiator(Parameters(max_send_bytes=1024, max_burst_bytes=2560))
    i.device.disk[:8192] = random.Random(2).randbytes(8192)
    answers = i.give(i.read(0, 11))
    assert [len(answer.data) for answer in answers] == [1024, 1024, 512, 1024, 1024, 512, 512]
    assert [answer.flags for answer in answers] == [0, 0, 0x80, 0, 0, 0x80, 0x81]
    assert [answer.data_sn for answer in answers] == list(range(7))
    assert [answer.offset_bytes for answer in answers] == [0, 1024, 2048, 2560, 3584, 4608, 5120]
    assert b"".join(answer.data for answer in answers) == i.device.disk[: 11 * 512]
    assert i.give(i.read(0, 1))[0].stat_sn == 501  # one number for the whole command


@pytest.mark.parametrize(
    ("expected", "flags", "residual", "length"),
    [(1024, 0x81, 0, 1024), (2048, 0x83, 1024, 1024), (512, 0x85, 512, 512), (1022, 0x85, 2, 1022)],
)
def test_residuals_of_a_read(expected: int, flags: int, residual: int, length: int) -> None:
    i = Initiator()
    (answer,) = i.give(i.read(0, 2, expected=expected))
    assert (answer.flags, answer.residual_bytes, len(answer.data)) == (flags, residual, length)


def test_a_read_that_nobody_expects_data_of_ends_in_a_response_with_overflow() -> None:
    i = Initiator()
    (answer,) = i.give(i.read(0, 2, expected=0))
    assert answer.kind == Opcode.SCSI_RESPONSE
    assert (answer.flags, answer.residual_bytes) == (0x84, 1024)


def test_a_residual_is_at_most_what_its_field_holds() -> None:
    i = Initiator()
    cdb = b"\x8a\0" + bytes(8) + b"\xff\xff\xff\xff\0\0"  # WRITE (16) of 2 TiB, of which a block comes
    (answer,) = i.give(i.command(cdb, flags=0xA0, expected=512, data=bytes(512)))
    assert (answer.kind, answer.residual_bytes) == (Opcode.SCSI_RESPONSE, 0xFFFFFFFF)


def test_sense_data_goes_with_the_response_and_its_length_before_it() -> None:
    i = Initiator()
    (answer,) = i.give(i.command(b"\xff", flags=0xC0, expected=512))
    assert answer.kind == Opcode.SCSI_RESPONSE
    assert answer.status == 2
    assert answer.data[:2] == b"\0\x12"
    assert answer.data[4] == 5
    assert (answer.flags, answer.residual_bytes) == (0x82, 512)


# writes


def test_immediate_data_is_written_without_a_copy_of_the_session() -> None:
    i = Initiator()
    data = bytes(range(256)) * 4
    i.device.hold = True
    assert i.give(i.write(5, 1, data[:512]) + i.write(6, 1, data[512:])) == []
    assert [task.data_out[0].obj is i.chunks[0].view.obj for task in i.device.held] == [True, True]
    assert i.users() == 2
    i.device.let_go()
    assert kinds(i.answers()) == [Opcode.SCSI_RESPONSE] * 2
    assert i.device.disk[2560:3584] == data
    assert i.users() == 0


def test_a_write_without_data_is_asked_for_burst_by_burst() -> None:
    i = Initiator(Parameters(max_burst_bytes=1024, max_outstanding_r2t=2, max_recv_bytes=512))
    data = random.Random(3).randbytes(2560)
    r2ts = i.give(i.write(8, 5))
    assert kinds(r2ts) == [Opcode.R2T, Opcode.R2T]
    assert [(r.offset_bytes, r.desired_bytes, r.r2t_sn) for r in r2ts] == [(0, 1024, 0), (1024, 1024, 1)]
    assert all(r.stat_sn == 500 and r.tag == 1 for r in r2ts)
    first, second = r2ts
    assert i.give(i.data_out(1, first.target_tag, 0, 0, data[:512])) == []
    (third,) = i.give(i.data_out(1, first.target_tag, 1, 512, data[512:1024], final=True))
    assert (third.offset_bytes, third.desired_bytes, third.r2t_sn) == (2048, 512, 2)
    assert i.give(i.data_out(1, second.target_tag, 0, 1024, data[1024:1536])) == []
    assert i.give(i.data_out(1, second.target_tag, 1, 1536, data[1536:2048], final=True)) == []
    (done,) = i.give(i.data_out(1, third.target_tag, 0, 2048, data[2048:], final=True))
    assert (done.kind, done.status, done.residual_bytes) == (Opcode.SCSI_RESPONSE, 0, 0)
    assert i.device.disk[4096 : 4096 + 2560] == data
    assert i.users() == 0


def test_unsolicited_data_then_r2t_for_the_rest() -> None:
    i = Initiator(Parameters(initial_r2t=False, first_burst_bytes=1024, max_recv_bytes=512))
    data = random.Random(4).randbytes(2048)
    assert i.give(i.write(0, 4, data[:512], final=False)) == []
    (r2t,) = i.give(i.data_out(1, NO_TAG, 0, 512, data[512:1024], final=True))
    assert (r2t.offset_bytes, r2t.desired_bytes) == (1024, 1024)
    i.give(i.data_out(1, r2t.target_tag, 0, 1024, data[1024:1536]))
    (done,) = i.give(i.data_out(1, r2t.target_tag, 1, 1536, data[1536:], final=True))
    assert done.status == 0
    assert i.device.disk[:2048] == data


@settings(max_examples=40, deadline=None)
@given(
    st.booleans(), st.booleans(), st.integers(1, 6), st.sampled_from([512, 1024, 1536]), st.integers(1, 4),
    st.integers(0, 2048), st.randoms(use_true_random=False),
)  # fmt: skip
def test_whatever_was_negotiated_the_data_arrives(
    initial_r2t: bool, immediate_data: bool, blocks: int, burst: int, r2ts: int, immediate: int, chance: random.Random
) -> None:
    parameters = Parameters(
        initial_r2t=initial_r2t, immediate_data=immediate_data, max_burst_bytes=burst, first_burst_bytes=burst,
        max_outstanding_r2t=r2ts, max_recv_bytes=512,
    )  # fmt: skip
    i = Initiator(parameters)
    size = blocks * 512
    data = chance.randbytes(size)
    at = min(immediate, size, burst, 512) if immediate_data else 0
    unsolicited = min(burst, size) if not initial_r2t else at
    pending = i.give(i.write(0, blocks, data[:at], final=at >= unsolicited))
    data_sn = 0
    while at < unsolicited:
        part = min(chance.randint(1, 512), unsolicited - at)
        pending += i.give(i.data_out(1, NO_TAG, data_sn, at, data[at : at + part], final=at + part == unsolicited))
        at += part
        data_sn += 1
    while pending[0].kind == Opcode.R2T:
        r2t = pending.pop(0)
        assert r2t.offset_bytes == at
        assert r2t.desired_bytes <= burst
        data_sn, end = 0, at + r2t.desired_bytes
        while at < end:
            part = min(chance.randint(1, 512), end - at)
            last = at + part == end
            pending += i.give(i.data_out(1, r2t.target_tag, data_sn, at, data[at : at + part], final=last))
            assert len(pending) <= r2ts
            at += part
            data_sn += 1
    assert [(a.kind, a.status) for a in pending] == [(Opcode.SCSI_RESPONSE, 0)]
    assert i.device.disk[:size] == data
    assert i.users() == 0


def test_no_more_is_asked_for_than_the_cdb_wants() -> None:
    i = Initiator(Parameters())
    (r2t,) = i.give(i.write(0, 1, expected=4096))
    assert r2t.desired_bytes == 512
    (done,) = i.give(i.data_out(1, r2t.target_tag, 0, 0, b"x" * 512, final=True))
    assert (done.flags, done.residual_bytes) == (0x82, 4096 - 512)


def test_nothing_is_asked_for_a_command_that_is_refused_and_late_data_is_let_pass() -> None:
    i = Initiator()
    (answer,) = i.give(i.command(b"\xff", flags=0x20, expected=1024, data=b"x" * 512))
    assert answer.status == 2
    assert i.give(i.data_out(1, NO_TAG, 0, 512, b"x" * 512, final=True)) == []
    assert i.users() == 0


@pytest.mark.parametrize(
    ("data_sn", "offset", "size"), [(1, 0, 512), (0xFFFFFFFF, 0, 512), (0, 512, 512), (0, 0, 1536), (0, 0, 256)]
)
def test_data_out_of_order_or_measure_ends_the_command_with_sense(data_sn: int, offset: int, size: int) -> None:
    i = Initiator()
    (r2t,) = i.give(i.write(0, 2, expected=1024))
    (answer,) = i.give(i.data_out(1, r2t.target_tag, data_sn, offset, bytes(size), final=True))
    assert (answer.kind, answer.status) == (Opcode.SCSI_RESPONSE, 2)
    assert (answer.data[2 + 2], answer.data[2 + 12 : 2 + 14]) == (0x0B, b"\x0c\x0d")
    assert i.give(i.data_out(1, r2t.target_tag, 1, 512, bytes(512), final=True)) == []  # was on its way
    assert i.device.executed == []
    assert i.users() == 0
    assert i.session.in_flight == 0


def test_unsolicited_data_where_none_was_agreed_ends_the_command() -> None:
    i = Initiator(Parameters(initial_r2t=True))
    (answer,) = i.give(i.write(0, 2, final=False))
    assert (answer.status, answer.data[14:16]) == (2, b"\x0c\x0c")


def test_data_out_of_nobody_is_rejected() -> None:
    i = Initiator()
    (r2t,) = i.give(i.write(0, 2))
    for tag, target_tag in ((99, NO_TAG), (99, r2t.target_tag), (1, r2t.target_tag + 5)):
        (answer,) = i.give(i.data_out(tag, target_tag, 0, 0, bytes(512)))
        assert (answer.kind, answer.reason) == (Opcode.REJECT, RejectReason.INVALID_FIELD)
        assert answer.data[0] == Opcode.DATA_OUT
    assert i.session.in_flight == 1


def test_many_large_writes_are_not_all_asked_for_at_once() -> None:
    i = Initiator(Parameters(max_burst_bytes=1 << 20))
    answers = i.give(b"".join(i.write(0, 8192) for _ in range(6)))  # 4 MiB each
    assert len(answers) == 4  # 16 MiB
    for target_tag in [answers[0].target_tag]:
        assert i.give(i.data_out(1, target_tag, 0, 0, bytes(8192))) == []
    (done,) = manage(i, TaskFunction.ABORT_TASK, referenced_tag=1)[-1:]
    assert done.kind == Opcode.TASK_RESPONSE
    answers = i.give(i.pdu(iscsi.nop_out, target_tag=NO_TAG, immediate=True))
    assert sorted({task.tag for task in i.session._transfers.tasks()}) == [2, 3, 4, 5, 6]
    assert i.users() == 0


# order


def test_commands_outside_the_window_are_ignored() -> None:
    i = Initiator()
    tur = b"\0"
    assert i.give(i.command(tur, cmd_sn=99)) == []
    assert i.give(i.command(tur, cmd_sn=100 + WINDOW)) == []
    assert kinds(i.give(i.command(tur))) == [Opcode.SCSI_RESPONSE]
    assert i.give(i.command(tur, cmd_sn=100)) == []


def test_a_command_that_came_early_waits_for_its_turn() -> None:
    i = Initiator()
    assert i.give(i.write(0, 1, b"b" * 512, cmd_sn=101, tag=11)) == []
    assert i.give(i.write(0, 1, b"b" * 512, cmd_sn=101, tag=11)) == []  # twice the same
    answers = i.give(i.write(0, 1, b"a" * 512, cmd_sn=100, tag=10) + i.write(1, 1, b"c" * 512, cmd_sn=102, tag=12))
    assert [answer.tag for answer in answers] == [10, 11, 12]
    assert i.device.disk[:1024] == b"b" * 512 + b"c" * 512


def test_the_numbers_wrap_around() -> None:
    i = Initiator(cmd_sn=0xFFFFFFFE)
    answers = i.give(b"".join(i.command(b"\0") for _ in range(4)))
    assert [answer.exp_cmd_sn for answer in answers] == [2] * 4
    assert answers[0].max_cmd_sn == WINDOW + 1


def test_the_window_closes_while_commands_wait_and_opens_when_they_are_done() -> None:
    i = Initiator()
    i.device.hold = True
    i.give(b"".join(i.command(b"\0") for _ in range(WINDOW)))
    (nop,) = i.give(i.pdu(iscsi.nop_out, target_tag=NO_TAG, immediate=True))
    assert nop.max_cmd_sn == nop.exp_cmd_sn - 1
    assert i.give(i.command(b"\0")) == []  # beyond the window: ignored
    i.device.let_go()
    assert i.answers()[-1].max_cmd_sn == 100 + WINDOW + WINDOW - 1


def test_immediate_commands_are_bounded_and_take_no_number() -> None:
    i = Initiator()
    i.device.hold = True
    answers = i.give(b"".join(i.command(b"\0", immediate=True) for _ in range(40)))
    assert [answer.reason for answer in answers] == [RejectReason.IMMEDIATE] * 8
    i.device.let_go()
    answers = i.answers()
    assert len(answers) == 32
    assert answers[-1].exp_cmd_sn == 100
    assert answers[-1].max_cmd_sn == 100 + WINDOW - 1


def test_a_tag_in_use_is_rejected() -> None:
    i = Initiator()
    i.device.hold = True
    (answer,) = i.give(i.command(b"\0", tag=5) + i.command(b"\0", tag=5))
    assert (answer.kind, answer.reason) == (Opcode.REJECT, RejectReason.TASK_IN_PROGRESS)
    assert answer.exp_cmd_sn == 102


# task management


def test_a_task_in_the_device_server_is_aborted_and_never_answered() -> None:
    i = Initiator()
    i.device.hold = True
    i.give(i.read(0, 1) + i.read(1, 1))
    answers = manage(i, TaskFunction.ABORT_TASK, referenced_tag=1)
    assert [(a.kind, a.response) for a in answers] == [(Opcode.TASK_RESPONSE, TaskResponse.COMPLETE)]
    i.device.let_go()
    assert [answer.tag for answer in i.answers()] == [2]


def test_a_task_that_waits_for_data_is_aborted_and_its_late_data_let_pass() -> None:
    i = Initiator()
    (r2t,) = i.give(i.write(0, 2, b"x" * 512))
    (answer,) = manage(i, TaskFunction.ABORT_TASK, referenced_tag=1)
    assert answer.response == TaskResponse.COMPLETE
    assert i.users() == 0
    assert i.give(i.data_out(1, r2t.target_tag, 0, 512, bytes(512), final=True)) == []
    assert i.device.aborts == []


def test_aborting_a_task_that_is_done_says_so_and_one_on_its_way_is_considered_received() -> None:
    i = Initiator()
    i.give(i.command(b"\0"))
    (answer,) = manage(i, TaskFunction.ABORT_TASK, referenced_tag=1, ref_cmd_sn=100)
    assert answer.response == TaskResponse.NO_TASK
    (answer,) = manage(i, TaskFunction.ABORT_TASK, referenced_tag=77, ref_cmd_sn=101, cmd_sn=102)
    assert answer.response == TaskResponse.COMPLETE
    (answer,) = i.give(i.command(b"\0", cmd_sn=102))  # 101 is taken for received
    assert answer.exp_cmd_sn == 103


@pytest.mark.parametrize(
    ("function", "response"),
    [(8, TaskResponse.NO_REASSIGN), (0, TaskResponse.NOT_SUPPORTED), (55, TaskResponse.NOT_SUPPORTED)],
)
def test_functions_that_are_not_for_us(function: int, response: TaskResponse) -> None:
    i = Initiator()
    (answer,) = manage(i, function)
    assert answer.response == response


def test_a_logical_unit_reset_ends_what_waits_there_and_asks_the_device_server() -> None:
    i = Initiator()
    i.give(i.write(0, 2))
    (answer,) = manage(i, TaskFunction.LOGICAL_UNIT_RESET)
    assert answer.response == TaskResponse.COMPLETE
    assert i.device.aborts == [(TaskFunction.LOGICAL_UNIT_RESET, 0, None)]
    assert i.session.in_flight == 0
    (answer,) = manage(i, TaskFunction.LOGICAL_UNIT_RESET, lun=9 << 48)
    assert answer.response == TaskResponse.NO_LUN


def test_a_reset_by_another_nexus_ends_what_waits_for_data_here() -> None:
    i = Initiator()
    i.give(i.write(0, 2) + i.write(1, 2))
    i.session.event(Event(EventKind.TASKS_CLEARED, 1))
    assert i.session.in_flight == 2
    i.session.event(Event(EventKind.TASKS_CLEARED, 0))
    assert i.session.in_flight == 0
    assert i.answers() == []


def test_a_cold_reset_ends_every_session() -> None:
    i = Initiator()
    (answer,) = manage(i, TaskFunction.TARGET_COLD_RESET)
    assert answer.response == TaskResponse.COMPLETE
    assert i.resets == 1


# the rest of the protocol


def test_a_ping_is_echoed_and_what_answers_ours_is_not() -> None:
    i = Initiator()
    (answer,) = i.give(i.pdu(iscsi.nop_out, b"hello", target_tag=NO_TAG))
    assert (answer.kind, answer.data, answer.target_tag, answer.stat_sn) == (Opcode.NOP_IN, b"hello", NO_TAG, 500)
    assert answer.exp_cmd_sn == 101
    assert i.give(i.pdu(iscsi.nop_out, tag=NO_TAG, target_tag=3)) == []


def test_an_echo_is_no_longer_than_the_initiator_takes() -> None:
    i = Initiator(Parameters(max_send_bytes=512))
    (answer,) = i.give(i.pdu(iscsi.nop_out, bytes(2048), target_tag=NO_TAG))
    assert len(answer.data) == 512


def test_a_silent_initiator_is_asked_and_one_that_stays_silent_is_dropped() -> None:
    i = Initiator()
    for _ in range(SILENT_TICKS + 1):
        i.session.tick()
    (ping,) = i.answers()
    assert (ping.kind, ping.tag) == (Opcode.NOP_IN, NO_TAG)
    assert ping.target_tag != NO_TAG
    i.give(i.pdu(iscsi.nop_out, tag=NO_TAG, target_tag=ping.target_tag, immediate=True))
    for _ in range(SILENT_TICKS + 1):
        i.session.tick()
    assert i.ended == 0
    for _ in range(SILENT_TICKS):
        i.session.tick()
    assert i.stream.closed
    assert [nexus.initiator_name for nexus in i.device.lost] == [INITIATOR]


def test_logout_is_answered_and_ends_the_session_once() -> None:
    i = Initiator()
    i.device.hold = True
    (answer,) = i.give(i.read(0, 1) + i.pdu(iscsi.logout_request, reason=0x80, cid=0))
    assert (answer.kind, answer.response, answer.exp_cmd_sn) == (Opcode.LOGOUT_RESPONSE, 0, 102)
    assert i.stream.finished
    assert i.ended == 1
    assert i.session.in_flight == 0


@pytest.mark.parametrize(("reason", "cid", "response"), [(1, 8, 1), (2, 7, 2)])
def test_a_logout_that_means_another_connection_or_recovery_is_answered_no(
    reason: int, cid: int, response: int
) -> None:
    i = Initiator()
    (answer,) = i.give(i.pdu(iscsi.logout_request, reason=0x80 | reason, cid=cid))
    assert answer.response == response
    assert not i.stream.finished


def test_send_targets_comes_in_parts_that_the_initiator_can_take() -> None:
    parameters = Parameters(max_send_bytes=512)
    i = Initiator(parameters, discovery=True)
    parameters.max_send_bytes = 40
    request: dict[str, Any] = {"flags": 0x80, "immediate": True}
    (answer,) = i.give(i.pdu(iscsi.text_request, b"SendTargets=All\0", target_tag=NO_TAG, **request))
    text = answer.data
    while answer.flags & 0x40:
        assert answer.flags == 0x40
        (answer,) = i.give(i.pdu(iscsi.text_request, target_tag=answer.target_tag, **request))
        text += answer.data
    assert (answer.flags, answer.target_tag) == (0x80, NO_TAG)
    assert text == (
        f"TargetName={TARGET}\0TargetAddress=127.0.0.1:3260,1\0TargetAddress=[::1]:3260,2\0".encode()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (b"SendTargets=Alle\0", b"SendTargets=Reject\0"),
        (b"SendTargetsPlease=All\0", b"SendTargetsPlease=NotUnderstood\0"),
        (b"MaxBurstLength=512\0", b"MaxBurstLength=Reject\0"),
        (b"MaxRecvDataSegmentLength=4096\0", b""),
    ],
)
def test_text_in_the_full_feature_phase(given: bytes, answer: bytes) -> None:
    i = Initiator()
    (found,) = i.give(i.pdu(iscsi.text_request, given, flags=0x80, target_tag=NO_TAG))
    assert found.data == answer


@pytest.mark.parametrize(
    ("flags", "target_tag", "data"),
    [(0x80, 5, b""), (0xC0, NO_TAG, b"SendTargets="), (0x80, NO_TAG, b"junk\0"), (0x80, NO_TAG, b"A=1\0A=1\0")],
)
def test_text_that_makes_no_sense_is_rejected(flags: int, target_tag: int, data: bytes) -> None:
    i = Initiator()
    (found,) = i.give(i.pdu(iscsi.text_request, data, flags=flags, target_tag=target_tag))
    assert (found.kind, found.reason) == (Opcode.REJECT, RejectReason.PROTOCOL_ERROR)


def test_a_discovery_session_has_no_scsi() -> None:
    i = Initiator(discovery=True)
    for raw in (i.read(0, 1), i.pdu(iscsi.task_request, function=0x82, referenced_tag=0, ref_cmd_sn=0, exp_data_sn=0)):
        (answer,) = i.give(raw)
        assert answer.kind == Opcode.REJECT
    assert not i.device.begun
    assert not i.device.executed


@pytest.mark.parametrize(
    ("opcode", "reason"),
    [(0x07, RejectReason.NOT_SUPPORTED), (0x21, RejectReason.NOT_SUPPORTED), (0x10, RejectReason.SNACK)],
)
def test_opcodes_that_are_not_for_us_are_rejected(opcode: int, reason: RejectReason) -> None:
    i = Initiator()
    raw = bytearray(i.command(b"\0"))
    raw[0] = opcode
    (answer,) = i.give(bytes(raw))
    assert (answer.kind, answer.reason, answer.data) == (Opcode.REJECT, reason, bytes(raw))


def test_a_segment_that_is_too_long_ends_the_connection() -> None:
    i = Initiator()
    raw = bytearray(i.command(b"\0"))
    raw[5] = 0xFF
    i.give(bytes(raw))
    assert i.stream.closed
    assert i.ended == 1


@pytest.mark.parametrize(("header", "data"), [(True, False), (False, True), (True, True)])
def test_digests_go_both_ways(header: bool, data: bool) -> None:
    i = Initiator(
        Parameters(initial_r2t=False, header_digest=header, data_digest=data, max_send_bytes=700, max_recv_bytes=4096)
    )
    content = random.Random(5).randbytes(1024)
    (done,) = i.give(i.write(0, 2, content))
    assert done.status == 0
    answers = i.give(i.read(0, 2) + i.command(b"\xff", flags=0xC0, expected=4))
    assert b"".join(answer.data for answer in answers[:2]) == content
    assert answers[2].status == 2


def test_wrong_data_digests_are_rejected_and_a_write_that_lost_data_fails() -> None:
    i = Initiator(Parameters(initial_r2t=False, data_digest=True, max_recv_bytes=4096))
    raw = bytearray(i.write(0, 2, bytes(512)))
    raw[50] ^= 1
    (answer,) = i.give(bytes(raw))
    assert (answer.kind, answer.reason, answer.exp_cmd_sn) == (Opcode.REJECT, RejectReason.DATA_DIGEST, 100)
    i.cmd_sn = 100  # the same again
    (r2t,) = i.give(i.write(0, 2, bytes(512), tag=1))
    raw = bytearray(i.data_out(1, r2t.target_tag, 0, 512, bytes(512), final=True))
    raw[50] ^= 1
    reject, response = i.give(bytes(raw))
    assert reject.reason == RejectReason.DATA_DIGEST
    assert (response.status, response.data[14:16]) == (2, b"\x47\x05")


def test_an_extended_cdb_and_a_bidirectional_read_length_reach_the_task() -> None:
    i = Initiator()
    i.device.hold = True
    segments = b"\0\x05\x01\0ABCD" + b"\0\x05\x02\0\0\0\x10\0"
    i.give(
        i.pdu(iscsi.scsi_command, b"x" * 8, segments, flags=0xE0, expected_bytes=8, cdb=write10(0, 1).ljust(16, b"\0"))
    )
    task: Task = i.device.held[0]
    assert task.cdb[16:] == b"ABCD"
    assert (task.expected_in_bytes, task.expected_out_bytes) == (4096, 8)


# flow


def test_nothing_is_executed_while_the_initiator_takes_nothing() -> None:
    i = Initiator()
    i.stream.stuck = True
    i.give(i.read(0, 1024))  # 512 KiB
    assert i.stream.queued_bytes >= QUEUED_LIMIT_BYTES
    assert i.stream.paused
    i.give(i.read(0, 1))
    assert len(i.device.executed) == 1
    i.stream.queued_bytes, i.stream.stuck = 0, False
    i.session.drained()
    assert len(i.device.executed) == 2
    assert not i.stream.paused


def test_many_large_reads_are_begun_in_helpings() -> None:
    i = Initiator()
    i.give(b"".join(i.read(0, 1024) for _ in range(8)))
    assert [len(tasks) for tasks in i.device.executed] == [2, 2, 2, 2]


def test_a_full_device_server_stops_the_reading() -> None:
    i = Initiator()
    i.device.congested = True
    i.give(i.command(b"\0"))
    assert i.stream.paused
    i.device.congested = False
    i.device.resumes.pop()()
    assert not i.stream.paused


# the end


def test_a_lost_session_gives_everything_back() -> None:
    i = Initiator()
    i.device.hold = True
    i.give(i.write(0, 1, bytes(512)) + i.write(0, 2, bytes(512)) + i.write(0, 1, bytes(512), cmd_sn=110))
    i.session.end()
    i.session.end()
    assert i.ended == 1
    assert i.users() == 0
    assert i.session.in_flight == 0


def test_stop_asks_for_a_logout_and_a_drop_says_so() -> None:
    i = Initiator()
    i.session.stop()
    i.session.dropped("test")
    answers = i.answers()
    assert [answer.event for answer in answers] == [AsyncEvent.LOGOUT_REQUESTED, AsyncEvent.SESSION_DROPPED]
    assert i.stream.finished


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_input_raises_or_leaks(data: st.DataObject) -> None:
    """Requests of all kinds with fields of any value, in any order."""
    i = Initiator(Parameters(initial_r2t=data.draw(st.booleans()), max_recv_bytes=2048, max_burst_bytes=2048))
    small = st.integers(0, 3) | st.just(NO_TAG)
    for _ in range(data.draw(st.integers(1, 12))):
        raw = bytearray(48)
        raw[0] = data.draw(st.sampled_from([0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10, 0x40, 0x41, 0x42, 0x3F]))
        raw[1] = data.draw(st.sampled_from([0x80, 0xA0, 0xC0, 0xE0, 0x20, 0x81, 0x85, 0x40]) | st.integers(0, 255))
        body = data.draw(st.binary(max_size=64) | st.sampled_from([bytes(512), bytes(2048), b"SendTargets=All\0"]))
        segments = data.draw(st.sampled_from([b"", b"\0\5\1\0ABCD", b"\0\0\1\0"]))
        raw[4] = len(segments) // 4
        raw[5:8] = len(body).to_bytes(3, "big")
        raw[16:20] = data.draw(small).to_bytes(4, "big")
        raw[20:24] = data.draw(small | st.sampled_from([512, 1024, 4096])).to_bytes(4, "big")
        cmd_sn = i.session._answers.exp_cmd_sn + data.draw(st.sampled_from([0, 0, 0, 0, 1, 2, -1, 500]))
        raw[24:28] = (cmd_sn & 0xFFFFFFFF).to_bytes(4, "big")
        raw[32:48] = data.draw(
            st.sampled_from([write10(0, 1), write10(0, 4), b"\x28\0\0\0\0\0\0\0\x02\0", b"\0", bytes(16)])
        ).ljust(16, b"\0")
        if raw[0] == 0x05:
            raw[36:40] = data.draw(small).to_bytes(4, "big")
            raw[40:44] = data.draw(st.sampled_from([0, 512, 1024])).to_bytes(4, "big")
        i.give(bytes(raw) + segments + body + bytes(-len(body) % 4))
        if i.session.over:
            break
    i.session.end()
    assert i.users() == 0
    assert i.session.in_flight == 0
    assert i.ended == 1
