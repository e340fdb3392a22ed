"""What a unit says of itself, its states, task management, copies and sanitizing."""

from __future__ import annotations

import uuid

import pytest

from blockrepl.block import Op
from blockrepl.formats import scsi_inquiry, scsi_mode
from blockrepl.formats.scsi_copy import MAX_SEGMENTS, MAX_TARGETS
from blockrepl.frontends.iscsi.scsi.commands import COMMANDS
from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from blockrepl.frontends.iscsi.scsi.sanitize import RATE_BYTES_PER_S
from blockrepl.frontends.iscsi.scsi.unit import PathState
from blockrepl.frontends.iscsi.task import Event, EventKind, TaskFunction, TaskResponse
from tests.frontends.iscsi.scsi.rig import BLOCK, BLOCKS, Initiator, MemoryVolume, Rig, io_error
from tests.frontends.iscsi.scsi.test_modify import compare_and_write
from tests.frontends.iscsi.scsi.test_transfer import cdb, pattern

READY = "00" * 6


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def host(rig: Rig) -> Initiator:
    return Initiator(rig, "host")


def inquiry(page: int | None, room: int = 0xFF) -> str:
    return f"12 {page is not None:02x} {page or 0:02x} {room:04x} 00"


# identity and pages


def test_standard_inquiry_data_is_what_its_layout_says(host: Initiator) -> None:
    fields = scsi_inquiry.standard.parse(host.ok(inquiry(None)))
    assert fields.peripheral == 0
    assert fields.product == b"volume0         "
    assert host.ok(inquiry(None, 7)) == host.ok(inquiry(None))[:7]
    assert host.refused("12 00 80 00ff 00") == (5, 0x2400)


def test_every_page_listed_is_there_in_ascending_order_and_no_other(host: Initiator) -> None:
    listed = host.ok(inquiry(0))[4:]
    assert list(listed) == sorted(listed)
    for page in range(256):
        if page in listed:
            data = host.ok(inquiry(page, 0x400))
            assert (data[1], int.from_bytes(data[2:4], "big")) == (page, len(data) - 4)
        else:
            assert host.refused(inquiry(page)) == (5, 0x2400)


def test_identity_depends_on_group_and_volume_only() -> None:
    group = uuid.uuid4()
    here, there = UnitIdentity(group, 3, "a", 1 << 20, 512), UnitIdentity(group, 3, "a", 1 << 30, 512)
    assert (here.naa, here.serial) == (there.naa, there.serial)
    assert here.naa[0] >> 4 == 3
    assert UnitIdentity(group, 4, "a", 1 << 20, 512).naa != here.naa
    assert UnitIdentity(uuid.uuid4(), 3, "a", 1 << 20, 512).naa != here.naa


def test_capacity_is_told_three_ways(host: Initiator) -> None:
    assert host.ok("25" + "00" * 9) == (BLOCKS - 1).to_bytes(4, "big") + BLOCK.to_bytes(4, "big")
    long = host.ok("9e10 0000000000000000 00000020 0000")
    assert long[:12] == (BLOCKS - 1).to_bytes(8, "big") + BLOCK.to_bytes(4, "big")
    assert long[14] & 0xC0 == 0xC0  # thin, and what is unmapped reads as zeroes
    mode = host.ok("1a 00 3f 00 ff 00")
    assert mode[0] == len(mode) - 1
    assert mode[4:12] == BLOCKS.to_bytes(4, "big") + BLOCK.to_bytes(4, "big")


def test_growth_is_a_unit_attention(rig: Rig, host: Initiator) -> None:
    rig.volume.size_bytes += 1 << 20
    rig.unit.check_size()
    assert host.refused(cdb("28", 0, 1), room=BLOCK) == (6, 0x2A09)
    assert host.ok("25" + "00" * 9)[:4] == (BLOCKS + 2047).to_bytes(4, "big")


def test_luns_are_listed_and_nothing_is_behind_the_others(rig: Rig, host: Initiator) -> None:
    rig.add(300, MemoryVolume())
    data = host.ok("a0 00 00 000000 00000100 00 00", lun=7)
    assert data == bytes([0, 0, 0, 16, 0, 0, 0, 0]) + bytes(8) + b"\x41\x2c" + bytes(6)
    assert host.ok(inquiry(None), lun=7)[0] == 0x7F
    assert host.ok("03 00 0000 12 00", lun=7)[12:14] == b"\x25\x00"
    assert host.refused(READY, lun=7) == (5, 0x2500)
    assert host.refused(READY) == (6, 0x3F0E)


