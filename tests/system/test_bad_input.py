"""Bad input on the link ports of a running group: an answer or a closed connection, and the group goes on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blockrepl.formats.link import (
    FEATURES,
    HEADER,
    LINK_MAGIC,
    MAX_RECORD_BYTES,
    NO_EPOCH,
    VERSION_MAX,
    VERSION_MIN,
    Epoch,
    LinkRole,
    Message,
    Refusal,
    bulk_header,
    decode_body,
    decode_header,
    encode,
)
from tests.system.group import ALL, TIMEOUT_S, A, RealGroup

pytestmark = pytest.mark.slow
LISTENERS = ("i1", "s1")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealGroup]:
    """One for all tests of this module: what one leaves must not harm the next."""
    with (
        pytest.MonkeyPatch.context() as patch,
        RealGroup(tmp_path_factory.mktemp("group")) as running,
    ):
        patch.setenv("BLOCKREPL_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        yield running.create().start()


class Peer:
    """The other end of a link, of our making."""

    def __init__(self, group: RealGroup, name: str) -> None:
        address = group.node(name).address
        self.sock = socket.create_connection((address.host, address.port), TIMEOUT_S)
        self._unread = b""

    def send(self, data: bytes) -> Peer:
        self.sock.sendall(data)
        return self

    def answer(self) -> tuple[Message, dict[str, Any]] | None:
        """The next message; None when the node closes."""
        while True:
            if len(self._unread) >= HEADER.size:
                head = decode_header(memoryview(self._unread)[: HEADER.size])
                end = HEADER.size + head.length_bytes
                if len(self._unread) >= end:
                    fields = decode_body(head, memoryview(self._unread)[:end])
                    self._unread = self._unread[end:]
                    return Message(head.type), fields
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._unread += data

    def close(self) -> None:
        self.sock.close()


def hello(running: RealGroup, name: str, /, **changed: Any) -> bytes:
    """A good HELLO of the opener of a takeover at s1, but for what is changed. It takes no live link's place."""
    fields: dict[str, Any] = {
        "version_min": VERSION_MIN, "version_max": VERSION_MAX, "role": LinkRole.OPENER, "features": FEATURES,
        "group": running.definition.group_id.bytes, "node": running.node("s1").id, "peer": running.node(name).id,
        "incarnation": 0, "nonce": bytes(16), "epoch": NO_EPOCH, "promised": NO_EPOCH, "highest": 0, "checkpoint": 0,
        "fresh": False, "name": "test", **changed,
    }  # fmt: skip
    return encode(Message.HELLO, 0, **fields)


def check_group_goes_on(group: RealGroup) -> None:
    volume = group.open(A)
    before = group.marks("i1")["numbered"]
    volume.write(0, b"still here".ljust(4096), durable=True)
    assert volume.read(0, 4096) == b"still here".ljust(4096)
    volume.close()
    assert group.settle() > before
    statuses = {name: group.status(name) for name in ALL}
    assert {name: status["ready"] for name, status in statuses.items()} == dict.fromkeys(ALL, True)
    assert all(peer["connected"] for status in statuses.values() for peer in status["peers"])


def refused(peer: Peer, code: Refusal) -> str:
    """REFUSED with the code, then the end of the connection; returns its words."""
    answer = peer.answer()
    assert answer is not None, "closed without a word"
    kind, fields = answer
    assert kind == Message.REFUSED
    assert fields["code"] == code
    assert peer.answer() is None
    peer.close()
    return str(fields["text"])


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"version_min": VERSION_MAX + 1, "version_max": VERSION_MAX + 9}, Refusal.VERSION),
        ({"version_min": 0, "version_max": 0}, Refusal.VERSION),
        ({"group": bytes(range(16))}, Refusal.GROUP),
        ({"peer": 99}, Refusal.NODE),
        ({"role": LinkRole.SECONDARY}, Refusal.ROLE),
        ({"role": 200}, Refusal.ROLE),
    ],
    ids=["newer", "older", "group", "peer", "role", "unknown role"],
)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(
    group: RealGroup, name: str, changed: dict[str, Any], code: Refusal
) -> None:
    assert refused(Peer(group, name).send(hello(group, name, **changed)), code)
    check_group_goes_on(group)


@pytest.mark.parametrize(
    ("name", "role"),
    [("i1", LinkRole.PRIMARY), ("s1", LinkRole.OPENER)],
)
def test_a_node_that_is_no_member_is_refused(group: RealGroup, name: str, role: LinkRole) -> None:
    assert refused(Peer(group, name).send(hello(group, name, role=role, node=77)), Refusal.NODE)
    check_group_goes_on(group)


