"""The NBD layouts, and the struct formats of the hot path against them."""

from __future__ import annotations

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.formats import nbd
from blockrepl.formats.nbd import Command

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


@given(flags=U16, command=U16, cookie=U64, offset=U64, length=U32)
def test_the_hot_request_header_is_the_declared_one(
    flags: int, command: int, cookie: int, offset: int, length: int
) -> None:
    fields = {"flags": flags, "type": command, "cookie": cookie, "offset_bytes": offset, "length_bytes": length}
    hot = nbd.REQUEST.pack(nbd.request_head(command, flags), cookie, offset, length)
    assert hot == nbd.request.build(fields)
    assert nbd.REQUEST.unpack(nbd.request.build(fields))[1:] == (cookie, offset, length)
    assert nbd.REQUEST.size == nbd.REQUEST_BYTES == nbd.request.sizeof()


@given(error=U32, cookie=U64)
def test_the_hot_reply_header_is_the_declared_one(error: int, cookie: int) -> None:
    assert nbd.REPLY.pack(nbd.REPLY_OK | error, cookie) == nbd.simple_reply.build({"error": error, "cookie": cookie})
    assert nbd.REPLY.size == nbd.REPLY_BYTES == nbd.simple_reply.sizeof()


@given(cookies=st.lists(U64, min_size=1, max_size=2000))
def test_many_replies_at_once_are_the_replies_one_by_one(cookies: list[int]) -> None:
    assert nbd.pack_replies(cookies) == b"".join(nbd.simple_reply.build({"error": 0, "cookie": c}) for c in cookies)


@given(name=st.binary(max_size=200), requests=st.lists(U16, max_size=20))
def test_an_information_request_survives_the_wire(name: bytes, requests: list[int]) -> None:
    parsed = nbd.info_request.parse(nbd.info_request.build({"name": name, "requests": requests}))
    assert parsed.name == name
    assert list(parsed.requests) == requests


def test_the_greeting_is_the_one_of_the_specification() -> None:
    assert nbd.greeting.build({"flags": 3}) == b"NBDMAGICIHAVEOPT\x00\x03"


def test_a_request_with_another_magic_does_not_parse() -> None:
    fields = {"flags": 0, "type": Command.READ, "cookie": 0, "offset_bytes": 0, "length_bytes": 1}
    with pytest.raises(construct.ConstError):
        nbd.request.parse(b"\0\0\0\0" + nbd.request.build(fields)[4:])
