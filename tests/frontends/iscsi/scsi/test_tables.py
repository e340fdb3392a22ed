"""The table of commands, its handlers, and what is read off it."""

from __future__ import annotations

import pytest

from blockrepl.formats import scsi as layout
from blockrepl.formats.scsi import Opcode
from blockrepl.frontends.iscsi.scsi.commands import BY_KEY, COMMANDS, Access, Command, cdb_bytes, wrong_bits
from blockrepl.frontends.iscsi.scsi.geometry import DATA_OUT, address, data_out_bytes
from blockrepl.frontends.iscsi.scsi.handlers import HANDLERS
from tests.frontends.iscsi.scsi.rig import Initiator, Rig

IDS = [command.name for command in COMMANDS]


def plain_cdb(command: Command) -> bytes:
    cdb = bytearray(16)
    cdb[0] = command.opcode
    cdb[1] = command.service_action or 0
    return bytes(cdb)


def test_every_command_has_a_handler_and_every_handler_a_command() -> None:
    assert set(HANDLERS) == set(BY_KEY)
    assert len(BY_KEY) == len(COMMANDS)
    assert {command.opcode for command in COMMANDS} == set(Opcode)


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_the_usage_of_a_command_is_as_long_as_its_cdb_and_begins_with_its_codes(command: Command) -> None:
    assert len(command.usage) == cdb_bytes(command.opcode)
    assert command.usage[0] == command.opcode
    if command.service_action is not None:
        assert command.usage[1] & 0x1F == command.service_action


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_every_bit_outside_the_usage_is_refused_with_a_pointer_at_it(command: Command) -> None:
    rig = Rig()
    initiator = Initiator(rig, "a")
    for at in range(1, len(command.usage) - 1):
        for bit in range(8):
            if at == 1 and command.service_action is not None and bit < 5:
                continue
            cdb = bytearray(plain_cdb(command))
            cdb[at] |= 1 << bit
            assert (wrong_bits(command, bytes(cdb)) is None) == bool(command.usage[at] >> bit & 1)
            if not command.usage[at] >> bit & 1:
                task = initiator.send(bytes(cdb))
                assert (task.status, task.sense[2], task.sense[12:14]) == (2, 5, b"\x24\x00")
                assert task.sense[15:18] == bytes([0xC8 | bit]) + at.to_bytes(2, "big")


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_naca_is_refused_in_every_command(command: Command) -> None:
    cdb = bytearray(plain_cdb(command))
    cdb[len(command.usage) - 1] = 0x04
    assert Initiator(Rig(), "a").refused(bytes(cdb)) == (5, 0x2400)


def test_operation_codes_that_are_not_in_the_table_are_refused() -> None:
    initiator = Initiator(Rig(), "a")
    for opcode in set(range(256)) - {c.opcode for c in COMMANDS}:
        assert initiator.refused(bytes([opcode]).ljust(16, b"\0")) == (5, 0x2000)


def test_service_actions_that_are_not_in_the_table_are_refused() -> None:
    initiator = Initiator(Rig(), "a")
    for opcode in {c.opcode for c in COMMANDS if c.service_action is not None}:
        for action in range(32):
            if (opcode, action) not in BY_KEY:
                assert initiator.refused(bytes([opcode, action]).ljust(16, b"\0")) == (5, 0x2400)


@pytest.mark.parametrize("layout_name", ["cdb_10", "cdb_12", "cdb_16"])
def test_hot_cdb_structs_are_the_declared_ones(layout_name: str) -> None:
    declared = getattr(layout, layout_name)
    hot = getattr(layout, layout_name.upper())
    raw = bytes(range(1, declared.sizeof() + 1))
    assert list(hot.unpack(raw)) == [value for key, value in declared.parse(raw).items() if key != "_io"]


def test_addresses_are_found_where_the_declared_layouts_have_them() -> None:
    raw = bytes(range(1, 17))
    for opcode, declared in {
        Opcode.READ_6: layout.cdb_6, Opcode.WRITE_10: layout.cdb_10, Opcode.VERIFY_12: layout.cdb_12,
        Opcode.READ_16: layout.cdb_16, Opcode.COMPARE_AND_WRITE: layout.cdb_compare_and_write,
        Opcode.WRITE_ATOMIC_16: layout.cdb_write_atomic,
    }.items():  # fmt: skip
        fields = declared.parse(bytes([opcode]) + raw[1:])
        assert address(bytes([opcode]) + raw[1:]) == (fields.lba, fields.blocks)


def test_only_commands_that_write_or_select_take_data_and_all_that_do_are_known() -> None:
    for command in COMMANDS:
        cdb = bytes([command.opcode, command.service_action or 0] + [1] * 14)
        takes = command.opcode in DATA_OUT
        assert takes or data_out_bytes(cdb, 512) == 0
        if command.writes:
            assert takes, command


def test_commands_that_write_conflict_with_every_reservation() -> None:
    assert all(command.access == Access.WRITE for command in COMMANDS if command.writes)
