"""The server over loopback, with real volumes."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections import Counter
from pathlib import Path

import pytest

from blockrepl.chunks import CHUNK_BYTES, ChunkPool
from blockrepl.errors import UsageError
from blockrepl.formats.nbd import Command, CommandFlag, NbdError, Option, OptionReply, TransmissionFlag
from blockrepl.frontends.nbd.server import NbdServer
from blockrepl.frontends.nbd.session import MAX_IN_FLIGHT
from tests.frontends.nbd.client import Client, client_flags, go, option, request, write
from tests.frontends.nbd.conftest import SIZE, Rig


async def test_what_is_written_is_read_back(rig: Rig) -> None:
    client = await Client.open(rig.address)
    assert client.size_bytes == SIZE
    await client.write(SIZE - 1024, b"tail" * 256)
    await client.write(0, b"head" * 128, flags=CommandFlag.FUA)
    assert await client.read(0, 1024) == b"head" * 128 + bytes(512)
    assert await client.read(SIZE - 1024, 1024) == b"tail" * 256
    assert await client.do(Command.FLUSH, 0, 0) == (0, b"")
    assert await client.do(Command.WRITE_ZEROES, 0, 512) == (0, b"")
    assert await client.do(Command.TRIM, SIZE - 512, 512) == (0, b"")
    assert await client.read(0, 512) == bytes(512)
    assert await client.read(SIZE - 1024, 1024) == b"tail" * 128 + bytes(512)
    client.close()


async def test_many_commands_in_one_piece_are_all_answered(rig: Rig) -> None:
    client = await Client.open(rig.address)
    blocks = [os.urandom(512) for _ in range(300)]
    client.send(*(write(n, n * 512, block) for n, block in enumerate(blocks)))
    assert sorted([await client.reply() for _ in blocks]) == [(n, 0, b"") for n in range(300)]
    client.send(*(request(Command.READ, n, n * 512, 512) for n in range(300)))
    lengths = dict.fromkeys(range(300), 512)
    assert sorted([await client.reply(lengths) for _ in blocks]) == [(n, 0, block) for n, block in enumerate(blocks)]
    client.close()


@pytest.mark.parametrize("length", [CHUNK_BYTES - 16, CHUNK_BYTES, 1 << 20, 32 << 20])
async def test_large_commands_go_through_whole(rig: Rig, length: int) -> None:
    client = await Client.open(rig.address)
    length = length // 512 * 512
    data = os.urandom(4096) * (length // 4096) + os.urandom(length % 4096)
    await client.write(512, data)
    assert await client.read(512, length) == data
    client.close()


async def test_every_command_of_a_random_mixture_is_right(rig: Rig) -> None:
    """One connection, commands sent in bursts over disjoint ranges, cold and cached reads among them."""
    dice = random.Random(1)
    client = await Client.open(rig.address)
    model = bytearray(4 << 20)
    for _ in range(30):
        at, burst, expected, lengths = 0, [], {}, {}
        for cookie in range(60):
            at += dice.randrange(0, 16) * 512
            length = dice.choice((512, 512, 4096, 65536, 300 * 512))
            if at + length > len(model):
                break
            kind = dice.choice((Command.READ, Command.READ, Command.WRITE, Command.WRITE_ZEROES, Command.TRIM))
            payload = os.urandom(length) if kind == Command.WRITE else b""
            burst.append(request(kind, cookie, at, length, payload=payload))
            if kind == Command.READ:
                lengths[cookie] = length
                expected[cookie] = bytes(model[at : at + length])
            else:
                expected[cookie] = b""
                model[at : at + length] = payload or bytes(length)
            at += length
        client.send(*burst)
        for _ in burst:
            cookie, error, data = await client.reply(lengths)
            assert (error, data) == (0, expected.pop(cookie))
        rig.images[0].fdatasync()
        os.posix_fadvise(rig.images[0].fd, 0, 2 << 20, os.POSIX_FADV_DONTNEED)
    client.close()


async def test_an_error_of_one_command_is_its_own(rig: Rig) -> None:
    client = await Client.open(rig.address)
    client.send(write(1, 0, b"x" * 512), write(2, SIZE, b"x" * 512), request(77, 3, 0, 0), write(4, 512, b"y" * 512))
    assert sorted([await client.reply() for _ in range(4)]) == [
        (1, 0, b""),
        (2, NbdError.ENOSPC, b""),
        (3, NbdError.EINVAL, b""),
        (4, 0, b""),
    ]
    client.close()


async def test_a_read_that_fails_is_answered_without_data(rig: Rig) -> None:
    client = await Client.open(rig.address)
    os.ftruncate(rig.images[0].fd, 4096)
    client.send(request(Command.READ, 1, 8192, 4096), request(Command.READ, 2, 0, 4096))
    lengths = {1: 4096, 2: 4096}
    assert sorted([await client.reply(lengths), await client.reply(lengths)]) == [
        (1, NbdError.EIO, b""),
        (2, 0, bytes(4096)),
    ]
    client.close()


async def test_a_read_only_export_is_read_and_not_written(rig: Rig) -> None:
    rig.add("ro", writable=False)
    client = await Client.open(rig.address, "ro")
    assert client.flags & TransmissionFlag.READ_ONLY
    assert await client.do(Command.WRITE, 0, 512, payload=b"x" * 512) == (NbdError.EPERM, b"")
    assert await client.read(0, 512) == bytes(512)
    client.close()


async def test_two_connections_see_each_others_writes_and_one_flush_covers_both(rig: Rig) -> None:
    one, two = await Client.open(rig.address), await Client.open(rig.address)
    assert one.flags & TransmissionFlag.CAN_MULTI_CONN
    await one.write(0, b"1" * 512)
    await two.write(512, b"2" * 512)
    assert await two.read(0, 1024) == b"1" * 512 + b"2" * 512
    assert await two.do(Command.FLUSH, 0, 0) == (0, b"")
    one.close()
    two.close()


async def test_disc_answers_what_is_outstanding_and_closes(rig: Rig) -> None:
    client = await Client.open(rig.address)
    client.send(
        write(1, 0, b"x" * 512, flags=CommandFlag.FUA),
        request(Command.READ, 2, 1 << 20, 4096),
        request(Command.FLUSH, 3, 0, 0),
        request(Command.DISC, 4, 0, 0),
    )
    replies = [await client.reply({2: 4096}) for _ in range(3)]
    assert sorted(replies) == [(1, 0, b""), (2, 0, bytes(4096)), (3, 0, b"")]
    assert await client.ended()
    await rig.until(lambda: not rig.server.sessions())
    client.close()


async def test_a_bad_magic_closes_that_connection_and_no_other(rig: Rig) -> None:
    well, ill = await Client.open(rig.address), await Client.open(rig.address)
    ill.send(write(1, 0, b"x" * 512), b"\0" * 28)
    assert await ill.reply() == (1, 0, b"")
    assert await ill.ended()
    assert await well.read(0, 512) == b"x" * 512
    well.close()


async def test_data_cut_off_by_the_clients_death_changes_nothing(rig: Rig) -> None:
    client = await Client.open(rig.address)
    client.send(write(1, 0, b"whole" * 1024 + b"x" * 512)[:-1])
    await client.writer.drain()
    client.close()
    await client.writer.wait_closed()
    await rig.until(lambda: not rig.server.sessions())
    other = await Client.open(rig.address)
    assert await other.read(0, 512) == bytes(512)
    other.close()


async def test_a_client_that_reads_nothing_does_not_fill_the_memory(rig: Rig) -> None:
    greedy, modest = await Client.open(rig.address), await Client.open(rig.address)
    assert isinstance(greedy.writer, asyncio.StreamWriter)
    greedy.writer.transport.pause_reading()  # type: ignore[attr-defined]
    count = 3 * MAX_IN_FLIGHT
    greedy.send(*(request(Command.READ, n, 0, 4096) for n in range(count)))
    await modest.read(0, 512)
    held = sum(len(chunk.buffer) for chunk in rig.pool._free + rig.pool._large)
    assert held <= 8 << 20
    greedy.writer.transport.resume_reading()  # type: ignore[attr-defined]
    lengths = dict.fromkeys(range(count), 4096)
    seen = Counter([(await greedy.reply(lengths))[0] for _ in range(count)])
    assert seen == Counter(range(count))
    greedy.close()
    modest.close()


async def test_hosts_are_held_back_while_the_volume_is_congested(rig: Rig) -> None:
    client = await Client.open(rig.address)
    zeroes = request(Command.WRITE_ZEROES, 10**6, 0, 64 << 20)
    client.send(zeroes)
    for n in range(80):
        client.send(write(n, 0, b"x" * (1 << 20)))
        await client.writer.drain()
    assert Counter([(await client.reply())[1] for _ in range(81)]) == {0: 81}
    assert await client.read(0, 512) == b"x" * 512
    client.close()


async def test_a_thousand_silent_connections_hold_no_buffers_and_hinder_nobody(rig: Rig) -> None:
    sockets = []
    try:
        for _ in range(1000):
            sock = socket.socket()
            sock.setblocking(False)
            sockets.append(sock)
            await asyncio.get_running_loop().sock_connect(sock, rig.address)
        await rig.until(lambda: len(rig.server.sessions()) == 1000)
        client = await Client.open(rig.address)
        await client.write(0, b"x" * 4096)
        assert await client.read(0, 4096) == b"x" * 4096
        assert len(rig.pool._free) + len(rig.pool._large) <= 4
        client.close()
    except OSError as error:
        pytest.skip(f"not enough descriptors here: {error}")
    finally:
        for sock in sockets:
            sock.close()
    await rig.until(lambda: not rig.server.sessions())


async def test_a_handshake_that_goes_nowhere_is_cut_off(rig: Rig) -> None:
    server = NbdServer(lambda: rig.exports, rig.pool, handshake_timeout_s=0.05)
    address = await server.listen("127.0.0.1", 0)
    fast = await Client.open(address)
    slow = await Client.connect(address)
    slow.send(client_flags(), option(Option.LIST)[:10])
    assert await slow.ended()
    assert await fast.read(0, 512) == bytes(512)
    await server.close()


async def test_requests_may_follow_the_handshake_in_one_piece(rig: Rig) -> None:
    client = await Client.connect(rig.address)
    client.send(
        client_flags(), option(Option.EXPORT_NAME, b"data"), write(1, 0, b"x" * 512), request(Command.READ, 2, 0, 512)
    )
    await client.reader.readexactly(10)
    assert await client.reply() == (1, 0, b"")
    assert await client.reply({2: 512}) == (2, 0, b"x" * 512)
    client.close()


async def test_new_connections_see_exports_that_came_and_went(rig: Rig) -> None:
    before = await Client.open(rig.address)
    rig.add("late")
    del rig.exports["data"]
    late = await Client.open(rig.address, "late")
    await late.write(0, b"late" * 128)
    gone = await Client.connect(rig.address)
    gone.send(client_flags(), go("data"))
    assert (await gone.option_answer()).reply == OptionReply.ERR_UNKNOWN
    assert await before.read(0, 512) == bytes(512)
    for client in (before, late, gone):
        client.close()


async def test_sessions_tell_who_is_connected_to_what(rig: Rig) -> None:
    client = await Client.open(rig.address)
    await client.write(0, b"x" * 512)
    await client.read(0, 512)
    (status,) = rig.server.sessions()
    assert status.peer.startswith("127.0.0.1:")
    assert (status.export, status.requests, status.in_flight) == ("data", 2, 0)
    client.close()


async def test_closing_the_server_ends_every_connection(rig: Rig) -> None:
    busy, silent = await Client.open(rig.address), await Client.connect(rig.address)
    busy.send(write(1, 0, b"x" * 512, flags=CommandFlag.FUA))
    await rig.until(lambda: any(status.requests for status in rig.server.sessions()))
    closing = asyncio.ensure_future(rig.server.close())
    assert await busy.reply() == (1, 0, b"")
    assert await busy.ended()
    assert await silent.ended()
    await closing
    assert rig.server.sessions() == []
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*rig.address)


async def test_an_address_in_use_is_said_to_be(rig: Rig) -> None:
    with pytest.raises(UsageError, match=str(rig.address[1])):
        await rig.server.listen(*rig.address)


async def test_a_unix_socket_serves_and_a_stale_one_is_replaced(rig: Rig, tmp_path: Path) -> None:
    path = str(tmp_path / "nbd.sock")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    await rig.server.listen_unix(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.readexactly(8) == b"NBDMAGIC"
    writer.close()
    with pytest.raises(UsageError, match="in use"):
        await NbdServer(lambda: rig.exports, ChunkPool()).listen_unix(path)
    await rig.server.close()
    assert not os.path.exists(path)


@pytest.mark.parametrize("seed", range(20))
async def test_garbage_closes_its_connection_and_no_other(rig: Rig, seed: int) -> None:
    dice = random.Random(seed)
    well = await Client.open(rig.address)
    if seed % 2:
        ill = await Client.connect(rig.address)
        ill.send(client_flags(), b"IHAVEOPX", dice.randbytes(dice.randrange(8, 5000)))
    else:
        ill = await Client.open(rig.address)
        ill.send(b"\x26", dice.randbytes(dice.randrange(28, 5000)))
    assert await ill.ended()
    assert await well.read(0, 512) == bytes(512)
    well.close()
