"""The journal volume in a real file: making, opening, group commit, fail-stop."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from crc32c import crc32c

from blockrepl.block import Buffer
from blockrepl.errors import (
    DamagedError,
    IdentityError,
    InUseError,
    MissingError,
    NoSpaceError,
    StorageError,
    UsageError,
)
from blockrepl.formats.journal import RING_OFFSET, FrameKind
from blockrepl.storage import journal_file
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.journal_file import JournalFile
from tests.storage.journals import IDENTITY, RING_BYTES, body_of, good_body

SIZE_BYTES = RING_OFFSET + RING_BYTES


class Desk:
    """Opens and closes one journal file, as the processes of a node would in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: JournalFile | None = None
        self.disk: DiskThread | None = None
        self.durable: asyncio.Event = asyncio.Event()
        self.inline_bytes = -1  # all commits by the thread, unless a test says otherwise

    def open(self, ring_bytes: int | None = RING_BYTES) -> JournalFile:
        self.disk = DiskThread(asyncio.get_running_loop(), "test disk")
        try:
            self.file = JournalFile.open(self.path, IDENTITY, good_body, self.disk, ring_bytes)
        except BaseException:
            self.disk.close()
            raise
        self.file.inline_bytes = self.inline_bytes
        self.file.on_durable = lambda _position: self.durable.set()
        return self.file

    def close(self) -> None:
        if self.file is not None and self.disk is not None:
            self.disk.close()
            self.file.close()
            self.file = None

    async def until_durable(self, position: int) -> None:
        assert self.file is not None
        while self.file.journal.durable < position:
            self.durable.clear()
            await self.durable.wait()

    async def save(self, state: bytes, trim_to: int = 0) -> None:
        assert self.file is not None
        done = asyncio.Event()
        self.file.save(state, trim_to, done.set)
        await done.wait()


def append(file: JournalFile, number: int, size: int = 100) -> int:
    body = body_of(number, size)
    return file.append(FrameKind.RECORD, number, 1, 3, 1, crc32c(body), [body], len(body))


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    desk = Desk(tmp_path / "journal")
    JournalFile.create(desk.path, IDENTITY, RING_BYTES, b"first state")
    yield desk
    desk.close()


async def test_a_new_journal_is_written_whole_and_empty(desk: Desk) -> None:
    status = desk.path.stat()
    assert status.st_size == SIZE_BYTES
    assert status.st_blocks * 512 >= SIZE_BYTES, "no holes"
    assert status.st_mode & 0o777 == 0o600
    file = desk.open()
    assert file.recovered.state == b"first state"
    assert len(file.journal.index) == 0
    assert file.journal.free_bytes == RING_BYTES


async def test_what_is_durable_is_there_after_a_restart(desk: Desk) -> None:
    file = desk.open()
    for number in range(1, 40):
        append(file, number, 100 * number)
        if number % 5 == 0:
            file.append_note(number)
        file.commit()
    await desk.until_durable(file.journal.tail)
    desk.close()
    file = desk.open()
    refs = [ref for ref in file.journal.frames() if ref.kind == FrameKind.RECORD]
    assert [ref.first for ref in refs] == list(range(1, 40))
    assert file.journal.index.last_note() == 35
    for ref in refs:
        expected = body_of(ref.first, 100 * ref.first)
        assert file.read(ref.body_offset, ref.body_bytes) == expected
        view = memoryview(bytearray(ref.body_bytes))
        if file.read_cached(ref.body_offset, view):
            assert view == expected


async def test_a_ring_goes_round_for_many_laps(desk: Desk) -> None:
    file = desk.open()
    random = Random(2)
    number, given_up = 0, 0
    while file.journal.tail < 6 * RING_BYTES:
        size = random.choice([10, 5000, 60000])
        while not file.journal.fits(size):
            file.commit()
            await desk.until_durable(file.journal.tail)
            given_up = number - 1
            await desk.save(b"trimmed", file.journal.position_after(given_up))
        number += 1
        append(file, number, size)
    file.commit()
    await desk.until_durable(file.journal.tail)
    desk.close()
    file = desk.open()
    assert [ref.first for ref in file.journal.frames()] == list(range(given_up + 1, number + 1))
    assert file.recovered.state == b"trimmed"


