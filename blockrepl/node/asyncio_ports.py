"""The ports of a host, on asyncio and the real clocks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

log = logging.getLogger("blockrepl.node")
WORKERS = 4


class SystemClock:
    """See `ports.Clock`."""

    def now_s(self) -> float:
        """CLOCK_MONOTONIC."""
        return time.monotonic()

    def boot_ns(self) -> int:
        """CLOCK_BOOTTIME."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ns(self) -> int:
        """CLOCK_REALTIME."""
        return time.time_ns()


class ThreadWorkers:
    """See `ports.Workers`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="worker")

    def run(self, function: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """In a thread of a small pool."""

        def finished(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                return
            error = future.exception()
            if error is None:
                done(future.result(), None)
            elif isinstance(error, Exception):
                done(None, error)

        self._loop.run_in_executor(self._pool, function).add_done_callback(finished)

    def later(self, function: Callable[[], None]) -> None:
        """On the next turn of the loop."""
        self._loop.call_soon(function)

    def close(self) -> None:
        """Let running work end."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def log_event(text: str, fields: dict[str, object]) -> None:
    """See `ports.Log`."""
    log.info("%s%s", text, f" {fields}" if fields else "")
