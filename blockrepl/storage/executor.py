"""The disk thread: writes and syncs off the event loop, grouped.

One thread drains a queue. Everything that arrived during one ``fdatasync`` is its next batch: one sync then covers
all of it (group commit). An executor hop per sync cost a third of the throughput (DESIGN, section 6).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

from blockrepl.block import Buffer

IOV_MAX = 1000
Done = Callable[[OSError | None], None]


def write_all(fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """``pwritev`` until everything is written. Raises OSError."""
    pending = list(buffers)
    while pending:
        part = pending[:IOV_MAX]
        written = os.pwritev(fd, part, offset)
        offset += written
        index = 0
        while index < len(part) and written >= len(part[index]):
            written -= len(part[index])
            index += 1
        if written:
            pending[index] = memoryview(pending[index])[written:]
        del pending[:index]


class DiskThread:
    """Writes and syncs in the order queued; callbacks run on the event loop, many in one wake-up.

    Order: a sync covers every write queued before it. Several queued syncs of one file become one call. A failed
    write is reported to its own callback and also fails the next sync of that file: an fsync that succeeds after a
    failed write proves nothing (PROTOCOL, rule 11).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._queue: deque[tuple[int, int, Sequence[Buffer] | Callable[[], None] | None, Done | None]] = deque()
        self._wake = threading.Event()
        self._results: deque[tuple[Done, OSError | None]] = deque()
        self._posted = False
        self._stop = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, fd: int, offset: int, buffers: Sequence[Buffer], done: Done | None = None) -> None:
        """Queue a gathered write. The buffers must stay as they are until a later sync, or ``done``, is called."""
        self._queue.append((fd, offset, buffers, done))
        self._wake.set()

    def sync(self, fd: int, done: Done) -> None:
        """Queue an fdatasync."""
        self._queue.append((fd, -1, None, done))
        self._wake.set()

    def call(self, function: Callable[[], None], done: Done) -> None:
        """Queue any blocking call (a cold read, a fallocate); an OSError it raises goes to ``done``."""
        self._queue.append((-1, 0, function, done))
        self._wake.set()

    def close(self) -> None:
        """Finish what is queued, end the thread. Callbacks may still be pending on the loop."""
        self._stop = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        queue, wake = self._queue, self._wake
        failed: dict[int, OSError] = {}
        while True:
            if not queue:
                if self._stop:
                    return
                wake.wait()
                wake.clear()
                continue
            syncs: dict[int, list[Done]] = {}
            while queue:
                fd, offset, what, done = queue.popleft()
                if what is None:
                    assert done is not None
                    syncs.setdefault(fd, []).append(done)
                    continue
                error: OSError | None = None
                try:
                    if callable(what):
                        what()
                    else:
                        write_all(fd, offset, what)
                except OSError as raised:
                    error = raised
                    if fd >= 0:
                        failed[fd] = raised
                if done is not None:
                    self._post(done, error)
            for fd, dones in syncs.items():
                error = failed.pop(fd, None)
                if error is None:
                    try:
                        os.fdatasync(fd)
                    except OSError as raised:
                        error = raised
                for done in dones:
                    self._post(done, error)

    def _post(self, done: Done, error: OSError | None) -> None:
        self._results.append((done, error))
        if not self._posted:
            self._posted = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._posted = False
        results = self._results
        while results:
            done, error = results.popleft()
            done(error)
