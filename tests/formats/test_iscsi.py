from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import DATA_OUT, LENGTHS, SCSI_COMMAND, WORDS, Opcode, first_word, pack_headers

WORD = st.integers(0, 0xFFFFFFFF)
LONG = st.integers(0, (1 << 64) - 1)
BYTE = st.integers(0, 255)
DATA_BYTES = st.integers(0, (1 << 24) - 1)


@given(BYTE, BYTE, DATA_BYTES, LONG, WORD, WORD, WORD, WORD, st.binary(min_size=16, max_size=16))
def test_the_struct_of_a_command_says_what_its_construct_declaration_says(
    flags: int, words: int, size: int, lun: int, tag: int, expected: int, cmd_sn: int, stat_sn: int, cdb: bytes
) -> None:
    fields = {
        "flags": flags, "ahs_words": words, "data_bytes": size, "lun": lun, "tag": tag, "expected_bytes": expected,
        "cmd_sn": cmd_sn, "exp_stat_sn": stat_sn, "cdb": cdb,
    }  # fmt: skip
    header = iscsi.scsi_command.build(fields)
    lengths = words << 24 | size
    assert SCSI_COMMAND.unpack(header) == (1, flags, 0, lengths, lun, tag, expected, cmd_sn, stat_sn, cdb)
    assert LENGTHS.unpack_from(header) == (lengths,)


@given(BYTE, DATA_BYTES, LONG, WORD, WORD, WORD, WORD, WORD)
def test_the_struct_of_data_out_says_what_its_construct_declaration_says(
    flags: int, size: int, lun: int, tag: int, target_tag: int, stat_sn: int, data_sn: int, offset: int
) -> None:
    header = iscsi.data_out.build(
        {
            "flags": flags, "data_bytes": size, "lun": lun, "tag": tag, "target_tag": target_tag,
            "exp_stat_sn": stat_sn, "data_sn": data_sn, "offset_bytes": offset,
        }
    )  # fmt: skip
    assert DATA_OUT.unpack(header) == (5, flags, 0, size, lun, tag, target_tag, 0, stat_sn, 0, data_sn, offset, 0)


@given(st.lists(WORD, min_size=10, max_size=10), BYTE, BYTE, DATA_BYTES)
def test_words_build_what_the_construct_declarations_build(
    values: list[int], flags: int, status: int, size: int
) -> None:
    tag, stat_sn, exp, most, number, offset, last, lun, target_tag, _ = values
    numbers = {"tag": tag, "stat_sn": stat_sn, "exp_cmd_sn": exp, "max_cmd_sn": most}
    data_in = iscsi.data_in.build(
        {
            **numbers, "flags": flags, "status": status, "data_bytes": size, "target_tag": target_tag,
            "data_sn": number, "offset_bytes": offset, "residual_bytes": last,
        }
    )  # fmt: skip
    word = first_word(Opcode.DATA_IN, flags, 0, status)
    assert data_in == WORDS.pack(word, size, 0, 0, tag, target_tag, stat_sn, exp, most, number, offset, last)
    response = iscsi.scsi_response.build(
        {
            **numbers, "flags": flags, "response": 1, "status": status, "data_bytes": size, "exp_data_sn": number,
            "bidi_residual_bytes": offset, "residual_bytes": last,
        }
    )  # fmt: skip
    word = first_word(Opcode.SCSI_RESPONSE, flags, 1, status)
    assert response == WORDS.pack(word, size, 0, 0, tag, 0, stat_sn, exp, most, number, offset, last)
    r2t = iscsi.r2t.build(
        {
            **numbers, "lun": lun << 32, "target_tag": target_tag, "r2t_sn": number, "offset_bytes": offset,
            "desired_bytes": last,
        }
    )  # fmt: skip
    assert r2t == WORDS.pack(iscsi.R2T_WORD, 0, lun, 0, tag, target_tag, stat_sn, exp, most, number, offset, last)
    assert pack_headers(2, [*struct.unpack(">12I", data_in), *struct.unpack(">12I", r2t)]) == data_in + r2t


def test_luns_of_every_single_level_address_are_found() -> None:
    assert iscsi.LUNS[0] == 0
    assert iscsi.LUNS[iscsi.lun_address(255)] == 255
    assert iscsi.LUNS[0x4007 << 48] == 7
    assert iscsi.LUNS[0xC101 << 48] == iscsi.REPORT_LUNS_LUN
    assert iscsi.LUNS.get(1, iscsi.NO_LUN) == iscsi.NO_LUN  # something on a lower level
