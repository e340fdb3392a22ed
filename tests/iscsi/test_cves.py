"""Known holes of other targets, tried here. Each test says what went wrong there, and shows the property that keeps it
from happening here.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from blockrepl.frontends.iscsi.scsi.identity import UnitIdentity
from scripts.ports import free_port
from tests.iscsi import pdu
from tests.iscsi.groups import PLAIN_NODE, PlainGroup, portals
from tests.iscsi.initiator import NAME, ConnectionEndedError, Initiator, LoginRefusedError
from tests.system.group import TIMEOUT_S

pytestmark = pytest.mark.timeout(200)

USER, SECRET = "host1", "correct horse battery"
CHAP = f"""
[iscsi.chap]
users = [{{ name = "{USER}", secret_file = "host1.secret" }}]
"""
SHA256 = 7  # CHAP algorithm (IANA, "PPP Authentication Algorithms")
HIDDEN = """
[[volume]]
name = "hidden"
size = "64MiB"
primary = "p1"
secondary = "none"
frontends = ["nbd"]
"""
BLOCK = 512


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[PlainGroup]:
    """A node that asks for CHAP."""
    folder = tmp_path / "guarded"
    folder.mkdir()
    secret = folder / "host1.secret"
    secret.touch(0o600)
    secret.write_text(SECRET + "\n")
    with PlainGroup(folder, more=CHAP) as group:
        group.create()
        group.start()
        yield group
    shutil.rmtree(folder)


def assert_serves(group: PlainGroup) -> None:
    """A newcomer is served, and the node found no mistake of its own."""
    with Initiator(portals(group, PLAIN_NODE)[0], name=f"{NAME}-late") as initiator:
        initiator.login(group.definition.target_name)
        assert initiator.ready(0).good
    log = group.log(PLAIN_NODE)
    assert "mistake of ours" not in log
    assert "Traceback" not in log


# CVE-2024-45751: tgt before 1.0.93 drew CHAP challenges from rand() without a seed, so each start of it gave the same
# row of challenges, and a response that was overheard once logged in again later.


def challenge(initiator: Initiator, target: str) -> tuple[int, bytes]:
    """(identifier, challenge) of a login's CHAP."""
    initiator.login_step(pdu.keys(InitiatorName=NAME, TargetName=target, AuthMethod="CHAP"), stage=0, following=None)
    initiator.login_step(pdu.keys(CHAP_A=SHA256), stage=0, following=None)
    return int(initiator.agreed["CHAP_I"]), bytes.fromhex(initiator.agreed["CHAP_C"].removeprefix("0x"))


def respond(initiator: Initiator, identifier: int, content: bytes) -> bytes:
    return hashlib.sha256(bytes([identifier]) + SECRET.encode() + content).digest()


def send_response(initiator: Initiator, response: bytes) -> None:
    text = pdu.keys(CHAP_N=USER, CHAP_R="0x" + response.hex())
    initiator.login_step(text, stage=0, following=1)


def test_cve_2024_45751_challenges_repeat_neither_in_a_process_nor_after_a_restart(guarded: PlainGroup) -> None:
    target = guarded.definition.target_name
    seen: list[tuple[int, bytes]] = []
    for _ in range(2):
        for _ in range(20):
            with Initiator(portals(guarded, PLAIN_NODE)[0]) as initiator:
                seen.append(challenge(initiator, target))
        guarded.kill(PLAIN_NODE)
        guarded.start()
    contents = [content for _, content in seen]
    assert len(set(contents)) == len(contents)
    assert min(map(len, contents)) >= 16
    assert len({identifier for identifier, _ in seen}) > 10


def test_cve_2024_45751_an_overheard_response_is_worth_nothing_in_another_login(guarded: PlainGroup) -> None:
    target = guarded.definition.target_name
    with Initiator(portals(guarded, PLAIN_NODE)[0]) as initiator:
        overheard = respond(initiator, *challenge(initiator, target))
        send_response(initiator, overheard)  # it was right: the same words are refused below
    for _ in range(5):
        with Initiator(portals(guarded, PLAIN_NODE)[0]) as thief:
            challenge(thief, target)
            with pytest.raises(LoginRefusedError) as refused:
                send_response(thief, overheard)
            assert refused.value.status == 0x0201  # authentication failure


# CVE-2013-2850: LIO copied the name of an unknown login key into a field of 64 bytes, to answer NotUnderstood: whoever
# reached the port, before any authentication, wrote beyond it.


