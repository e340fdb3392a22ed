"""The byte pump over socket pairs and loopback."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable

import pytest

from blockrepl.chunks import CHUNK_BYTES, Chunk, ChunkPool
from blockrepl.stream import EXACT_BYTES, Stream


class Frames:
    """A consumer of frames: four bytes of length, then as many bytes. Keeps views, as a batch does, while told to."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.kept: list[tuple[Chunk, memoryview]] = []
        self.keep = False
        self.after: Callable[[], None] = lambda: None
        self.ends: list[OSError | None] = []
        self.drains = 0

    def received(self, chunk: Chunk, start: int, end: int) -> tuple[int, int]:
        at, need = start, 0
        while end - at >= 4:
            size = 4 + int.from_bytes(chunk.view[at : at + 4], "big")
            if at + size > end:
                need = size
                break
            payload = chunk.view[at + 4 : at + size]
            if self.keep:
                chunk.hold()
                self.kept.append((chunk, payload))
            else:
                self.frames.append(bytes(payload))
            at += size
            self.after()
        return at - start, need

    def release(self) -> None:
        """The batch is done: take what the views show by now."""
        for chunk, payload in self.kept:
            self.frames.append(bytes(payload))
            chunk.release()
        self.kept.clear()

    def lost(self, error: OSError | None) -> None:
        self.ends.append(error)

    def drained(self) -> None:
        self.drains += 1


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


class Rig:
    def __init__(self, pool: ChunkPool | None = None) -> None:
        ours, self.peer = socket.socketpair()
        self.peer.setblocking(False)
        self.pool = pool or ChunkPool()
        self.consumer = Frames()
        self.stream = Stream(ours, self.consumer, self.pool)

    async def give(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, data)

    async def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await asyncio.get_running_loop().sock_recv(self.peer, count - len(data))
            assert part
            data += part
        return data

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    def close(self) -> None:
        self.stream.close()
        self.peer.close()


SIZES = [0, 1, 28, 512, 4096, EXACT_BYTES - 5, EXACT_BYTES, CHUNK_BYTES - 4, CHUNK_BYTES, CHUNK_BYTES + 1, 1 << 20]


@pytest.mark.parametrize("seed", range(30))
async def test_frames_arrive_whole_and_in_order_however_they_are_cut(seed: int) -> None:
    dice = random.Random(seed)
    rig = Rig()
    rig.consumer.keep = bool(seed % 2)
    frames = [os.urandom(dice.choice(SIZES[: dice.randrange(3, len(SIZES) + 1)])) for _ in range(40)]
    data = b"".join(map(frame, frames))
    releasing = dice.random()

    async def give() -> None:
        at = 0
        while at < len(data):
            size = min(dice.choice((1, 3, 27, 4000, 70000, 300000)) * dice.randrange(1, 4), len(data) - at)
            await rig.give(data[at : at + size])
            at += size
            if dice.random() < 0.7:
                await asyncio.sleep(0)
            if dice.random() < releasing:
                rig.consumer.release()

    await give()
    await rig.until(lambda: len(rig.consumer.frames) + len(rig.consumer.kept) == len(frames))
    rig.consumer.release()
    assert rig.consumer.frames == frames
    rig.close()


async def test_many_streams_of_one_pool_do_not_mix_their_frames() -> None:
    pool = ChunkPool()
    dice = random.Random(5)
    rigs = [Rig(pool) for _ in range(20)]
    sent: list[list[bytes]] = [[] for _ in rigs]
    rest = [b"" for _ in rigs]
    for turn in range(600):
        at = dice.randrange(len(rigs))
        rigs[at].consumer.keep = dice.random() < 0.5
        if not rest[at]:
            sent[at].append(os.urandom(dice.choice((0, 100, 5000, 60000, 100000))))
            rest[at] = frame(sent[at][-1])
        size = dice.choice((2, 1000, 200000))
        await rigs[at].give(rest[at][:size])
        rest[at] = rest[at][size:]
        if turn % 7 == 0:
            await asyncio.sleep(0)
            rigs[dice.randrange(len(rigs))].consumer.release()
    for rig, left in zip(rigs, rest, strict=True):
        await rig.give(left)
    for rig, frames in zip(rigs, sent, strict=True):
        await rig.until(lambda rig=rig, frames=frames: len(rig.consumer.frames) + len(rig.consumer.kept) == len(frames))  # type: ignore[misc]
        rig.consumer.release()
        assert sorted(rig.consumer.frames) == sorted(frames)
        rig.close()


