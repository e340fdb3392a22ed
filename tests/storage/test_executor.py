"""The disk thread: order, group commit, partial writes, errors."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest

from blockrepl.block import Buffer
from blockrepl.storage.executor import IOV_MAX, ROUND_MAX, DiskThread, write_all


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
async def disk() -> AsyncIterator[DiskThread]:
    thread = DiskThread(asyncio.get_running_loop(), "test disk")
    yield thread
    thread.close()


class Gate:
    """Holds the thread inside a queued call until opened."""

    def __init__(self, disk: DiskThread) -> None:
        self._entered = threading.Event()
        self._open = threading.Event()
        disk.call(self._wait, lambda _error: None)
        assert self._entered.wait(30)

    def _wait(self) -> None:
        self._entered.set()
        assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


async def synced(disk: DiskThread, fd: int) -> OSError | None:
    done: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    disk.sync(fd, done.set_result)
    return await done


@pytest.mark.parametrize("most", [1, 7, 4096, 1 << 30])
def test_partial_writes_are_continued(fd: int, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    real = os.pwritev

    def short(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
        left, part = most, []
        for buffer in buffers[: 2 * most + 40]:
            part.append(memoryview(buffer)[:left])
            left -= len(part[-1])
        return real(fd, part, offset)

    monkeypatch.setattr(os, "pwritev", short)
    random = Random(most)
    buffers: list[Buffer] = [random.randbytes(random.choice([0, 1, 2, 30])) for _ in range(IOV_MAX + 3)]
    write_all(fd, 5, buffers)
    assert os.pread(fd, 1 << 20, 5) == b"".join(buffers)


def test_a_write_that_makes_no_progress_is_an_error_and_not_a_hang(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="nothing"):
        write_all(fd, 0, [b"x"])


def test_writing_nothing_is_fine(fd: int) -> None:
    write_all(fd, 0, [])
    write_all(fd, 0, [b"", b""])


async def test_a_sync_covers_every_write_before_it(disk: DiskThread, fd: int) -> None:
    order: list[str] = []
    for turn in range(100):
        disk.write(fd, turn * 10, [b"%010d" % turn], lambda _error: order.append("write"))
    assert await synced(disk, fd) is None
    assert order == ["write"] * 100
    assert os.pread(fd, 10, 990) == b"%010d" % 99


async def test_syncs_that_arrive_meanwhile_become_one(
    disk: DiskThread, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = os.fdatasync

    def counted(fd: int) -> None:
        calls.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    gate = Gate(disk)
    answers: list[OSError | None] = []
    reached: list[tuple[int, OSError | None]] = []
    for turn in range(20):
        disk.write(fd, turn, [b"x"])
        disk.sync(fd, answers.append)
        disk.sync_through(fd, turn, lambda position, error: reached.append((position, error)))
    gate.open()
    assert await synced(disk, fd) is None
    assert answers == [None] * 20
    assert len(calls) <= 2
    assert reached[-1] == (19, None)
    assert len(reached) == 1, "one answer for an fdatasync"


async def test_a_failed_write_fails_the_next_sync_of_that_file_only(disk: DiskThread, fd: int, tmp_path: Path) -> None:
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    gate = Gate(disk)
    answers: dict[str, OSError | None] = {}
    disk.write(read_only, 0, [b"x"], lambda error: answers.update(write=error))
    disk.sync_through(read_only, 1, lambda _position, error: answers.update(through=error))
    disk.sync(read_only, lambda error: answers.update(sync=error))
    disk.sync(other, lambda error: answers.update(other=error))
    gate.open()
    assert await synced(disk, fd) is None
    for name in ("write", "through", "sync"):
        error = answers[name]
        assert error is not None
        assert error.errno == errno.EBADF
    assert answers["other"] is None
    os.close(other)
    os.close(read_only)


async def test_a_failed_sync_is_reported_to_all_that_it_was_for(
    disk: DiskThread, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad(fd: int) -> None:
        raise OSError(errno.EIO, "no disk")

    monkeypatch.setattr(os, "fdatasync", bad)
    gate = Gate(disk)
    answers: list[OSError | None] = []
    disk.sync(fd, answers.append)
    disk.sync_through(fd, 1, lambda _position, error: answers.append(error))
    gate.open()
    last = await synced(disk, fd)
    assert [error.errno for error in (*answers, last) if error] == [errno.EIO] * 3


async def test_calls_run_in_their_place_and_their_errors_are_reported(disk: DiskThread, fd: int) -> None:
    seen: list[bytes] = []
    answers: list[OSError | None] = []
    disk.write(fd, 0, [b"before"])
    disk.call(lambda: seen.append(os.pread(fd, 10, 0)), answers.append)
    disk.call(lambda: os.close(-1), answers.append)
    disk.call(lambda: seen.append(b"%d" % [][0]), answers.append)
    assert await synced(disk, fd) is None
    assert seen == [b"before"]
    assert answers[0] is None
    assert isinstance(answers[1], OSError)
    assert "IndexError" in str(answers[2]), "a mistake of ours is reported too, and the thread lives"


async def test_a_callback_that_raises_does_not_swallow_the_others(disk: DiskThread, fd: int) -> None:
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _loop, context: complaints.append(context))

    def bad(_error: OSError | None) -> None:
        raise ValueError("mine")

    gate = Gate(disk)
    answers: list[OSError | None] = []
    disk.sync(fd, bad)
    disk.sync(fd, answers.append)
    gate.open()
    assert await synced(disk, fd) is None
    assert answers == [None]
    assert len(complaints) == 1


async def test_closing_finishes_what_is_queued(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    disk = DiskThread(asyncio.get_running_loop(), "test disk")
    for turn in range(500):
        disk.write(fd, turn, [b"x"])
    disk.close()
    assert os.fstat(fd).st_size == 500
    os.close(fd)


def test_a_loop_that_is_gone_does_not_hurt_the_thread(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    loop = asyncio.new_event_loop()
    disk = DiskThread(loop, "test disk")
    loop.close()
    disk.write(fd, 0, [b"x"], lambda _error: None)
    disk.write(fd, 1, [b"y"])
    disk.close()
    assert os.pread(fd, 2, 0) == b"xy"
    os.close(fd)


async def test_more_than_a_round_of_operations_is_performed_in_order(disk: DiskThread, fd: int) -> None:
    told: list[int] = []
    count = 2 * ROUND_MAX + 3
    gate = Gate(disk)
    for number in range(count):
        disk.write(fd, number * 4, [number.to_bytes(4, "big")], lambda _, number=number: told.append(number))  # type: ignore[misc]
    gate.open()
    assert await synced(disk, fd) is None
    assert told == [*range(count)]
    assert os.pread(fd, count * 4, 0) == b"".join(number.to_bytes(4, "big") for number in range(count))


async def test_of_syncs_through_positions_that_become_one_the_last_is_told(disk: DiskThread, fd: int) -> None:
    told: list[int] = []
    gate = Gate(disk)
    for position in (10, 20, 30):
        disk.sync_through(fd, position, lambda position, _: told.append(position))
    gate.open()
    assert await synced(disk, fd) is None
    assert told == [30]
