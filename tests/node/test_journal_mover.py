"""A journal is moved under its owner's hands: whatever happens, exactly one file is the journal, with every frame."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from crc32c import crc32c

from blockrepl.definition import load
from blockrepl.errors import NoSpaceError, StorageError, UsageError
from blockrepl.formats.journal import FrameHeader, FrameKind
from blockrepl.node.config_file import ConfigFile
from blockrepl.node.journal_mover import check_size, move_journal
from blockrepl.storage import journal_move
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.journal_file import JournalFile
from tests.storage.journals import IDENTITY, body_of
from tests.test_changes import TEXT

MIB = 1 << 20


def good_body(header: FrameHeader, body: memoryview) -> bool:
    return header.kind == FrameKind.NOTE or crc32c(body) == header.body_crc


class Owner:
    """A node's journal and what the node does to it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "g.toml"
        path.write_text(TEXT)
        self.definition = load(path)
        self.node = self.definition.node("p1")
        self.node.directory.mkdir()
        ConfigFile.create(self.definition, self.node)
        JournalFile.create(self.node.journal_path, IDENTITY, MIB)
        self.disk = DiskThread(asyncio.get_running_loop(), "test")
        self.open()
        self.number = 0

    def open(self) -> None:
        """As a start does."""
        self.config = ConfigFile.open(self.definition, self.node)
        self.journal = JournalFile.open(self.config.journal, IDENTITY, good_body, self.disk)

    async def write(self, count: int, size: int = 20_000) -> None:
        for _ in range(count):
            self.number += 1
            body = body_of(self.number, size)
            self.journal.append(FrameKind.RECORD, self.number, 1, 1, 1, crc32c(body), [body], size)
        self.journal.append_note(self.number)
        self.journal.commit()
        await self.settled()

    async def settled(self) -> None:
        """What was asked for is durable."""
        while not self.journal.quiet:  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def move(self, path: Path, ring_bytes: int) -> None:
        state = b"state %d" % self.number
        await move_journal(self.journal, IDENTITY, path, ring_bytes, self.config, lambda: state)

    def numbers(self) -> list[tuple[int, int]]:
        frames = list(self.journal.journal.frames())
        for frame in frames:
            if frame.kind == FrameKind.RECORD:
                body = self.journal.reader()(frame.body_offset, frame.body_bytes)
                assert body == body_of(frame.first, frame.body_bytes)
        return [(frame.kind, frame.first) for frame in frames]

    def again(self) -> None:
        """A new process."""
        self.journal.close()
        self.open()


@pytest.fixture
async def owner(tmp_path: Path) -> AsyncIterator[Owner]:
    owner = Owner(tmp_path)
    yield owner
    owner.disk.close()


@pytest.mark.parametrize("ring_bytes", [MIB, 2 * MIB, 3 * MIB + 4096])
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_every_frame_is_in_the_new_one_and_work_goes_on(
    owner: Owner, ring_bytes: int, *, elsewhere: bool
) -> None:
    await owner.write(18)
    await owner.write(12)
    owner.journal.save(b"old", owner.journal.journal.position_after(10))
    await owner.settled()
    await owner.write(15)  # past the end of the ring
    before, old = owner.numbers(), owner.journal.path
    path = old.with_name("other") if elsewhere else old
    reader, frame = owner.journal.reader(), next(owner.journal.journal.frames())
    await owner.move(path, ring_bytes)
    assert (owner.journal.path, owner.journal.journal.ring_bytes) == (path, ring_bytes)
    assert owner.numbers() == before
    assert reader(frame.body_offset, 20) == body_of(frame.first, 20), "who reads the old one still may"
    assert old.exists() is not elsewhere
    owner.journal.save(b"new", owner.journal.journal.position_after(12))
    await owner.settled()
    await owner.write(3)
    await owner.settled()
    after = owner.numbers()
    assert after[-2:] == [(FrameKind.RECORD, 48), (FrameKind.NOTE, 48)]
    owner.again()
    assert (owner.journal.path, owner.numbers()) == (path, after)
    assert owner.journal.recovered.state == b"new"


