"""Bitmaps of a simulated machine, over its files: bytes of bits, written whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from blockrepl.bitmap import Bitmap
from tests.sim.disk import SimFile

if TYPE_CHECKING:
    from tests.sim.process import Process

BITMAP_BLOCK = 4096


class SimBitmaps:
    """The bitmaps of one life of a process, by volume; `save` is the port of the hosts."""

    def __init__(self, process: Process, prefix: str, sizes: Mapping[int, int]) -> None:
        """``sizes``: volume → bytes. The files were made by `make`. As `BitmapFile.open`: what a killed process left in
        the page cache is written and synced again."""
        self._process = process
        self._files = {volume: process.machine.files[f"{prefix} {volume}"] for volume in sizes}
        self.bitmaps = {
            volume: Bitmap(size, BITMAP_BLOCK, bytes(self._files[volume].cache)) for volume, size in sizes.items()
        }
        self.on_failed: Callable[[OSError], None] = lambda _error: None
        self._flying = False
        self._waiting: list[Callable[[], None]] = []
        for volume, bitmap in self.bitmaps.items():
            process.effect()
            self._files[volume].write(0, bytes(bitmap.bits))
            self._files[volume].sync()

    @staticmethod
    def make(process: Process, prefix: str, sizes: Mapping[int, int]) -> None:
        """`create`: all clear."""
        for volume, size in sizes.items():
            process.machine.files[f"{prefix} {volume}"] = SimFile(len(Bitmap(size, BITMAP_BLOCK).bits))

    def save(self, done: Callable[[], None]) -> None:
        """Write what changed, sync it, then ``done``; behind a save under way, as `BitmapFile.save`."""
        self._waiting.append(done)
        if not self._flying:
            self._start()

    def _start(self) -> None:
        waiting, self._waiting = self._waiting, []
        wanted = [volume for volume, bitmap in self.bitmaps.items() if bitmap.changed]
        left = len(wanted)
        if not left:
            for done in waiting:
                self._process.workers.later(done)
            return
        self._flying = True

        def synced(error: OSError | None) -> None:
            nonlocal left
            left -= 1
            if error is not None:
                self.on_failed(error)
            elif not left:
                self._flying = False
                if self._waiting:
                    self._start()
                for done in waiting:
                    done()

        for volume in wanted:
            self.bitmaps[volume].changed.clear()
            self._process.effect()
            try:
                self._files[volume].write(0, bytes(self.bitmaps[volume].bits))
            except OSError as error:
                self.on_failed(error)
                return
            self._process.disk.sync(self._files[volume].fd, synced)
