"""Persistent reservations, RESERVE(6), and how both are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Op, WriteFlag
from blockrepl.errors import DamagedError
from blockrepl.formats.scsi_reservation import ALL_REGISTRANTS, EXCLUSIVE_ACCESS, REGISTRANTS, OutAction, Type
from blockrepl.frontends.iscsi.scsi.commands import COMMANDS, Access
from blockrepl.frontends.iscsi.scsi.refusal import Refusal
from blockrepl.frontends.iscsi.scsi.reservations import Registration, Request, Reservations, perform
from blockrepl.frontends.iscsi.task import transport_id
from tests.frontends.iscsi.scsi.rig import BLOCK, Initiator, MemoryVolume, Rig, io_error
from tests.frontends.iscsi.scsi.test_transfer import cdb, pattern

TYPES = [kind for kind in Type if kind != Type.NONE]
CONFLICT = 0x18


def out(action: int, kind: int = 0, key: int = 0, action_key: int = 0, flags: int = 0) -> tuple[str, bytes]:
    data = key.to_bytes(8, "big") + action_key.to_bytes(8, "big") + bytes(4) + bytes([flags]) + bytes(3)
    return f"5f {action:02x} {kind:02x} 0000 00000018 00", data


def register(host: Initiator, key: int, old: int = 0) -> None:
    host.ok(*out(OutAction.REGISTER, key=old, action_key=key))


def keys(host: Initiator) -> list[int]:
    data = host.ok("5e 00 0000000000 0400 00")
    return [int.from_bytes(data[at : at + 8], "big") for at in range(8, len(data), 8)]


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def one(rig: Rig) -> Initiator:
    return Initiator(rig, "one")


@pytest.fixture
def two(rig: Rig, one: Initiator) -> Initiator:
    return Initiator(rig, "two")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("opcode", ["28", "88", "a8", "2a", "8a", "aa"])
def test_who_may_do_what_under_a_reservation(
    one: Initiator, two: Initiator, kind: Type, registered: bool, opcode: str
) -> None:
    register(one, 1)
    if registered:
        register(two, 2)
    one.ok(*out(OutAction.RESERVE, kind, 1))
    is_write = opcode in ("2a", "8a", "aa")
    allowed = (registered and kind in REGISTRANTS) or (not is_write and kind not in EXCLUSIVE_ACCESS)

    def access(host: Initiator) -> int:
        command = cdb(opcode, 0, 1)
        return (host.send(command, pattern(1)) if is_write else host.send(command, room=BLOCK)).status

    assert access(one) == 0
    assert access(two) == (0 if allowed else CONFLICT)
    one.ok(*out(OutAction.RELEASE, kind, 1))
    two.clear()
    assert access(two) == 0


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_every_command_of_others_respects_exclusive_access_as_the_table_says(
    one: Initiator, two: Initiator, command: object
) -> None:
    register(one, 1)
    one.ok(*out(OutAction.RESERVE, Type.EXCLUSIVE_ACCESS, 1))
    raw = bytes([command.opcode, command.service_action or 0]).ljust(16, b"\0")  # type: ignore[attr-defined]
    conflicts = two.send(raw).status == CONFLICT
    access = command.access  # type: ignore[attr-defined]
    if access == Access.PERSISTENT or command.name == "START_STOP_UNIT":  # type: ignore[attr-defined]
        return
    assert conflicts == (access in (Access.READ, Access.WRITE, Access.RESERVATION))


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_every_command_of_others_respects_reserve_6(one: Initiator, two: Initiator, command: object) -> None:
    one.ok("16 00 0000 00 00")
    raw = bytes([command.opcode, command.service_action or 0]).ljust(16, b"\0")  # type: ignore[attr-defined]
    free = command.access == Access.FREE  # type: ignore[attr-defined]
    assert (two.send(raw).status == CONFLICT) == (not free)


def test_reserve_6_ends_with_its_release_its_nexus_or_a_reset(rig: Rig, one: Initiator, two: Initiator) -> None:
    one.ok("16" + "00" * 5)
    two.ok("17" + "00" * 5)  # not its own: nothing happens
    assert two.send("00" * 6).status == CONFLICT
    one.ok("17" + "00" * 5)
    two.ok("16" + "00" * 5)
    rig.target.nexus_lost(two.nexus)
    one.ok("16" + "00" * 5)
    three = Initiator(rig, "three", ready=False)
    assert three.abort(5) == [0]
    three.clear()
    three.ok(cdb("28", 0, 1), room=BLOCK)


def test_a_change_is_durable_before_it_is_answered_and_holds(rig: Rig, one: Initiator, two: Initiator) -> None:
    rig.volume.slow = True
    first = one.send(*out(OutAction.REGISTER, action_key=7))
    second = two.send(*out(OutAction.REGISTER, action_key=8))
    assert first not in one.done
    assert keys(one) == []
    rig.volume.complete()
    assert first in one.done
    assert second not in two.done
    assert keys(one) == [7]
    rig.volume.complete()
    assert second in two.done
    assert rig.volume.batches[-1][0] == [Op.METADATA]
    assert rig.volume.batches[-1][3] == [WriteFlag.FUA]
    assert Reservations.unpack(rig.volume.kept) == rig.unit.reservations


def test_a_change_that_cannot_be_kept_does_not_hold(rig: Rig, one: Initiator) -> None:
    rig.volume.write_error = io_error()
    assert one.refused(*out(OutAction.REGISTER, action_key=7)) == (3, 0x0C00)
    assert keys(one) == []
    rig.volume.write_error = None
    register(one, 7)
    assert keys(one) == [7]


def test_registrations_and_reservation_are_those_of_the_volume_wherever_it_is_served(one: Initiator) -> None:
    register(one, 0xABCD)
    one.ok(*out(OutAction.RESERVE, Type.WRITE_EXCLUSIVE, 0xABCD))
    other = Rig()
    other.target.port_group = 9
    moved = MemoryVolume()
    moved.kept = one.rig.volume.kept
    other.unit.serve(moved)
    here, stranger = Initiator(other, "one"), Initiator(other, "two")
    assert keys(here) == [0xABCD]
    here.ok(cdb("2a", 0, 1), pattern(1))
    assert stranger.send(cdb("2a", 0, 1), pattern(1)).status == CONFLICT


def test_a_volume_whose_reservations_cannot_be_read_is_not_served(rig: Rig, one: Initiator) -> None:
    volume = MemoryVolume()
    volume.kept = b"BRPR" + bytes(3)
    rig.unit.serve(volume)
    one.send("00" * 6)
    assert one.refused("00" * 6) == (2, 0x040C)
    volume.kept = b""
    rig.unit.serve(volume)
    one.clear()
    one.ok(cdb("28", 0, 1), room=BLOCK)


def test_metadata_that_cannot_be_read_is_damage() -> None:
    with pytest.raises(DamagedError):
        Reservations.unpack(b"BRPR\0\2")
    with pytest.raises(DamagedError):
        Reservations.unpack(Reservations(1, 1, b"x" * 24, False, {b"x" * 24: Registration(1, 1)}).pack()[:-1])


PORTS = [transport_id(f"iqn.2026-11.org.blockrepl:h{n}", bytes(6)) for n in range(4)]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(OutAction)[:7]), st.sampled_from(PORTS), st.sampled_from(TYPES),
            st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 1, 4]),
        ),
        max_size=30,
    )
)  # fmt: skip
def test_any_sequence_keeps_the_invariants_and_survives_being_kept(
    steps: list[tuple[int, bytes, Type, int, int, int]],
) -> None:
    now = Reservations()
    for action, port, kind, key, action_key, flags in steps:
        request = Request(action, 0, kind, key, action_key, flags, port, 1)
        try:
            outcome = perform(now, request)
        except Refusal:
            continue
        assert port not in outcome.attentions
        now = outcome.after
        assert Reservations.unpack(now.pack()) == now
        if now.type == Type.NONE:
            assert now.holder == b""
        elif now.type in ALL_REGISTRANTS:
            assert now.holder == b""
            assert now.registrations
        else:
            assert now.holder in now.registrations


def test_preempt_takes_the_reservation_and_tells_who_lost(rig: Rig, one: Initiator, two: Initiator) -> None:
    register(one, 1)
    register(two, 2)
    one.ok(*out(OutAction.RESERVE, Type.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY, 1))
    two.ok(*out(OutAction.PREEMPT, Type.WRITE_EXCLUSIVE, 2, 1))
    assert one.refused("00" * 6) == (6, 0x2A05)
    assert keys(one) == [2]
    assert one.send(cdb("2a", 0, 1), pattern(1)).status == CONFLICT


def test_preempt_and_abort_ends_the_tasks_of_who_lost(rig: Rig, one: Initiator, two: Initiator) -> None:
    register(one, 1)
    register(two, 2)
    rig.volume.cold = True
    read = one.send(cdb("28", 0, 1), room=BLOCK)
    task = two.send(*out(OutAction.PREEMPT_AND_ABORT, Type.EXCLUSIVE_ACCESS, 2, 1))
    assert task not in two.done
    rig.volume.reads.popleft()()
    assert read.aborted
    assert task in two.done
    assert task.status == 0


def test_register_and_move_gives_the_reservation_to_another_port(rig: Rig, one: Initiator, two: Initiator) -> None:
    register(one, 1)
    one.ok(*out(OutAction.RESERVE, Type.WRITE_EXCLUSIVE, 1))
    port = two.nexus.transport_id
    data = (1).to_bytes(8, "big") + (5).to_bytes(8, "big") + b"\0\2\0\1" + len(port).to_bytes(4, "big") + port
    one.ok(f"5f 07 00 0000 {len(data):08x} 00", data)
    assert keys(two) == [5]
    two.ok(cdb("2a", 0, 1), pattern(1))
    assert one.send(cdb("2a", 0, 1), pattern(1)).status == CONFLICT


def test_release_tells_the_other_registrants(one: Initiator, two: Initiator) -> None:
    register(one, 1)
    register(two, 2)
    one.ok(*out(OutAction.RESERVE, Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, 1))
    assert one.refused(*out(OutAction.RELEASE, Type.WRITE_EXCLUSIVE, 1)) == (5, 0x2604)
    one.ok(*out(OutAction.RELEASE, Type.WRITE_EXCLUSIVE_ALL_REGISTRANTS, 1))
    assert two.refused("00" * 6) == (6, 0x2A04)
    assert two.send("00" * 6).status == 0


@pytest.mark.parametrize(
    ("command", "data", "sense"),
    [
        ("5f 00 00 0000 00000017 00", bytes(23), (5, 0x1A00)),
        ("5f 00 00 0000 00000018 00", bytes(10), (5, 0x1A00)),
        (*out(OutAction.REGISTER, flags=8), (5, 0x2600)),
        (*out(OutAction.RESERVE, 0x11, 1), (5, 0x2400)),
        (*out(OutAction.RESERVE, 0x02, 1), (5, 0x2400)),
        (*out(OutAction.PREEMPT, 0x01, 1, 0), (5, 0x2600)),
    ],
)
def test_a_parameter_list_that_is_wrong_is_refused(
    one: Initiator, command: str, data: bytes, sense: tuple[int, int]
) -> None:
    register(one, 1)
    assert one.refused(command, data) == sense


def test_full_status_and_capabilities(one: Initiator, two: Initiator) -> None:
    register(one, 1)
    two.ok(*out(OutAction.REGISTER, action_key=2, flags=5))
    one.ok(*out(OutAction.RESERVE, Type.WRITE_EXCLUSIVE, 1))
    data = one.ok("5e 03 0000000000 0400 00")
    assert int.from_bytes(data[4:8], "big") == len(data) - 8
    assert one.nexus.transport_id in data
    assert two.nexus.transport_id in data
    capabilities = one.ok("5e 02 0000000000 0400 00")
    assert capabilities == bytes([0, 8, 0x05, 0x91, 0xEA, 0x01, 0, 0])