async def test_what_is_asked_of_it_meanwhile_waits_and_is_done_in_the_new_one(owner: Owner) -> None:
    await owner.write(20)
    moving = asyncio.create_task(owner.move(owner.journal.path, 2 * MIB))
    while owner.journal.journal.fits(1):  # noqa: ASYNC110
        await asyncio.sleep(0)
    saved = asyncio.Event()
    owner.journal.save(b"asked meanwhile", owner.journal.journal.position_after(5), saved.set)
    with pytest.raises(UsageError, match="being moved already"):
        owner.journal.hold()
    await moving
    await asyncio.wait_for(saved.wait(), 10)
    assert owner.numbers()[0] == (FrameKind.RECORD, 6)
    owner.again()
    assert owner.journal.recovered.state == b"asked meanwhile"
    assert owner.numbers()[0] == (FrameKind.RECORD, 6)


async def test_a_ring_too_small_for_what_is_held_is_refused_and_the_old_one_goes_on(owner: Owner) -> None:
    await owner.move(owner.journal.path, 4 * MIB)
    for _ in range(5):
        await owner.write(20)
    before = owner.numbers()
    with pytest.raises(NoSpaceError, match="too small for what the journal holds"):
        await owner.move(owner.journal.path, MIB)
    assert owner.numbers() == before
    await owner.write(1)
    owner.again()
    assert len(owner.numbers()) == len(before) + 2
    assert [path.name for path in owner.node.directory.iterdir() if "new" in path.name] == []


def closed(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


class Crash(BaseException):
    """The process is gone."""


STEPS = ("save", "name", "move_journal", "adopt", "drop_old_journal")


@pytest.fixture(params=[(step, after) for step in STEPS for after in (False, True)], ids=str)
def _crash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dies before or after a step of a move; nothing is cleaned up then."""
    step, after = request.param
    kind = next(each for each in (journal_move.NewJournal, ConfigFile, JournalFile) if step in vars(each))
    real = getattr(kind, step)

    def crashing(self: object, *args: object) -> None:
        if after:
            real(self, *args)
        raise Crash

    monkeypatch.setattr(kind, step, crashing)
    monkeypatch.setattr(journal_move.NewJournal, "abandon", lambda self: closed(self.fd))
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("_crash")
@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_crash_at_any_step_leaves_exactly_one_valid_journal(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, *, elsewhere: bool
) -> None:
    await owner.write(20)
    before, old = owner.numbers(), owner.journal.path
    path = old.with_name("other") if elsewhere else old
    with suppress(Crash):
        await owner.move(path, 2 * MIB)
    monkeypatch.undo()
    owner.journal._file.fd = -1  # its descriptors die with the process
    closed(owner.journal._fd)
    owner.open()
    owner.config.drop_old_journal()  # as a node does when it starts
    assert owner.numbers() == before
    await owner.move(path, 2 * MIB)  # repeated after the crash
    assert owner.numbers() == before
    assert [each.name for each in owner.node.directory.iterdir() if each in (old, path)] == [path.name]


async def test_a_stranger_is_not_overwritten(owner: Owner, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="exists already"):
        await owner.move(stranger, 2 * MIB)
    with pytest.raises(UsageError, match="is not there"):
        await owner.move(tmp_path / "no" / "disk", 2 * MIB)
    assert stranger.read_bytes() == b"somebody's"


async def test_a_failure_while_it_is_named_stops_the_journal(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody knows then which of both a restart finds: nothing more may be called durable."""

    def failing(self: ConfigFile, *_: Path) -> None:
        raise StorageError("no")

    monkeypatch.setattr(ConfigFile, "move_journal", failing)
    failed: list[StorageError] = []
    owner.journal.on_failed = failed.append
    with pytest.raises(StorageError):
        await owner.move(owner.journal.path.with_name("other"), 2 * MIB)
    assert failed
    with pytest.raises(StorageError):
        await owner.write(1)


def test_the_least_size_is_told() -> None:
    check_size(17 * MIB, 4 * MIB)
    with pytest.raises(UsageError, match="too small"):
        check_size(16 * MIB, 4 * MIB)