async def test_a_thousand_idle_streams_own_no_chunk() -> None:
    pool = ChunkPool()
    rigs = [Rig(pool) for _ in range(300)]
    for rig in rigs:
        await rig.give(frame(b"x" * 1000))
    for rig in rigs:
        await rig.until(lambda rig=rig: rig.consumer.frames == [b"x" * 1000])  # type: ignore[misc]
    assert all(rig.stream._chunk is None for rig in rigs)
    assert len(pool._free) <= 1
    for rig in rigs:
        rig.close()


async def test_what_is_sent_arrives_in_order_and_chunks_are_released_when_the_kernel_took_them() -> None:
    rig = Rig()
    chunk = rig.pool.take()
    chunk.view[:] = b"c" * len(chunk.buffer)
    parts: list[bytes | memoryview] = [b"one", b"", b"two" * 100000, memoryview(b"three")]
    rig.stream.send(parts)
    rig.stream.send([chunk.view[:100000], chunk.view[:50000]], chunk)
    rig.stream.send([b"end"])
    assert rig.stream.queued_bytes > 0
    assert chunk.users == 1
    expected = b"one" + b"two" * 100000 + b"three" + b"c" * 150000 + b"end"
    assert await rig.take(len(expected)) == expected
    await rig.until(lambda: rig.stream.queued_bytes == 0)
    assert chunk.users == 0
    assert rig.consumer.drains == 1
    rig.close()


async def test_more_buffers_than_one_system_call_takes_are_sent() -> None:
    rig = Rig()
    rig.stream.send([b"%06d" % n for n in range(5000)])
    assert await rig.take(30000) == b"".join(b"%06d" % n for n in range(5000))
    rig.close()


async def test_a_chunk_without_bytes_is_released_at_once() -> None:
    rig = Rig()
    chunk = rig.pool.take()
    rig.stream.send([], chunk)
    assert chunk.users == 0
    chunk = rig.pool.take()
    rig.stream.send([b"", chunk.view[:0]], chunk)
    assert chunk.users == 0
    assert rig.stream.queued_bytes == 0
    rig.close()


async def test_a_paused_stream_leaves_bytes_where_they_are() -> None:
    rig = Rig()
    rig.stream.pause()
    await rig.give(frame(b"later"))
    for _ in range(10):
        await asyncio.sleep(0)
    assert rig.consumer.frames == []
    rig.stream.resume()
    await rig.until(lambda: rig.consumer.frames == [b"later"])
    rig.close()


async def test_finish_sends_what_is_queued_and_then_closes() -> None:
    rig = Rig()
    rig.stream.send([b"x" * 1_000_000])
    rig.stream.finish()
    closed_at_once = rig.stream.closed
    rig.stream.send([b"too late"])
    assert await rig.take(1_000_000) == b"x" * 1_000_000
    assert await asyncio.get_running_loop().sock_recv(rig.peer, 10) == b""
    assert (closed_at_once, rig.stream.closed) == (False, True)
    assert rig.consumer.ends == []
    rig.close()


