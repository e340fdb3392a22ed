"""Both ends of the handshake without a socket."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockrepl.block import Volume
from blockrepl.formats import nbd
from blockrepl.formats.nbd import Info, Option, OptionReply, TransmissionFlag
from blockrepl.frontends.nbd.handshake import MAX_OPTION_BYTES, TRANSITIONS, Event, Handshake, State
from tests.frontends.nbd.client import OptionAnswer, client_flags, go, option, option_answers

SIZE = (64 << 20) + 512


def feed(handshake: Handshake, data: bytes) -> tuple[bytes, bytes]:
    """All of ``data`` in one piece: (what was sent, what was not consumed)."""
    consumed, _, out = handshake.receive(memoryview(data))
    return out, data[consumed:]


class Fixed(Volume):
    """What handshake and decoder need of a volume: what it is."""

    name = "data"
    submit = read = flush = when_relieved = None  # type: ignore[assignment]
    congested = False

    def __init__(self, size_bytes: int = 1 << 20, block_size_bytes: int = 512, *, writable: bool = True) -> None:
        self.size_bytes, self.block_size_bytes, self.writable = size_bytes, block_size_bytes, writable


@pytest.fixture
def exports() -> dict[str, Volume]:
    return {"data": Fixed(SIZE), "ro": Fixed(1 << 20, 4096, writable=False)}


def opened(exports: dict[str, Volume], flags: int = 3) -> Handshake:
    handshake = Handshake(lambda: exports)
    assert feed(handshake, client_flags(flags)) == (b"", b"")
    assert handshake.state is State.OPTIONS
    return handshake


def answers_to(handshake: Handshake, message: bytes) -> list[OptionAnswer]:
    out, rest = feed(handshake, message)
    assert rest == b""
    answers, rest = option_answers(out)
    assert rest == b""
    return answers


def test_go_gives_information_and_opens_transmission(exports: dict[str, Volume]) -> None:
    handshake = opened(exports)
    export, name, sizes, end = answers_to(handshake, go("data", wanted=(Info.NAME, Info.BLOCK_SIZE, 999)))
    assert {a.option for a in (export, name, sizes, end)} == {Option.GO}
    info = nbd.info_export.parse(export.data)
    assert info.size_bytes == SIZE
    assert info.flags & TransmissionFlag.CAN_MULTI_CONN
    assert not info.flags & TransmissionFlag.READ_ONLY
    assert name.data == b"\0\1data"
    block = nbd.info_block_size.parse(sizes.data)
    assert (block.minimum_bytes, block.preferred_bytes, block.maximum_payload_bytes) == (512, 4096, 1 << 25)
    assert end == OptionAnswer(Option.GO, OptionReply.ACK, b"")
    assert handshake.state is State.TRANSMISSION
    assert handshake.volume is exports["data"]


def test_info_gives_the_same_and_stays_in_options(exports: dict[str, Volume]) -> None:
    handshake = opened(exports)
    informed = answers_to(handshake, go("ro", number=Option.INFO))
    assert handshake.state is State.OPTIONS
    assert [(a.reply, a.data) for a in informed] == [(a.reply, a.data) for a in answers_to(handshake, go("ro"))]
    flags = nbd.info_export.parse(informed[0].data).flags
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_opens_transmission(exports: dict[str, Volume], flags: int, padding: int) -> None:
    handshake = opened(exports, flags)
    out, rest = feed(handshake, option(Option.EXPORT_NAME, b"data") + b"first request")
    assert nbd.export_name_reply.parse(out).size_bytes == SIZE
    assert out[10:] == bytes(padding)
    assert rest == b"first request"
    assert handshake.state is State.TRANSMISSION


def test_an_unknown_name_is_refused_by_go_and_ends_export_name(exports: dict[str, Volume]) -> None:
    handshake = opened(exports)
    for name in ("absent", "\ufffd", "x" * 4096):
        assert [a.reply for a in answers_to(handshake, go(name))] == [OptionReply.ERR_UNKNOWN]
    assert handshake.state is State.OPTIONS
    assert feed(handshake, option(Option.EXPORT_NAME, b"absent")) == (b"", b"")
    assert handshake.volume is None
    assert handshake.reason == "no such export"


def test_a_name_beyond_the_limit_is_invalid(exports: dict[str, Volume]) -> None:
    assert [a.reply for a in answers_to(opened(exports), go("x" * 4097))] == [OptionReply.ERR_INVALID]


def test_the_empty_name_is_the_only_export_or_none(exports: dict[str, Volume]) -> None:
    assert [a.reply for a in answers_to(opened(exports), go(""))] == [OptionReply.ERR_UNKNOWN]
    del exports["ro"]
    handshake = opened(exports)
    assert answers_to(handshake, go(""))[-1].reply == OptionReply.ACK
    assert handshake.volume is exports["data"]


def test_exports_are_looked_up_when_asked_for(exports: dict[str, Volume]) -> None:
    handshake = opened(exports)
    volume = exports.pop("data")
    assert answers_to(handshake, go("data"))[-1].reply == OptionReply.ERR_UNKNOWN
    exports["data"] = volume
    assert answers_to(handshake, go("data"))[-1].reply == OptionReply.ACK


def test_list_names_every_export(exports: dict[str, Volume]) -> None:
    *servers, end = answers_to(opened(exports), option(Option.LIST))
    assert [nbd.server_reply.parse(a.data).name for a in servers] == [b"data", b"ro"]
    assert end.reply == OptionReply.ACK


def test_list_with_data_is_invalid(exports: dict[str, Volume]) -> None:
    assert [a.reply for a in answers_to(opened(exports), option(Option.LIST, b"x"))] == [OptionReply.ERR_INVALID]


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0\0", b"\0\0\0\5data\0\0", b"\0\0\0\4data\0\2\0\0", b"\0\0\0\4data\0\0\0"]
)
def test_a_malformed_go_is_invalid(exports: dict[str, Volume], data: bytes) -> None:
    handshake = opened(exports)
    assert [a.reply for a in answers_to(handshake, option(Option.GO, data))] == [OptionReply.ERR_INVALID]
    assert handshake.state is State.OPTIONS


@pytest.mark.parametrize("number", [Option.STARTTLS, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, 77, 2**32 - 1])
def test_an_unknown_option_is_unsupported_and_the_session_goes_on(exports: dict[str, Volume], number: int) -> None:
    handshake = opened(exports)
    assert answers_to(handshake, option(number, b"data")) == [OptionAnswer(number, OptionReply.ERR_UNSUP, b"")]
    assert answers_to(handshake, go("data"))[-1].reply == OptionReply.ACK


def test_abort_is_acknowledged_and_ends(exports: dict[str, Volume]) -> None:
    handshake = opened(exports)
    assert [a.reply for a in answers_to(handshake, option(Option.ABORT, b"bye"))] == [OptionReply.ACK]
    assert handshake.state is State.CLOSED


def test_unknown_client_flags_end_the_session(exports: dict[str, Volume]) -> None:
    handshake = Handshake(lambda: exports)
    feed(handshake, client_flags(4))
    assert handshake.state is State.CLOSED


def test_a_wrong_magic_or_a_monstrous_option_ends_the_session_before_its_data_comes(
    exports: dict[str, Volume],
) -> None:
    for header in (
        b"IHAVEOPX" + option(Option.LIST)[8:],
        nbd.option_header.build({"option": Option.GO, "length_bytes": MAX_OPTION_BYTES + 1}),
    ):
        handshake = opened(exports)
        feed(handshake, header)
        assert handshake.state is State.CLOSED
        assert handshake.reason


def test_every_pair_of_state_and_event_that_can_be_is_in_the_table() -> None:
    assert set(TRANSITIONS) == {(State.FLAGS, Event.FLAGS_ACCEPTED), (State.FLAGS, Event.VIOLATED)} | {
        (State.OPTIONS, event) for event in Event if event is not Event.FLAGS_ACCEPTED
    }


CONVERSATION = (
    client_flags()
    + option(Option.LIST)
    + option(99, b"some data")
    + go("absent")
    + go("data", number=Option.INFO)
    + go("data")
    + b"the first request"
)


def in_pieces(data: bytes, cuts: list[int]) -> tuple[bytes, bytes, State]:
    """Feed ``data`` cut at ``cuts``, keeping what is not consumed, as a stream does."""
    handshake = Handshake(lambda: {"data": Fixed()})
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    kept, sent = b"", b""
    for start, end in itertools.pairwise(edges):
        kept += data[start:end]
        consumed, need, out = handshake.receive(memoryview(kept))
        kept = kept[consumed:]
        sent += out
        assert need == 0 or need > len(kept)
    return sent, kept, handshake.state


@given(st.lists(st.integers(0, 1000), max_size=30))
def test_the_conversation_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    assert in_pieces(CONVERSATION, cuts) == in_pieces(CONVERSATION, [])
    assert in_pieces(CONVERSATION, cuts)[1:] == (b"the first request", State.TRANSMISSION)


@given(st.binary(max_size=300), st.lists(st.integers(0, 1000), max_size=5), st.booleans())
def test_garbage_raises_nothing(data: bytes, cuts: list[int], greeted: bool) -> None:
    sent, _, state = in_pieces((client_flags() if greeted else b"") + data, cuts)
    assert state is not State.TRANSMISSION
    assert isinstance(sent, bytes)