def test_an_old_incarnation_of_a_primary_is_refused_and_the_living_one_stays(group: RealGroup) -> None:
    message = hello(group, "i1", role=LinkRole.PRIMARY, node=group.node("p1").id, incarnation=0)
    assert "incarnation" in refused(Peer(group, "i1").send(message), Refusal.STALE)
    check_group_goes_on(group)


def test_an_intermediate_of_another_history_is_refused(group: RealGroup) -> None:
    number = group.status("s1")["epoch"]["number"]
    message = hello(
        group, "s1", role=LinkRole.INTERMEDIATE, node=group.node("i1").id, incarnation=1 << 30,
        epoch=Epoch(number, b"another history!"),
    )  # fmt: skip
    assert "split brain" in refused(Peer(group, "s1").send(message), Refusal.EPOCH)
    check_group_goes_on(group)


@pytest.mark.parametrize("name", LISTENERS)
def test_a_second_hello_closes_the_link(group: RealGroup, name: str) -> None:
    peer = Peer(group, name).send(hello(group, name))
    answer = peer.answer()
    assert answer is not None
    assert answer[0] == Message.WELCOME
    peer.send(hello(group, name))
    assert "HELLO" in refused(peer, Refusal.PROTOCOL)
    check_group_goes_on(group)


def wrong_checksum(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def oversized(kind: int, length_bytes: int) -> bytes:
    head = HEADER.pack(LINK_MAGIC, kind, VERSION_MAX, 0, length_bytes, 0, 0)
    if kind in (Message.BATCH, Message.RECORD):
        return bulk_header(Message(kind), 0, length_bytes)
    return head


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "wrong magic": lambda good: b"EVIL" + good[4:],
    "wrong version": lambda good: good[:5] + b"\xff" + good[6:],
    "unknown type": lambda good: good[:4] + b"\xee" + good[5:],
    "wrong checksum": wrong_checksum,
    "garbage": lambda good: bytes(range(1, 256)) * 16,
    "http": lambda good: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "oversized hello": lambda good: oversized(Message.HELLO, 1 << 31),
    "oversized batch": lambda good: oversized(Message.BATCH, MAX_RECORD_BYTES + 1),
    "oversized record": lambda good: oversized(Message.RECORD, 0xFFFFFFFF),
    "empty record": lambda good: oversized(Message.RECORD, 0),
    "no hello": lambda good: encode(Message.CHECKPOINT, 0, number=1),
    "record before hello": lambda good: bulk_header(Message.RECORD, 0, 4096) + bytes(4096),
}

WITHOUT_HELLO = ("no hello", "record before hello")


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize(
    ("kind", "greeted"),
    [(kind, greeted) for kind in BROKEN for greeted in (False, True) if not (greeted and kind in WITHOUT_HELLO)],
)
def test_what_is_no_message_ends_the_link_with_words(group: RealGroup, name: str, kind: str, greeted: bool) -> None:
    peer = Peer(group, name)
    good = hello(group, name)
    if greeted:
        answer = peer.send(good).answer()
        assert answer is not None
        assert answer[0] == Message.WELCOME
    peer.send(BROKEN[kind](good))
    assert refused(peer, Refusal.PROTOCOL)


@pytest.mark.parametrize("name", LISTENERS)
@pytest.mark.parametrize("keep_bytes", [1, 23, 24, 60])
def test_a_message_that_is_cut_off_leaves_nothing(group: RealGroup, name: str, keep_bytes: int) -> None:
    peer = Peer(group, name).send(hello(group, name)[:keep_bytes])
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.answer() is None
    peer.close()


@pytest.mark.parametrize("name", LISTENERS)
def test_a_record_on_an_openers_link_is_refused_or_ignored_and_never_stored(group: RealGroup, name: str) -> None:
    held = group.marks(name)["durable"]
    body = struct.pack(">I", 0x42525243) + bytes(4092)
    peer = Peer(group, name).send(hello(group, name))
    assert peer.answer() is not None
    for kind in (Message.BATCH, Message.RECORD):
        try:
            peer.send(bulk_header(kind, 1, len(body)) + body)
        except OSError:
            break
    assert refused(peer, Refusal.PROTOCOL)
    assert group.marks(name)["durable"] == held


def test_after_all_that_the_group_goes_on_and_both_ends_are_the_same(group: RealGroup) -> None:
    check_group_goes_on(group)
    assert group.differing() == []