async def test_what_was_appended_together_is_one_write_and_one_sync(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = desk.open()
    writes: list[int] = []
    real = os.pwritev

    def counted(fd: int, part: list[Buffer], at: int) -> int:
        writes.append(at)
        return real(fd, part, at)

    monkeypatch.setattr(os, "pwritev", counted)
    told: list[int] = []
    done = asyncio.Event()

    def on_durable(position: int) -> None:
        told.append(position)
        done.set()

    file.on_durable = on_durable
    for number in range(1, 33):
        append(file, number)
    file.commit()
    await done.wait()
    assert len(writes) == 1
    assert told == [file.journal.tail]


async def test_saves_take_turns_and_each_trim_goes_with_a_state_that_covers_it(desk: Desk) -> None:
    file = desk.open()
    for number in range(1, 60):
        append(file, number)
    file.commit()
    await desk.until_durable(file.journal.tail)
    told: list[int] = []
    finished = asyncio.Event()
    for number in range(1, 50):
        trim_to = file.journal.position_after(number)
        file.save(b"%d" % number, trim_to, lambda number=number: told.append(number))  # type: ignore[misc]
        assert file.journal.head <= trim_to
    file.save(b"50", 0, finished.set)
    await finished.wait()
    assert told == list(range(1, 50))
    desk.close()
    file = desk.open()
    assert file.recovered.state == b"50"
    assert [ref.first for ref in file.journal.frames()] == list(range(50, 60))


async def test_truncation_is_durable_and_appends_go_on_behind_it(desk: Desk) -> None:
    file = desk.open()
    for number in range(1, 10):
        append(file, number)
    file.commit()
    await desk.until_durable(file.journal.tail)
    dropped: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    file.save(b"in the air")
    file.truncate(file.journal.position_after(6), b"cut", lambda numbers, size: dropped.set_result((numbers, size)))
    assert await dropped == (3, 300)
    append(file, 7, 500)
    file.commit()
    await desk.until_durable(file.journal.tail)
    desk.close()
    file = desk.open()
    assert file.recovered.state == b"cut"
    assert [(ref.first, ref.body_bytes) for ref in file.journal.frames()][5:] == [(6, 100), (7, 500)]


async def test_a_small_commit_runs_on_the_loop_and_is_durable_when_it_returns(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.inline_bytes = 1 << 16
    file = desk.open()
    flags: list[int] = []
    real = os.pwritev

    def counted(fd: int, part: list[Buffer], at: int, flag: int = 0) -> int:
        flags.append(flag)
        return real(fd, part, at, flag)

    monkeypatch.setattr(os, "pwritev", counted)
    for number in range(1, 4):
        append(file, number)
    file.commit()
    assert file.journal.durable == file.journal.tail
    assert flags == [os.RWF_DSYNC]
    desk.close()
    file = desk.open()
    assert [ref.first for ref in file.journal.frames()] == [1, 2, 3]


async def test_an_error_in_a_commit_on_the_loop_acknowledges_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.inline_bytes = 1 << 16
    file = desk.open()
    told: list[int] = []
    failures: list[StorageError] = []
    file.on_durable, file.on_failed = told.append, failures.append

    def bad(*_: object) -> int:
        raise OSError(errno.EIO, "no disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", bad)
        append(file, 1)
        file.commit()
    assert (told, len(failures)) == ([], 1)
    with pytest.raises(StorageError):
        file.commit()


async def test_while_the_thread_syncs_a_small_commit_goes_to_it_too(desk: Desk) -> None:
    """Else what it writes here would be reported durable before what it follows."""
    file = desk.open()
    told: list[int] = []
    done = asyncio.Event()

    def on_durable(position: int) -> None:
        told.append(position)
        if position == file.journal.tail:
            done.set()

    file.on_durable = on_durable
    append(file, 1)
    file.commit()
    first = file.journal.tail
    file.inline_bytes = 1 << 16
    append(file, 2)
    file.commit()
    assert told == []
    await done.wait()
    assert told in ([first, file.journal.tail], [file.journal.tail])


async def test_truncation_takes_what_was_not_even_written_yet(desk: Desk) -> None:
    file = desk.open()
    for number in range(1, 10):
        append(file, number)
    dropped: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
    file.truncate(file.journal.position_after(6), b"cut", lambda numbers, size: dropped.set_result((numbers, size)))
    assert await dropped == (3, 300)
    assert file.journal.durable == file.journal.tail, "what stays was made durable first"
    desk.close()
    assert [ref.first for ref in desk.open().journal.frames()] == [1, 2, 3, 4, 5, 6]


async def test_no_commit_runs_on_the_loop_beside_a_save_in_the_thread(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a write-back error once per open file: the save's sync could swallow the commit's."""
    file = desk.open()
    file.inline_bytes = 1 << 18
    here: list[int] = []
    monkeypatch.setattr(journal_file, "write_durably", lambda _fd, offset, _buffers: here.append(offset))
    saved = asyncio.Event()
    file.save(b"in the air", done=saved.set)
    append(file, 1)
    file.commit()
    assert here == []
    assert file.journal.durable == 0
    await saved.wait()
    await desk.until_durable(file.journal.tail)
    append(file, 2)
    file.commit()
    assert len(here) == 1


@pytest.mark.parametrize("call", ["fdatasync", "pwritev"])
async def test_after_an_error_nothing_is_acknowledged_any_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """PROTOCOL, rule 11: also not when a later sync succeeds."""
    file = desk.open()
    told: list[int] = []
    file.on_durable = told.append
    failures: list[StorageError] = []
    failed = asyncio.Event()

    def on_failed(error: StorageError) -> None:
        failures.append(error)
        failed.set()

    file.on_failed = on_failed

    def bad(*_: object) -> int:
        raise OSError(errno.EIO, "no disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, bad)
        append(file, 1)
        file.commit()
        file.save(b"never")
        await failed.wait()
    assert desk.disk is not None
    later: asyncio.Future[OSError | None] = asyncio.get_running_loop().create_future()
    desk.disk.sync_through(file._fd, file.journal.tail, file._synced)
    desk.disk.sync(file._fd, later.set_result)
    assert await later is None
    assert told == []
    assert len(failures) == 1
    for attempt in (lambda: append(file, 2), file.commit, lambda: file.save(b""), lambda: file.append_note(1)):
        with pytest.raises(StorageError):
            attempt()


async def test_a_journal_that_is_not_there_or_not_ours_is_refused(desk: Desk) -> None:
    disk = DiskThread(asyncio.get_running_loop(), "test disk")
    with pytest.raises(MissingError):
        JournalFile.open(desk.path.with_name("other"), IDENTITY, good_body, disk)
    with pytest.raises(IdentityError):
        JournalFile.open(desk.path, IDENTITY._replace(node_id=5), good_body, disk)
    with pytest.raises(IdentityError):
        JournalFile.open(desk.path, IDENTITY, good_body, disk, 2 * RING_BYTES)
    desk.open()
    with pytest.raises(InUseError):
        JournalFile.open(desk.path, IDENTITY, good_body, disk)
    desk.close()
    os.truncate(desk.path, SIZE_BYTES // 2)
    with pytest.raises(DamagedError):
        JournalFile.open(desk.path, IDENTITY, good_body, disk)
    disk.close()


async def test_a_damaged_journal_is_left_as_it_is(desk: Desk) -> None:
    file = desk.open()
    for number in range(1, 5):
        append(file, number)
        file.commit()
        await desk.until_durable(file.journal.tail)
    desk.close()
    fd = os.open(desk.path, os.O_WRONLY)
    os.pwrite(fd, b"rot", RING_OFFSET + 4096 + 70)
    os.close(fd)
    before = desk.path.read_bytes()
    with pytest.raises(DamagedError, match="after number 1"):
        desk.open()
    assert desk.path.read_bytes() == before


def test_a_journal_is_never_made_over_another_one(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"something")
    with pytest.raises(UsageError):
        JournalFile.create(path, IDENTITY, RING_BYTES)
    assert path.read_bytes() == b"something"


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(NoSpaceError):
        JournalFile.create(tmp_path / "journal", IDENTITY, RING_BYTES)
    assert list(tmp_path.iterdir()) == []


def test_a_journal_larger_than_the_disk_is_refused_by_the_disk_itself(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    too_much = (free.f_bavail * free.f_frsize + (64 << 30)) // RING_BYTES * RING_BYTES
    with pytest.raises(NoSpaceError):
        JournalFile.create(tmp_path / "journal", IDENTITY, too_much)
    assert list(tmp_path.iterdir()) == []
