"""Nobody is told that an image is durable before a sync that covers its last write has ended."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from blockrepl.node.volume_sync import VolumeSync

Done = Callable[[OSError | None], None]


class SlowDisk:
    """Syncs end when the test says so, in the order asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Done]] = []

    def sync(self, fd: int, done: Done) -> None:
        self.asked.append((fd, done))

    def end(self, error: OSError | None = None) -> int:
        fd, done = self.asked.pop(0)
        done(error)
        return fd


class Soon:
    """Workers whose `later` is now."""

    def run(self, function: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        raise AssertionError("nothing blocks here")

    def later(self, function: Callable[[], None]) -> None:
        function()


def made() -> tuple[VolumeSync, SlowDisk, list[OSError | None]]:
    disk = SlowDisk()
    images: Any = {volume: SimpleNamespace(fd=100 + volume) for volume in (1, 2)}
    sync = VolumeSync(images, disk, Soon())
    sync.sync(lambda _: None)
    assert [disk.end(), disk.end()] == [101, 102]
    return sync, disk, []


def test_the_first_sync_covers_what_a_killed_process_left_in_the_page_cache() -> None:
    """A primary that was alone never writes it again, and its bits are cleared at the end of the resync."""
    disk, told = SlowDisk(), []  # type: tuple[SlowDisk, list[OSError | None]]
    images: Any = {volume: SimpleNamespace(fd=100 + volume) for volume in (1, 2)}
    VolumeSync(images, disk, Soon()).sync(told.append)
    assert [disk.end(), disk.end()] == [101, 102]
    assert told == [None]


def test_only_what_was_written_is_synced() -> None:
    sync, disk, told = made()
    sync.touch([2])
    sync.sync(told.append)
    assert told == []
    assert disk.end() == 102
    assert told == [None]
    sync.sync(told.append)
    assert (told, disk.asked) == ([None, None], [])


def test_a_sync_that_is_under_way_for_somebody_else_is_waited_for() -> None:
    """Else a takeover would call S-VOLs durable whose last writes a checkpoint is still syncing."""
    sync, disk, told = made()
    sync.touch([1])
    sync.sync(lambda _: None)
    sync.sync(told.append)
    disk.end()
    assert told == []
    disk.end()
    assert told == [None]


def test_what_is_written_during_a_sync_is_not_called_clean_by_it() -> None:
    sync, disk, told = made()
    sync.touch([1])
    sync.sync(told.append)
    sync.touch([1])
    disk.end()
    sync.sync(told.append)
    assert told == [None]
    assert disk.end() == 101


def test_what_is_written_between_two_syncs_is_not_called_clean_by_the_second() -> None:
    """Both began before the write, for two who asked: a power cut could take it when the journal has given it up."""
    sync, disk, told = made()
    sync.touch([1])
    sync.sync(told.append)
    sync.sync(told.append)
    disk.end()
    sync.touch([1])
    disk.end()
    assert told == [None, None]
    sync.sync(told.append)
    assert told == [None, None]
    assert disk.end() == 101


def test_an_error_is_told_once_and_the_image_stays_unsynced() -> None:
    sync, disk, told = made()
    sync.touch([1, 2])
    sync.sync(told.append)
    error = OSError(5, "no disk")
    disk.end(error)
    disk.end(error)
    assert told == [error]
    sync.sync(told.append)
    assert [fd for fd, _ in disk.asked] == [101, 102]
