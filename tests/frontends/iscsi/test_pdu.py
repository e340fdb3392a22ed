from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats import iscsi
from blockrepl.frontends.iscsi.pdu import Framing, FramingError, Pdu, extended


def framing(*, header: bool = False, data: bool = False, limit: int = 1 << 16) -> Framing:
    found = Framing()
    found.header_digest, found.data_digest, found.max_data_bytes = header, data, limit
    return found


def chunk_of(raw: bytes) -> Chunk:
    chunk = Chunk(max(1, len(raw)), None)
    chunk.view[: len(raw)] = raw
    return chunk


def pdu_bytes(f: Framing, data: bytes, segments: bytes = b"") -> bytes:
    header = iscsi.nop_out.build(
        {
            "flags": 0x80, "ahs_words": len(segments) // 4, "data_bytes": len(data), "lun": 0, "tag": 1,
            "target_tag": iscsi.NO_TAG, "cmd_sn": 1, "exp_stat_sn": 1,
        }
    )  # fmt: skip
    return b"".join(f.seal(header + segments, [data] if data else []))


@given(
    st.booleans(), st.booleans(), st.lists(st.tuples(st.binary(max_size=70), st.integers(0, 3)), max_size=5),
    st.integers(0, 600),
)  # fmt: skip
def test_what_was_sealed_is_cut_again_wherever_the_input_ends(
    header: bool, data: bool, contents: list[tuple[bytes, int]], cut_at: int
) -> None:
    f = framing(header=header, data=data)
    raws = [pdu_bytes(f, content, bytes(4 * words)) for content, words in contents]
    raw = b"".join(raws)
    end = min(cut_at, len(raw))
    chunk = chunk_of(raw)
    pdus: list[Pdu] = []
    at = f.cut(chunk, 0, end, pdus)
    whole = [len(b"".join(raws[: n + 1])) for n in range(len(raws))]
    assert len(pdus) == sum(1 for size in whole if size <= end)
    assert at == max([size for size in whole if size <= end], default=0)
    assert [bytes(chunk.view[p.data_at : p.data_end]) for p in pdus] == [c for c, _ in contents[: len(pdus)]]
    assert all(p.intact for p in pdus)
    if end - at >= 48:
        assert f.need == len(raws[len(pdus)])
    else:
        assert f.need == 0


def test_a_wrong_header_digest_ends_the_connection() -> None:
    f = framing(header=True)
    raw = bytearray(pdu_bytes(f, b"x"))
    raw[20] ^= 1
    with pytest.raises(FramingError, match="header digest"):
        f.cut(chunk_of(bytes(raw)), 0, len(raw), [])


@pytest.mark.parametrize("at", [48, 51, 52])  # data, padding, digest
def test_a_wrong_data_digest_marks_the_pdu(at: int) -> None:
    f = framing(data=True)
    raw = bytearray(pdu_bytes(f, b"abc"))
    raw[at] ^= 1
    pdus: list[Pdu] = []
    f.cut(chunk_of(bytes(raw)), 0, len(raw), pdus)
    assert [pdu.intact for pdu in pdus] == [False]


def test_the_digest_is_that_of_the_rfc() -> None:
    # RFC 7143, Appendix A.4: CRC32C of 32 bytes of zeroes.
    assert framing(data=True).seal(bytes(48), [bytes(32)])[-1] == bytes([0xAA, 0x36, 0x91, 0x8A])


@pytest.mark.parametrize("digest", [False, True])
def test_a_segment_longer_than_agreed_is_refused_before_it_comes(digest: bool) -> None:
    f = framing(header=digest, limit=512)
    raw = pdu_bytes(framing(), bytes(516))[:48]
    with pytest.raises(FramingError, match="516 bytes"):
        f.cut(chunk_of(raw), 0, 48, [])


def test_an_extended_cdb_and_a_read_length_are_found() -> None:
    segments = b"\0\x05\x01\0ABCD" + b"\0\x05\x02\0\0\0\x10\0"
    assert extended(b"c" * 16, memoryview(segments)) == (b"c" * 16 + b"ABCD", 4096)


@pytest.mark.parametrize(
    "segments",
    [
        b"\0\0\x01\0",  # no length: a loop without end
        b"\xff\xff\x01\0",  # beyond the end
        b"\0\x05\x07\0ABCD",  # unknown type
        b"\0\x03\x02\0AB\0\0",  # a read length of two bytes
        b"\0\x05\x01\0ABCD" * 2,  # twice
    ],
)
def test_additional_segments_that_make_no_sense_are_refused(segments: bytes) -> None:
    with pytest.raises(ProtocolError):
        extended(b"c" * 16, memoryview(segments))