# mode pages


def control_page(*, descriptor: bool = False, protect: bool = False, aborted: bool = False) -> bytes:
    page: bytes = scsi_mode.control.build(
        {
            "sense": 4 if descriptor else 0, "queueing": 0x10, "protect": 8 if protect else 0,
            "aborts": 0x40 if aborted else 0, "self_test_s": 0,
        }
    )  # fmt: skip
    return page


def test_software_write_protect_holds_for_everybody_and_everybody_else_hears_of_it(rig: Rig, host: Initiator) -> None:
    other = Initiator(rig, "other")
    host.ok("15 10 0000 10 00", bytes(4) + control_page(protect=True))
    assert other.refused(READY) == (6, 0x2A01)
    for command in COMMANDS:
        if command.writes and command.service_action is None:
            assert host.refused(bytes([command.opcode]).ljust(16, b"\0")) == (7, 0x2702)
    assert host.ok("1a 08 0a 00 ff 00")[2] & 0x80
    host.ok("55 10 0000000000 0014 00", bytes(8) + control_page())
    host.ok(cdb("2a", 0, 1), pattern(1))


def test_sense_data_come_as_descriptors_when_that_is_asked_for(host: Initiator) -> None:
    host.ok("15 10 0000 10 00", bytes(4) + control_page(descriptor=True))
    task = host.send(cdb("88", BLOCKS, 1), room=BLOCK)
    assert task.sense[:4] == b"\x72\x05\x21\x00"
    host.ok(cdb("2a", 0, 1), pattern(1))
    task = host.send(compare_and_write(0, 1), bytes(2 * BLOCK))
    assert task.sense[8:12] == b"\x00\x0a\x80\x00"


@pytest.mark.parametrize(
    ("command", "data", "sense"),
    [
        ("15 00 0000 10 00", bytes(4) + control_page(), 0x2400),
        ("15 11 0000 10 00", bytes(4) + control_page(), 0x2400),
        ("15 10 0000 03 00", bytes(3), 0x1A00),
        ("15 10 0000 0f 00", bytes(4) + control_page()[:11], 0x1A00),
        ("15 10 0000 10 00", bytes(4) + b"\x0b" + control_page()[1:], 0x2600),
        ("15 10 0000 10 00", bytes(4) + control_page()[:2] + b"\x20" + control_page()[3:], 0x2600),
    ],
)
def test_a_mode_select_that_is_wrong_changes_nothing(host: Initiator, command: str, data: bytes, sense: int) -> None:
    before = host.ok("1a 08 3f 00 ff 00")
    assert host.refused(command, data) == (5, sense)
    assert host.ok("1a 08 3f 00 ff 00") == before


def test_changeable_and_default_values_are_told_and_saved_ones_are_not(host: Initiator) -> None:
    changeable = host.ok("1a 08 4a 00 ff 00")[4:]
    assert changeable == bytes.fromhex("0a0a 04 00 08 40 0000 0000 0000")
    assert host.ok("1a 08 8a 00 ff 00")[4:] == control_page()
    assert host.refused("1a 08 ca 00 ff 00") == (5, 0x3900)
    assert host.refused("1a 08 05 00 ff 00") == (5, 0x2400)


# states


@pytest.mark.parametrize(
    ("state", "asc"), [(PathState.STANDBY, 0x040B), (PathState.UNAVAILABLE, 0x040C)]
)  # fmt: skip
@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_a_port_that_does_not_serve_refuses_all_but_a_few_commands(
    rig: Rig, host: Initiator, state: PathState, asc: int, command: object
) -> None:
    rig.unit.withdraw(state)
    assert host.refused(READY) == (6, 0x2A06)
    raw = bytes([command.opcode, command.service_action or 0]).ljust(16, b"\0")  # type: ignore[attr-defined]
    task = host.send(raw)
    not_ready = task.status == 2 and (task.sense[2], int.from_bytes(task.sense[12:14], "big")) == (2, asc)
    assert not_ready != command.anywhere  # type: ignore[attr-defined]


