"""The disk thread: writes and syncs off the event loop, grouped.

One thread drains a queue. Everything that arrived during one ``fdatasync`` is its next batch: one sync then covers
all of it (group commit). An executor hop per sync cost a third of the throughput (DESIGN, section 6).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from blockrepl.block import Buffer

IOV_MAX = 1000
ROUND_MAX = 4096  # operations before a sync that waits gets its turn
Done = Callable[[OSError | None], None]
DoneThrough = Callable[[int, OSError | None], None]
"""Called with the position that a sync covers, and its error."""
What = Sequence[Buffer] | Callable[[], None] | None
Operation = tuple[int, int, What, Any]  # file, offset (or position of a sync), what, who is told


def write_all(fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """``pwritev`` until everything is written. Raises OSError."""
    for start in range(0, len(buffers), IOV_MAX):
        part = buffers[start : start + IOV_MAX]
        missing = sum(map(len, part))
        while missing:
            written = os.pwritev(fd, part, offset)
            if not written:
                raise OSError(errno.EIO, "nothing was written")
            offset += written
            missing -= written
            if missing:
                part = _after(part, written)


def write_durably(fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """Write and sync in one system call: pwritev2(2) with RWF_DSYNC, as if the file were open with O_DSYNC.

    Raises OSError; then nothing of it counts as durable.
    """
    missing = sum(map(len, buffers))
    if len(buffers) <= IOV_MAX and os.pwritev(fd, buffers, offset, os.RWF_DSYNC) == missing:
        return
    write_all(fd, offset, buffers)
    os.fdatasync(fd)


def _after(buffers: Sequence[Buffer], written: int) -> list[Buffer]:
    """What is left of ``buffers`` when ``written`` bytes of them are gone."""
    for index, buffer in enumerate(buffers):
        if written < len(buffer):
            return [memoryview(buffer)[written:], *buffers[index + 1 :]]
        written -= len(buffer)
    return []


class DiskThread:
    """Writes and syncs in the order queued; callbacks run on the event loop, many in one wake-up.

    Order: a sync covers every write queued before it. Several queued syncs of one file become one call. A failed
    write is reported to its own callback and also fails the next sync of that file: an fsync that succeeds after a
    failed write proves nothing (PROTOCOL, rule 11).
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        self._loop = loop
        self._queue: SimpleQueue[Operation | None] = SimpleQueue()  # None: finish. Wakes for a third less than an Event
        self._results: deque[Callable[[], None]] = deque()
        self._posted = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def write(self, fd: int, offset: int, buffers: Sequence[Buffer], done: Done | None = None) -> None:
        """Queue a gathered write. The buffers must stay as they are until a later sync, or ``done``, is called."""
        self._queue.put((fd, offset, buffers, done))

    def sync(self, fd: int, done: Done) -> None:
        """Queue an fdatasync."""
        self._queue.put((fd, -1, None, done))

    def sync_through(self, fd: int, position: int, done: DoneThrough) -> None:
        """Queue an fdatasync that covers ``position``; positions of a file ascend.

        Of those that become one call only the last is answered: one callback per fdatasync, not per request.
        """
        self._queue.put((fd, position, None, done))

    def call(self, function: Callable[[], None], done: Done) -> None:
        """Queue any blocking call (a cold read, a fallocate); an OSError it raises goes to ``done``."""
        self._queue.put((-1, 0, function, done))

    def close(self) -> None:
        """Finish what is queued, end the thread. Callbacks may still be pending on the loop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        queue = self._queue
        failed: dict[int, OSError] = {}
        going = True
        while going:
            operation = queue.get()
            going = operation is not None and self._round(operation, failed)

    def _round(self, first: Operation, failed: dict[int, OSError]) -> bool:
        """Perform what is queued, then the syncs among it, each file once. False: the end is among it."""
        queue = self._queue
        syncs: dict[int, list[Done]] = {}
        throughs: dict[int, tuple[int, DoneThrough]] = {}
        operation: Operation | None = first
        left = ROUND_MAX
        while operation is not None:
            fd, offset, what, done = operation
            if what is None:
                if offset < 0:
                    syncs.setdefault(fd, []).append(done)
                else:
                    throughs[fd] = offset, done
                    syncs.setdefault(fd, [])
            else:
                error = _perform(fd, offset, what)
                if error is not None and fd >= 0:
                    failed[fd] = error
                if done is not None:
                    self._post(partial(done, error))
            left -= 1
            if not left or queue.empty():  # nobody else takes from the queue: what is there stays there
                break
            operation = queue.get()
        for fd, dones in syncs.items():
            error = failed.pop(fd, None) or _perform(fd, 0, partial(os.fdatasync, fd))
            if fd in throughs:
                position, done = throughs[fd]
                self._post(partial(done, position, error))
            for done in dones:
                self._post(partial(done, error))
        return operation is not None

    def _post(self, result: Callable[[], None]) -> None:
        self._results.append(result)
        if not self._posted:
            self._posted = True
            # A loop that is closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._posted = False
        results = self._results
        try:
            while results:
                results.popleft()()
        finally:
            if results:  # a callback raised: the others are told all the same
                self._loop.call_soon(self._deliver)


def _perform(fd: int, offset: int, what: Sequence[Buffer] | Callable[[], None]) -> OSError | None:
    try:
        if callable(what):
            what()
        else:
            write_all(fd, offset, what)
    except OSError as error:
        return error
    except Exception as error:  # our own mistake; but a thread that dies of it would leave everybody waiting
        return OSError(errno.EIO, f"{type(error).__name__}: {error}")
    return None