def test_cve_2013_2850_a_long_unknown_key_is_answered_whole_or_refused(plain: PlainGroup) -> None:
    names = pdu.keys(InitiatorName=NAME, TargetName=plain.definition.target_name)
    for length in (62, 63, 64, 65, 128, 255, 256, 1000, 4096, 8000):
        key = "X-" + "k" * (length - 2)
        with Initiator(portals(plain, PLAIN_NODE)[0]) as initiator, suppress(LoginRefusedError, ConnectionEndedError):
            initiator.login_step((names + f"{key}=v\0".encode())[:8192], stage=1, following=3)
            assert initiator.agreed.get(key) == "NotUnderstood" or length > 63  # names have at most 63 bytes: 6.1
        assert_serves(plain)


def test_cve_2013_2850_many_unknown_keys_do_not_grow_the_answer_beyond_what_was_agreed(plain: PlainGroup) -> None:
    """The initiator takes 8192 bytes in the login: one key is answered with more bytes than it has."""
    names = pdu.keys(InitiatorName=NAME, TargetName=plain.definition.target_name)
    text = names + b"".join(b"a%d=\0" % number for number in range(1500))
    with Initiator(portals(plain, PLAIN_NODE)[0]) as initiator, suppress(LoginRefusedError, ConnectionEndedError):
        answer = initiator.login_step(text[:8192], stage=1, following=3)
        assert len(answer.data) <= 8192
    assert_serves(plain)


# CVE-2020-28374: LIO looked for the ends of an EXTENDED COPY among all volumes of the machine, by identifiers that the
# initiator wrote into the command: whoever could reach one LUN read and wrote all the others.


