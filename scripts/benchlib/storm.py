"""What an iSCSI session notices while others send its target everything that a PDU must not be."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from scripts.benchlib.fio import IscsiTarget, LoadError
from scripts.benchlib.process import running
from scripts.benchlib.results import StormResult
from tests.iscsi.initiator import ConnectionEndedError, Initiator, LoginRefusedError

_BLOCK_BYTES = 4096
_BLOCKS = 1024  # of the volume: where the session writes
_TIMEOUT_S = 120.0


def measure(name: str, target: IscsiTarget, log: Path, runtime_s: float) -> StormResult:
    """4 KiB writes, one at a time, without and then with the storm of tests/iscsi/storm.py. Raises LoadError."""
    try:
        quiet_us, _ = _latencies_us(target, time.monotonic() + runtime_s)
        argv = [sys.executable, "-m", "tests.iscsi.storm", "127.0.0.1", str(target.port), target.target]
        with running([*argv, "--seconds", str(runtime_s)], log, pipes=True) as storm:
            stormy_us, logins = _latencies_us(target, time.monotonic() + runtime_s)
            conversations = int(storm.read_line(_TIMEOUT_S) or 0)
    except (OSError, AssertionError) as error:
        raise LoadError(f"under the storm: {error}") from error
    return StormResult(
        name, conversations, logins, *(figure for each in (quiet_us, stormy_us) for figure in _percentiles(each))
    )


def _latencies_us(target: IscsiTarget, end_s: float) -> tuple[list[float], int]:
    """Of each write until then, and how often it took a login: a cold reset by others ends this session too."""
    found: list[float] = []
    logins = 0
    while time.monotonic() < end_s:
        try:
            with Initiator(("127.0.0.1", target.port), name="iqn.2026-11.org.blockrepl.bench:honest") as initiator:
                logins += 1
                initiator.login(target.target)
                _write(initiator, target, lambda: time.monotonic() < end_s, found)
        except (ConnectionEndedError, LoginRefusedError) as error:
            if logins > 100:
                raise LoadError(f"no session lasts: {error}") from error
    if len(found) < 2:
        raise LoadError("not two writes were completed")
    return found, logins


def _write(initiator: Initiator, target: IscsiTarget, goes_on: Callable[[], bool], found: list[float]) -> None:
    initiator.ready(target.lun)
    _, block_bytes = initiator.capacity(target.lun)
    data, step = b"\x77" * _BLOCK_BYTES, _BLOCK_BYTES // block_bytes
    for turn in range(sys.maxsize):
        if not goes_on():
            return
        before_s = time.perf_counter()
        answer = initiator.write(turn % _BLOCKS * step, data, block_bytes, lun=target.lun)
        if answer.good:  # not so a unit attention: others reset the target
            found.append((time.perf_counter() - before_s) * 1e6)


def _percentiles(latencies_us: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(latencies_us, n=100, method="inclusive")
    return cuts[49], cuts[98]
