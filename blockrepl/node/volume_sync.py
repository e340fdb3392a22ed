"""Makes images durable: all of them once, then those that were written since they last were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from blockrepl.node.ports import Disk, Image, Workers


class VolumeSync:
    """What has been written and not synced, of the images of a node.

    Invariant: an image leaves ``_unsynced`` only when a sync that began after its last write has ended well.
    """

    def __init__(self, images: Mapping[int, Image], disk: Disk, workers: Workers) -> None:
        self._images = images
        self._disk = disk
        self._workers = workers
        # Volume → which touch was the last; no two have the same number. What a killed process wrote may be in the page
        # cache only, and a primary that was alone never writes it again.
        self._unsynced = dict.fromkeys(images, 0)
        self._touches = 0

    def touch(self, volumes: Iterable[int]) -> None:
        """These were written."""
        self._touches += 1
        for volume in volumes:
            self._unsynced[volume] = self._touches

    def sync(self, done: Callable[[OSError | None], None]) -> None:
        """Make durable all that was written before this call, then ``done`` on the loop; with the first error at once.

        An image whose sync is under way for somebody else is waited for too.
        """
        wanted = dict(self._unsynced)
        waiting = len(wanted)
        failed = False
        if not waiting:
            self._workers.later(lambda: done(None))
            return

        def synced(volume: int, error: OSError | None) -> None:
            nonlocal waiting, failed
            waiting -= 1
            if error is None and self._unsynced.get(volume) == wanted[volume]:
                del self._unsynced[volume]
            if failed:
                return
            failed = error is not None
            if failed or not waiting:
                done(error)

        for volume in sorted(wanted):
            self._disk.sync(self._images[volume].fd, partial(synced, volume))