@pytest.fixture
def with_hidden(tmp_path: Path) -> Iterator[PlainGroup]:
    """A node with a third volume that is no LUN: it is for NBD."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    with PlainGroup(folder, more=HIDDEN) as group:
        group.create()
        group.start()
        yield group
    shutil.rmtree(folder)


def identifier(group: PlainGroup, volume: str) -> bytes:
    """NAA identifier, as the target makes it: no secret."""
    found = group.definition.volume(volume)
    return UnitIdentity(group.definition.group_id, found.id, found.name, found.size_bytes, BLOCK).naa


def extended_copy(source: bytes, destination: bytes, blocks: int) -> tuple[bytes, bytes]:
    """(CDB, parameter list): one segment from block 0 to block 0 (SPC-4, 6.4 and 6.4.6: LID1, types E4h and 02h)."""

    def end(naa: bytes) -> bytes:
        designator = bytes([1, 3, 0, len(naa)]) + naa.ljust(20, b"\0")
        return b"\xe4\0\0\0" + designator + b"\0" + BLOCK.to_bytes(3, "big")

    segment = b"\x02\0\0\x18" + b"\0\0\0\x01" + b"\0\0" + blocks.to_bytes(2, "big") + bytes(16)
    ends = end(source) + end(destination)
    head = b"\x01\0" + len(ends).to_bytes(2, "big") + bytes(4) + len(segment).to_bytes(4, "big") + bytes(4)
    parameters = head + ends + segment
    return b"\x83\0" + bytes(8) + len(parameters).to_bytes(4, "big") + b"\0\0", parameters


def image(group: PlainGroup, volume: str) -> bytes:
    return (group.node(PLAIN_NODE).directory / f"{volume}.img").read_bytes()[: 8 * BLOCK]


def test_cve_2020_28374_extended_copy_finds_only_what_the_initiator_has_as_a_lun(with_hidden: PlainGroup) -> None:
    group = with_hidden
    naa = {name: identifier(group, name) for name in ("data", "other", "hidden")}
    with Initiator(portals(group, PLAIN_NODE)[0]) as initiator:
        initiator.login(group.definition.target_name)
        for lun in (0, 1):
            assert initiator.ready(lun).good
        page = initiator.command(b"\x12\x01\x83\x04\0\0", expected_in=1024).data
        assert naa["data"] in page, "the identifiers of this test are those of the target"
        assert initiator.write(0, b"\xaa" * 8 * BLOCK, BLOCK).good
        assert initiator.write(0, b"\xbb" * 8 * BLOCK, BLOCK, lun=1).good

        for ends in (("data", "hidden"), ("hidden", "data"), ("hidden", "hidden")):
            cdb, parameters = extended_copy(naa[ends[0]], naa[ends[1]], 8)
            answer = initiator.command(cdb, data=parameters)
            assert answer.status == 2, ends
            assert answer.sense >> 16 in (0x5, 0xA), hex(answer.sense)  # ILLEGAL REQUEST, COPY ABORTED
        for unknown in (bytes(8), uuid.uuid4().bytes, b"\xff" * 20):
            cdb, parameters = extended_copy(naa["data"], unknown, 8)
            assert initiator.command(cdb, data=parameters).status == 2
        assert image(group, "hidden") == bytes(8 * BLOCK)
        assert image(group, "data") == b"\xaa" * 8 * BLOCK

        # The same words do copy between the two that are LUNs.
        cdb, parameters = extended_copy(naa["data"], naa["other"], 4)
        answer = initiator.command(cdb, data=parameters)
        assert answer.good, answer
        assert initiator.read(0, 8, BLOCK, lun=1).data == b"\xaa" * 4 * BLOCK + b"\xbb" * 4 * BLOCK


# CVE-2026-53176: isert took the length of a login's payload as what was received less 76 bytes of headers. A login
# shorter than its headers made that negative, and a copy of nearly all memory of it; before any authentication.


def test_cve_2026_53176_a_login_cut_off_at_any_byte_is_no_login_and_harms_nobody(plain: PlainGroup) -> None:
    whole = pdu.login(pdu.keys(InitiatorName=NAME, TargetName=plain.definition.target_name))
    for length in range(len(whole)):
        with socket.create_connection(portals(plain, PLAIN_NODE)[0], TIMEOUT_S) as connection:
            connection.sendall(whole[:length])
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"", f"an answer to the first {length} bytes of a login"
    assert_serves(plain)


def test_cve_2026_53176_lengths_that_lie_end_the_login_only(plain: PlainGroup) -> None:
    for data_bytes in (0, 1, 47, 48, 75, 76, 8191, 8192, 8193, 1 << 20, 0xFFFFFF):
        for ahs_words in (0, 1, 255):
            lie = bytearray(pdu.login(pdu.keys(InitiatorName=NAME)))
            lie[4] = ahs_words
            lie[5:8] = data_bytes.to_bytes(3, "big")
            with socket.create_connection(portals(plain, PLAIN_NODE)[0], TIMEOUT_S) as connection:
                connection.sendall(bytes(lie))
                connection.shutdown(socket.SHUT_WR)
                with suppress(ConnectionError):
                    while connection.recv(1 << 16):
                        pass
    assert_serves(plain)


# CVE-2024-7409: QEMU's NBD server crashed when it was taken off line while a client kept its socket open: the end of a
# connection came after the end of what it used.


def open_sockets(stack: ExitStack, group: PlainGroup, nbd_port: int) -> None:
    """Connections in every state in which a client may stop caring."""
    address, target = portals(group, PLAIN_NODE)[0], group.definition.target_name
    for content in (b"", b"\x43", pdu.login(pdu.keys(InitiatorName=NAME), more=True, following=None)):
        stack.enter_context(socket.create_connection(address, TIMEOUT_S)).sendall(content)
    for number in range(4):
        initiator = stack.enter_context(Initiator(address, isid=b"\x80\0\0\0\0" + bytes([number])))
        initiator.login(target)
        initiator.ready(0)
        expected, flags = 1 << 20, pdu.FINAL | pdu.WRITE | 1
        write = b"\x2a\0" + bytes(5) + (expected // BLOCK).to_bytes(2, "big") + b"\0"
        read = b"\x28" + write[1:]
        said = [
            b"",
            pdu.command(write, number=initiator.command_number, tag=99, expected=expected, flags=flags),
            pdu.command(write, number=initiator.command_number, tag=99, expected=expected, flags=flags)[:30],
            b"".join(  # and never read
                pdu.command(
                    read, number=initiator.command_number + turn, tag=100 + turn, expected=expected,
                    flags=pdu.FINAL | pdu.READ | 1,
                )
                for turn in range(30)
            ),
        ][number]  # fmt: skip
        initiator.socket.sendall(said)
    for content in (b"", b"\0\0\0\3"):
        stack.enter_context(socket.create_connection(("127.0.0.1", nbd_port), TIMEOUT_S)).sendall(content)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_cve_2024_7409_a_node_goes_off_line_cleanly_while_clients_keep_their_sockets(
    tmp_path: Path, how: signal.Signals
) -> None:
    folder = tmp_path / "closing"
    folder.mkdir()
    with PlainGroup(folder, more=HIDDEN, nbd_port=free_port()) as group:
        group.create()
        group.start()
        nbd = group.node(PLAIN_NODE).nbd
        assert nbd is not None
        for _ in range(2):  # it comes back, too
            with ExitStack() as stack:
                open_sockets(stack, group, nbd.port)
                group.signal(PLAIN_NODE, how)
                assert group.ended(PLAIN_NODE) == 0, group.log(PLAIN_NODE)
            assert not re.search("Traceback|mistake of ours", group.log(PLAIN_NODE))
            group.start()
        assert_serves(group)
    shutil.rmtree(folder)
