"""One run of fio on an NBD export or a block device, and what its JSON says."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.works import Work

_GRACE_S = 60.0  # a system that answers nothing for so long is given up


class LoadError(Exception):
    """The client failed, or the system under it."""


@dataclass(frozen=True)
class NbdTarget:
    port: int
    export: str = ""

    def arguments(self) -> list[str]:
        return ["--ioengine=nbd", f"--uri=nbd://127.0.0.1:{self.port}/{self.export}"]


@dataclass(frozen=True)
class BlockTarget:
    device: Path

    def arguments(self) -> list[str]:
        return ["--ioengine=libaio", "--direct=1", f"--filename={self.device}"]


@dataclass(frozen=True)
class IscsiTarget:
    """A LUN of a portal on loopback: fio has no engine for it, qemu-img bench is the client (`qemu_img`)."""

    port: int
    target: str
    lun: int
    size_bytes: int

    @property
    def url(self) -> str:
        return f"iscsi://127.0.0.1:{self.port}/{self.target}/{self.lun}"


@dataclass(frozen=True)
class FileTarget:
    """A file that the bench itself writes: the raw disk."""

    path: Path


@dataclass(frozen=True)
class Sample:
    """One measurement. Latency of a write with fsync is that of the write plus that of its flush; None: not told."""

    ops: int
    bytes: int
    iops: float
    bytes_per_s: float
    lat_us_p50: float | None
    lat_us_p99: float | None


def measure(work: Work, target: NbdTarget | BlockTarget, runtime_s: float) -> Sample:
    """Run ``work`` for ``runtime_s``. Raises LoadError, or NotAvailableError without fio."""
    # Its default clock, the TSC, is tested at every start for longer than it saves in a short run.
    argv = ["fio", "--output-format=json", "--clocksource=clock_gettime", f"--runtime={round(runtime_s * 1000)}ms"]
    argv += ["--lat_percentiles=1", "--clat_percentiles=0", *target.arguments(), str(work.job_file)]
    return parse(work, run(argv, runtime_s + _GRACE_S))


def fill(target: NbdTarget | BlockTarget, size_bytes: int) -> None:
    """Write a volume once from end to end, so that nobody measures allocation."""
    argv = ["fio", "--output-format=json", "--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", "--end_fsync=1"]
    run([*argv, f"--size={size_bytes}", *target.arguments()], _GRACE_S + size_bytes / (20 << 20))


def run(argv: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError as error:
        raise NotAvailableError("fio is not installed (apt-get install fio)") from error
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"fio did not end within {timeout_s:g} s") from error
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LoadError(f"fio ended with {done.returncode}: {words[0] if words else 'it says nothing'}")
    return done.stdout


def parse(work: Work, output: str) -> Sample:
    """Read fio's JSON. Its nbd engine prints a line of its own in front of it."""
    start = output.find("{")
    if start < 0:
        raise LoadError(f"fio printed no JSON: {output.strip()[:200]!r}")
    job = json.loads(output[start:])["jobs"][0]
    if job["error"]:
        raise LoadError(f"{work.name}: fio reports error {job['error']}")
    side = job["write" if work.writes else "read"]
    if not side["total_ios"]:
        raise LoadError(f"{work.name}: not one operation was completed")
    p50_us, p99_us = _percentiles_us(side)
    if work.fsync:
        sync_p50_us, sync_p99_us = _percentiles_us(job["sync"])
        p50_us, p99_us = p50_us + sync_p50_us, p99_us + sync_p99_us
    return Sample(side["total_ios"], side["io_bytes"], side["iops"], float(side["bw_bytes"]), p50_us, p99_us)


def _percentiles_us(side: dict[str, Any]) -> tuple[float, float]:
    percentiles_ns = side["lat_ns"]["percentile"]
    return percentiles_ns["50.000000"] / 1000, percentiles_ns["99.000000"] / 1000
