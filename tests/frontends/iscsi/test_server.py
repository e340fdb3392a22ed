"""The server over real sockets, with clients of our own and libiscsi's."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from blockrepl.chunks import ChunkPool
from blockrepl.errors import UsageError
from blockrepl.formats import iscsi
from blockrepl.formats.iscsi import AsyncEvent, LoginStatus, Opcode
from blockrepl.frontends.iscsi.chap import Credentials
from blockrepl.frontends.iscsi.login import Access, TargetDescription
from blockrepl.frontends.iscsi.server import IscsiServer
from tests.frontends.iscsi.fake import FakeDevice
from tests.frontends.iscsi.initiator import INITIATOR, TARGET, Answer, login_bytes, parse_answers

WHO = f"InitiatorName={INITIATOR}\0TargetName={TARGET}\0".encode()


class Rig:
    def __init__(self) -> None:
        self.device = FakeDevice()
        description = TargetDescription(TARGET, "test", 1, Access())
        self.pool = ChunkPool()
        portals = [("127.0.0.1", 4000, 2), ("0.0.0.0", 4001, 3)]
        self.server = IscsiServer(description, self.device, self.pool, portals=portals, login_timeout_s=0.3)
        self.port = 0

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        return Client(reader, writer)

    def url(self, lun: int = 0) -> str:
        return f"iscsi://127.0.0.1:{self.port}/{TARGET}/{lun}"


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> Answer:
        header = await self.reader.readexactly(48)
        size = int.from_bytes(header[5:8], "big")
        (found,) = parse_answers(header + await self.reader.readexactly(size + -size % 4))
        return found

    async def login(self, data: bytes = WHO, **fields: int | bytes) -> Answer:
        self.writer.write(login_bytes(data, **{"flags": 0x87, **fields}))
        return await self.answer()

    async def ended(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    _, rig.port = await rig.server.listen("127.0.0.1", 0)
    yield rig
    await rig.server.close(grace_s=0.1)


async def test_a_session_byte_by_byte(rig: Rig) -> None:
    client = await rig.client()
    for byte in login_bytes(WHO, flags=0x87):
        client.writer.write(bytes([byte]))
        await client.writer.drain()
        await asyncio.sleep(0)
    assert (await client.answer()).status == LoginStatus.SUCCESS
    (status,) = rig.server.sessions()
    assert (status.initiator, status.discovery) == (INITIATOR, False)
    raw = iscsi.nop_out.build(
        {"data_bytes": 5, "lun": 0, "tag": 1, "target_tag": iscsi.NO_TAG, "cmd_sn": 100, "exp_stat_sn": 0}
    )
    for byte in raw + b"hello\0\0\0":
        client.writer.write(bytes([byte]))
        await client.writer.drain()
        await asyncio.sleep(0)
    assert (await client.answer()).data == b"hello"


async def test_a_second_login_of_the_same_port_replaces_the_session(rig: Rig) -> None:
    first, second = await rig.client(), await rig.client()
    old = await first.login()
    new = await second.login()
    assert new.status == LoginStatus.SUCCESS
    assert new.tsih != old.tsih
    assert (await first.answer()).event == AsyncEvent.SESSION_DROPPED
    assert await first.ended()
    assert len(rig.server.sessions()) == 1
    assert rig.device.lost == rig.device.begun[:1]


async def test_another_isid_or_name_is_another_session(rig: Rig) -> None:
    clients = [await rig.client() for _ in range(3)]
    answers = [
        await clients[0].login(), await clients[1].login(isid=b"\x80\0\0\0\0\2"),
        await clients[2].login(WHO.replace(b"abc", b"abd")),
    ]  # fmt: skip
    assert len({answer.tsih for answer in answers}) == 3
    assert len(rig.server.sessions()) == 3


async def test_a_connection_is_reinstated_but_not_added(rig: Rig) -> None:
    first, second, third, fourth = [await rig.client() for _ in range(4)]
    tsih = (await first.login()).tsih
    assert (await second.login(tsih=tsih, cid=8)).status == LoginStatus.TOO_MANY_CONNECTIONS
    assert (await third.login(tsih=tsih + 1)).status == LoginStatus.NO_SESSION
    answer = await fourth.login(tsih=tsih)
    assert (answer.status, answer.tsih) == (LoginStatus.SUCCESS, tsih)
    assert len(rig.server.sessions()) == 1


async def test_half_a_login_is_not_waited_for_for_ever_and_holds_little(rig: Rig) -> None:
    client = await rig.client()
    client.writer.write(login_bytes(WHO, flags=0x87)[:-1])
    assert await asyncio.wait_for(client.ended(), 5)
    assert rig.server.sessions() == []


async def test_other_sessions_live_on_while_a_hundred_say_nothing_or_nonsense(rig: Rig) -> None:
    good = await rig.client()
    await good.login()
    others = [await rig.client() for _ in range(100)]
    for number, other in enumerate(others):
        other.writer.write([b"", b"\xff" * 100, login_bytes(b"x" * 9000, flags=0x87), bytes(48)][number % 4])
    good.writer.write(
        iscsi.nop_out.build({"lun": 0, "tag": 1, "target_tag": iscsi.NO_TAG, "cmd_sn": 100, "exp_stat_sn": 0})
    )
    assert (await good.answer()).kind == Opcode.NOP_IN
    for other in others:
        assert await asyncio.wait_for(_drained(other), 10)
    assert len(rig.server.sessions()) == 1


async def _drained(client: Client) -> bool:
    try:
        while await client.reader.read(1000):
            pass
    except ConnectionResetError:
        pass
    return True


async def test_what_comes_before_the_login_was_answered_ends_it(rig: Rig) -> None:
    client = await rig.client()
    client.writer.write(login_bytes(WHO, flags=0x87) + bytes(48))
    assert (await client.answer()).status == LoginStatus.SUCCESS
    assert await client.ended()
    assert rig.server.sessions() == []


async def test_discovery_names_the_portal_it_came_by_last_and_no_wildcard(rig: Rig) -> None:
    client = await rig.client()
    await client.login(f"InitiatorName={INITIATOR}\0SessionType=Discovery\0".encode())
    header = iscsi.text_request.build(
        {
            "flags": 0x80,
            "data_bytes": 16,
            "lun": 0,
            "tag": 2,
            "target_tag": iscsi.NO_TAG,
            "cmd_sn": 100,
            "exp_stat_sn": 0,
        }
    )
    client.writer.write(header + b"SendTargets=All\0")
    text = (await client.answer()).data.split(b"\0")
    assert text[1:-1] == [b"TargetAddress=127.0.0.1:4000,2", b"TargetAddress=127.0.0.1:%d,1" % rig.port]


async def test_the_end_of_the_server_is_announced(rig: Rig) -> None:
    client = await rig.client()
    await client.login()
    await rig.server.close(grace_s=0.05)
    events = [(await client.answer()).event, (await client.answer()).event]
    assert events == [AsyncEvent.LOGOUT_REQUESTED, AsyncEvent.SESSION_DROPPED]
    assert await client.ended()


async def test_a_port_that_is_taken_is_told(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="iscsi: cannot listen on"):
            await rig.server.listen("127.0.0.1", taken.getsockname()[1])


async def run(*argv: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, out.decode()


@pytest.mark.skipif(shutil.which("iscsi-ls") is None, reason="needs libiscsi-bin")
async def test_libiscsi_discovers_and_logs_in(rig: Rig) -> None:
    _, out = await run("iscsi-ls", "-s", f"iscsi://127.0.0.1:{rig.port}")  # it fails at the portal that is down
    assert f"Target:{TARGET} Portal:127.0.0.1:{rig.port},1\nLun:0" in out


@pytest.mark.skipif(shutil.which("iscsi-test-cu") is None, reason="needs libiscsi-bin")
async def test_libiscsis_own_protocol_tests_pass(rig: Rig) -> None:
    for family in ("iSCSIcmdsn", "iSCSIdatasn", "iSCSITMF"):
        code, out = await run("iscsi-test-cu", "--dataloss", "-n", "-t", f"iSCSI.{family}", rig.url())
        assert code == 0, out
        assert "Failed" in out
        (tests,) = [line.split() for line in out.splitlines() if line.strip().startswith("tests")]
        assert tests[4] == "0", out


@pytest.mark.skipif(shutil.which("iscsi-inq") is None, reason="needs libiscsi-bin")
async def test_libiscsi_and_we_prove_ourselves_by_chap(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = Credentials({"host1": b"correct-horse-12"}, ("me", b"target-secret-1"), True)
    description = TargetDescription(TARGET, "test", 1, Access(credentials=credentials))
    server = IscsiServer(description, FakeDevice(), ChunkPool())
    _, port = await server.listen("127.0.0.1", 0)

    async def inquire(who: str) -> tuple[int, str]:
        return await run("iscsi-inq", f"iscsi://{who}127.0.0.1:{port}/{TARGET}/0")

    code, out = await inquire("host1%correct-horse-12@")
    assert code == 0, out
    for who in ("host1%wrong-horse-123@", "host2%correct-horse-12@", ""):
        _, out = await inquire(who)
        assert "Authentication failure" in out
    monkeypatch.setenv("LIBISCSI_CHAP_TARGET_USERNAME", "me")
    monkeypatch.setenv("LIBISCSI_CHAP_TARGET_PASSWORD", "target-secret-1")
    code, out = await inquire("host1%correct-horse-12@")
    assert code == 0, out
    monkeypatch.setenv("LIBISCSI_CHAP_TARGET_PASSWORD", "another-secret-1")
    _, out = await inquire("host1%correct-horse-12@")
    assert "Invalid CHAP_R" in out
    await server.close(grace_s=0.1)