async def test_close_drops_what_is_queued_and_releases_its_chunks() -> None:
    rig = Rig()
    chunk = rig.pool.take()
    rig.stream.send([b"x" * 1_000_000, chunk.view[:10]], chunk)
    rig.stream.close()
    assert chunk.users == 0
    assert rig.stream.queued_bytes == 0
    late = rig.pool.take()
    rig.stream.send([b"late"], late)
    assert late.users == 0
    rig.stream.close()
    rig.stream.resume()
    assert rig.consumer.ends == []
    rig.close()


async def test_closing_amid_a_frame_gives_the_chunk_back() -> None:
    rig = Rig()
    await rig.give(frame(b"x" * 100000)[:-1])
    await rig.until(lambda: rig.stream._end - rig.stream._start >= 100000)
    chunk = rig.stream._chunk
    assert chunk is not None
    rig.stream.close()
    assert chunk.users == 0
    rig.close()


async def test_a_consumer_may_close_while_it_is_being_fed() -> None:
    rig = Rig()
    rig.consumer.after = rig.stream.close
    await rig.give(frame(b"one"))
    await rig.until(lambda: rig.stream.closed)
    assert rig.consumer.frames == [b"one"]
    assert rig.consumer.ends == []
    other = Rig(rig.pool)
    await other.give(frame(b"two"))
    await other.until(lambda: other.consumer.frames == [b"two"])
    other.close()
    rig.close()


async def test_the_peers_end_is_told_once() -> None:
    rig = Rig()
    await rig.give(frame(b"last words"))
    rig.peer.close()
    await rig.until(lambda: bool(rig.consumer.ends))
    assert rig.consumer.frames == [b"last words"]
    assert rig.consumer.ends == [None]
    assert rig.stream.closed
    rig.stream.close()


async def test_a_send_that_fails_is_told_once_and_releases() -> None:
    rig = Rig()
    rig.peer.close()
    chunk = rig.pool.take()
    rig.stream.send([chunk.view[:10]], chunk)
    assert chunk.users == 0
    assert rig.stream.closed
    assert len(rig.consumer.ends) == 1
    assert isinstance(rig.consumer.ends[0], OSError)
    rig.stream.close()


async def test_a_consumer_may_send_while_it_is_being_fed_and_lose_the_peer_by_it() -> None:
    rig = Rig()
    await rig.give(frame(b"one") + frame(b"two"))
    rig.peer.close()
    rig.consumer.after = lambda: rig.stream.send([b"answer"])
    await rig.until(lambda: rig.stream.closed)
    assert rig.consumer.frames == [b"one", b"two"]
    assert len(rig.consumer.ends) == 1


async def test_large_frames_are_received_in_place_and_their_tails_are_not_copied() -> None:
    rig = Rig()
    rig.consumer.keep = True
    frames = [os.urandom(1 << 20) for _ in range(4)]
    task = asyncio.ensure_future(rig.give(b"".join(map(frame, frames))))
    await rig.until(lambda: len(rig.consumer.kept) == 4)
    await task
    assert all(len(chunk.buffer) >= (1 << 20) for chunk, _ in rig.consumer.kept[1:])
    rig.consumer.release()
    assert rig.consumer.frames == frames
    rig.close()


async def test_a_peer_that_stops_amid_a_header_or_announces_much_holds_little() -> None:
    pool = ChunkPool()
    rigs = [Rig(pool) for _ in range(100)]
    for rig in rigs[:50]:
        await rig.give(frame(b"x" * 1000) + b"\0\0")
    for rig in rigs[50:]:
        await rig.give((1 << 25).to_bytes(4, "big") + b"y" * EXACT_BYTES)
    for rig in rigs:
        await rig.until(lambda rig=rig: rig.stream._chunk is not None)  # type: ignore[misc]
    assert all(len(rig.stream._chunk.buffer) <= 512 for rig in rigs[:50] if rig.stream._chunk)
    for rig in rigs[:50]:
        await rig.give(b"\0\4last")
        await rig.until(lambda rig=rig: rig.consumer.frames == [b"x" * 1000, b"last"])  # type: ignore[misc]
    for rig in rigs:
        rig.close()
