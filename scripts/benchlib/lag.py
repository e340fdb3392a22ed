"""How far a copy falls behind at full load, and how long it takes to catch up when the load ends."""

from __future__ import annotations

import threading
import time

from scripts.benchlib import fio
from scripts.benchlib.results import LagResult
from scripts.benchlib.systems import Lag, Running
from scripts.benchlib.works import Work

_POLL_S = 0.05
_CATCH_UP_TIMEOUT_S = 30.0


def watch(work: Work, name: str, system: Running, load_s: float) -> LagResult:
    """Run ``work`` for ``load_s`` and poll the lag meanwhile and until it is zero. Raises what fio raises."""
    assert system.lag is not None
    assert isinstance(system.target, (fio.NbdTarget, fio.BlockTarget))
    target, failures = system.target, list[Exception]()
    ended_s: list[float] = []

    def load() -> None:
        try:
            fio.measure(work, target, load_s)
        except Exception as error:  # told to the caller below
            failures.append(error)
        ended_s.append(time.monotonic())

    thread = threading.Thread(target=load, name="load")
    thread.start()
    seen: list[Lag] = []
    zero_s = None
    try:
        while not ended_s or (zero_s is None and time.monotonic() < ended_s[0] + _CATCH_UP_TIMEOUT_S):
            loaded = not ended_s
            seen.append(system.lag())
            if not loaded and seen[-1].writes == 0:
                zero_s = time.monotonic()
            else:
                time.sleep(_POLL_S)
    finally:
        thread.join()
    if failures:
        raise failures[0]
    zero_after_s = None if zero_s is None else zero_s - ended_s[0]
    most_writes, most_bytes = max(lag.writes for lag in seen), max(lag.bytes for lag in seen)
    return LagResult(name, work.name, most_writes, most_bytes, zero_after_s, len(seen))