def test_port_groups_are_reported_with_their_states(rig: Rig, host: Initiator) -> None:
    data = host.ok("a30a 00000000 00000100 0000")
    assert int.from_bytes(data[:4], "big") == len(data) - 4 == 24
    assert [data[4] & 0xF, data[16] & 0xF] == [0, 2]
    assert [data[6:8], data[18:20]] == [b"\0\1", b"\0\2"]
    rig.unit.withdraw(PathState.UNAVAILABLE)
    host.send(READY)
    assert host.ok("a32a 00000000 00000100 0000")[8] & 0xF == 3


def test_a_stopped_unit_refuses_its_medium_until_it_is_started(rig: Rig, host: Initiator) -> None:
    host.ok("1b 00 0000 00 00")
    assert rig.volume.flushes == 1
    assert host.refused(cdb("28", 0, 1), room=BLOCK) == (2, 0x0402)
    assert host.ok("03 00 0000 12 00")[12:14] == b"\x04\x02"
    host.ok("1b 00 0000 01 00")
    host.ok(cdb("28", 0, 1), room=BLOCK)
    assert host.refused("1b 00 0000 02 00") == (5, 0x2400)
    assert host.refused("1b 00 0000 31 00") == (5, 0x2400)


# unit attentions and task management


def test_a_new_nexus_hears_of_the_reset_once_and_inquiry_does_not_care(rig: Rig) -> None:
    host = Initiator(rig, "new", ready=False)
    host.ok(inquiry(None))
    host.ok("a0 00 00 000000 00000100 00 00")
    assert host.refused(cdb("2a", 0, 1), pattern(1)) == (6, 0x2900)
    host.ok(cdb("2a", 0, 1), pattern(1))


def test_request_sense_takes_the_unit_attention(rig: Rig) -> None:
    host = Initiator(rig, "new", ready=False)
    assert host.ok("03 00 0000 12 00")[2:14:10] == b"\x06\x29"
    host.ok(READY)


def test_an_aborted_write_ends_without_a_status_when_the_volume_is_done(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    task = host.send(cdb("2a", 0, 1), pattern(1))
    responses = host.abort(TaskFunction.ABORT_TASK, tag=task.tag)
    assert responses == []
    rig.volume.complete()
    assert responses == [TaskResponse.COMPLETE]
    assert task.aborted
    assert host.abort(TaskFunction.ABORT_TASK, tag=task.tag) == [TaskResponse.NO_TASK]
    assert host.abort(TaskFunction.ABORT_TASK, lun=9, tag=1) == [TaskResponse.NO_LUN]


def test_what_waits_for_an_ordered_task_is_aborted_without_effect(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    host.send(cdb("2a", 0, 1), pattern(1))
    ordered = host.send(cdb("2a", 0, 1), pattern(1, 2), attribute=2)
    assert host.abort(TaskFunction.ABORT_TASK, tag=ordered.tag) == [TaskResponse.COMPLETE]
    rig.volume.complete()
    assert not rig.volume.waiting
    assert rig.volume.data[:BLOCK] == pattern(1)


@pytest.mark.parametrize("told", [False, True])
def test_clear_task_set_ends_the_tasks_of_all(rig: Rig, host: Initiator, told: bool) -> None:
    other = Initiator(rig, "other")
    host.ok("15 10 0000 10 00", bytes(4) + control_page(aborted=told))
    other.clear()
    rig.volume.slow = True
    events: list[Event] = []
    rig.target.on_event = lambda _, event: events.append(event)
    task = other.send(cdb("2a", 0, 1), pattern(1))
    responses = host.abort(TaskFunction.CLEAR_TASK_SET)
    rig.volume.complete()
    assert responses == [TaskResponse.COMPLETE]
    assert (task.aborted, task.status) == ((False, 0x40) if told else (True, 0))
    assert [(event.kind, event.lun) for event in events] == [(EventKind.TASKS_CLEARED, 0)]
    if not told:
        assert other.refused(READY) == (6, 0x2F00)


@pytest.mark.parametrize("function", [5, 6, 7])
def test_a_reset_waits_for_the_tasks_and_everybody_hears_of_it(rig: Rig, host: Initiator, function: int) -> None:
    other = Initiator(rig, "other")
    rig.volume.slow = True
    task = other.send(cdb("2a", 0, 1), pattern(1))
    responses = host.abort(function)
    assert responses == []
    rig.volume.complete()
    assert responses == [TaskResponse.COMPLETE]
    assert task.aborted
    assert host.refused(READY) == (6, 0x2900)
    assert other.refused(READY) == (6, 0x2900)


def test_a_lost_nexus_leaves_nothing_behind(rig: Rig, host: Initiator) -> None:
    rig.volume.slow = True
    task = host.send(cdb("2a", 0, 1), pattern(1))
    waiting = host.send(compare_and_write(0, 1), bytes(2 * BLOCK))
    rig.target.nexus_lost(host.nexus)
    rig.volume.complete(len(rig.volume.waiting))
    rig.turn()
    assert task.aborted
    assert waiting.aborted
    assert rig.unit.outstanding() == []
    assert not rig.unit.ranges.granted


# copies


def target_descriptor(naa: bytes) -> bytes:
    return b"\xe4\0\0\0" + bytes([1, 3, 0, len(naa)]) + naa.ljust(20, b"\0") + b"\0" + BLOCK.to_bytes(3, "big")


def block_segment(source: int, destination: int, count: int, lba: int, to: int) -> bytes:
    return (
        b"\x02\0\0\x18" + source.to_bytes(2, "big") + destination.to_bytes(2, "big") + bytes(2)
        + count.to_bytes(2, "big") + lba.to_bytes(8, "big") + to.to_bytes(8, "big")
    )  # fmt: skip


def copy_command(targets: list[bytes], segments: list[bytes], list_id: int = 1) -> tuple[str, bytes]:
    one, two = b"".join(targets), b"".join(segments)
    data = bytes([list_id, 0]) + len(one).to_bytes(2, "big") + bytes(4) + len(two).to_bytes(4, "big") + bytes(4)
    data += one + two
    return f"8300 0000000000000000 {len(data):08x} 0000", data


def test_a_copy_goes_from_unit_to_unit_and_its_result_can_be_asked_for(rig: Rig, host: Initiator) -> None:
    other = rig.add(1, MemoryVolume())
    host.clear()
    host.ok(cdb("2a", 0, 64), pattern(64))
    targets = [target_descriptor(rig.unit.identity.naa), target_descriptor(other.identity.naa)]
    host.ok(*copy_command(targets, [block_segment(0, 1, 32, 0, 100), block_segment(0, 0, 32, 32, 200)]))
    assert isinstance(other.volume, MemoryVolume)
    assert other.volume.data[100 * BLOCK : 132 * BLOCK] == pattern(64)[: 32 * BLOCK]
    assert rig.volume.data[200 * BLOCK : 232 * BLOCK] == pattern(64)[32 * BLOCK :]
    status = host.ok("8400 01 00000000000000 00000100 0000")
    assert (status[4], status[5:7]) == (1, b"\0\2")
    assert host.refused("8400 02 00000000000000 00000100 0000") == (5, 0x2400)
    parameters = host.ok("8403 0000000000000000 00000100 0000")
    assert int.from_bytes(parameters[:4], "big") == len(parameters) - 4


def test_copies_that_cannot_be_made_are_refused_before_anything_is_copied(rig: Rig, host: Initiator) -> None:
    own = target_descriptor(rig.unit.identity.naa)
    good = block_segment(0, 0, 8, 0, 100)
    host.ok(cdb("2a", 0, 8), pattern(8))
    for targets, segments, sense in (
        ([own], [good, block_segment(0, 1, 8, 0, 100)], (0xA, 0x0D02)),
        ([target_descriptor(b"\x30" + bytes(7))], [good], (0xA, 0x0D02)),
        ([own], [good, block_segment(0, 0, 8, 0, BLOCKS - 1)], (0xA, 0x0000)),
        ([own], [b"\x03" + good[1:]], (5, 0x2609)),
        ([b"\xe0" + own[1:]], [good], (5, 0x2607)),
        ([own] * (MAX_TARGETS + 1), [good], (5, 0x2606)),
        ([own], [good] * (MAX_SEGMENTS + 1), (5, 0x2608)),
    ):
        assert host.refused(*copy_command(targets, segments)) == sense
    command, data = copy_command([own], [good])
    assert host.refused(command, data[:-1]) == (5, 0x1A00)
    assert rig.volume.data[100 * BLOCK : 108 * BLOCK] == bytes(8 * BLOCK)
    rig.volume.write_error = io_error()
    assert host.refused(command, data) == (0xA, 0x0000)


# sanitize


def overwrite(pattern_: bytes, how: int = 1, immediate: bool = False) -> tuple[str, bytes]:
    data = bytes([how, 0]) + len(pattern_).to_bytes(2, "big") + pattern_
    return f"48 {0x81 if immediate else 1:02x} 0000000000 {len(data):04x} 00", data


def test_an_overwrite_passes_over_everything_at_its_rate_and_only_a_few_commands_pass_it(
    rig: Rig, host: Initiator
) -> None:
    host.ok(cdb("2a", 0, 8), pattern(8))
    task = host.send(*overwrite(b"abc"))
    assert task not in host.done
    assert host.refused(READY) == (2, 0x041B)
    assert host.refused(cdb("28", 0, 1), room=BLOCK) == (2, 0x041B)
    host.ok(inquiry(None))
    assert host.ok("03 00 0000 12 00")[2:14:10] == b"\x02\x04"
    assert 0 < rig.timers[0][0] <= (1 << 20) / RATE_BYTES_PER_S
    rig.pass_time()
    assert task in host.done
    block = (b"abc" * 171)[:BLOCK]
    assert rig.volume.data == block * BLOCKS
    host.ok(cdb("28", 0, 1), room=BLOCK)


def test_a_sanitize_survives_abortion_and_reset(rig: Rig, host: Initiator) -> None:
    task = host.send(*overwrite(bytes(BLOCK), how=0x82))
    assert host.abort(TaskFunction.ABORT_TASK, tag=task.tag) == [TaskResponse.COMPLETE]
    assert task.aborted
    assert host.abort(TaskFunction.LOGICAL_UNIT_RESET) == [TaskResponse.COMPLETE]
    host.send(READY)
    assert host.refused(READY) == (2, 0x041B)
    rig.pass_time()
    host.ok(READY)
    assert rig.volume.data == b"\xff" * BLOCK * BLOCKS  # the second pass, inverted


def test_block_erase_unmaps_everything(rig: Rig, host: Initiator) -> None:
    host.ok(cdb("2a", 0, 64), pattern(64))
    host.ok("48 02 0000000000 0000 00")
    rig.pass_time()
    assert {op for ops, *_ in rig.volume.batches[1:] for op in ops} == {Op.TRIM}
    assert rig.volume.data == bytes(BLOCK * BLOCKS)
    assert not rig.volume.mapped


def test_a_sanitize_that_fails_is_ended_by_another_or_by_leave_to_exit(rig: Rig, host: Initiator) -> None:
    rig.volume.write_error = io_error()
    assert host.refused("48 02 0000000000 0000 00") == (3, 0x3103)
    assert host.refused(cdb("28", 0, 1), room=BLOCK) == (3, 0x3103)
    assert host.refused("48 1f 0000000000 0000 00") == (5, 0x2400)
    assert host.refused("48 22 0000000000 0000 00") == (3, 0x3103)
    host.ok("48 1f 0000000000 0000 00")
    host.ok(READY)
    assert host.refused("48 22 0000000000 0000 00") == (3, 0x3103)
    rig.volume.write_error = None
    host.ok("48 02 0000000000 0000 00")
    rig.pass_time()
    host.ok(READY)


@pytest.mark.parametrize(
    ("command", "data"),
    [
        ("48 02 0000000000 0008 00", bytes(8)),
        ("48 1f 0000000000 0008 00", bytes(8)),
        ("48 01 0000000000 0004 00", bytes(4)),
        overwrite(bytes(BLOCK + 1)),
        overwrite(bytes(BLOCK), how=0),
        overwrite(bytes(BLOCK), how=0x21),
        (overwrite(bytes(BLOCK))[0], bytes([1, 0, 0, 9]) + bytes(BLOCK)),
    ],
)
def test_a_sanitize_that_is_wrong_is_refused(host: Initiator, command: str, data: bytes) -> None:
    key, asc = host.refused(command, data)
    assert (key, asc) in ((5, 0x2400), (5, 0x2600))
    host.ok(READY)
