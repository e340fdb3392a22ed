"""qemu-img bench on an iSCSI LUN: the same client (libiscsi) for every target."""

from __future__ import annotations

import re
import subprocess

from scripts.benchlib.fio import IscsiTarget, LoadError, Sample
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.works import MIB, Work

_GRACE_S = 60.0  # a system that answers nothing for so long is given up
_CALIBRATION = 16  # short run: so many times the depth
_STRIDE = 1009  # blocks; a prime, so that the steps come by every block of an image and follow nothing


def measure(work: Work, target: IscsiTarget, runtime_s: float) -> Sample:
    """Run ``work`` for about ``runtime_s``. Latencies are not told. Raises LoadError, NotAvailableError."""
    few = _CALIBRATION * work.depth
    many = max(few, round(runtime_s * few / run(arguments(work, target, few), _GRACE_S)))
    elapsed_s = run(arguments(work, target, many), runtime_s + _GRACE_S)
    count, iops = few + many, many / elapsed_s
    return Sample(count, count * work.block_bytes, iops, iops * work.block_bytes, None, None)


def arguments(work: Work, target: IscsiTarget, count: int) -> list[str]:
    step_bytes = work.block_bytes * (_STRIDE if work.rw.startswith("rand") else 1)
    words = ["-c", str(count), "-d", str(work.depth), "-s", str(work.block_bytes), "-S", str(step_bytes)]
    if work.writes:
        words += ["-w", "--pattern=165", *(["--flush-interval=1"] if work.fsync else [])]
    return [*words, target.url]


def fill(target: IscsiTarget) -> None:
    """Write a volume once from end to end, so that nobody measures allocation."""
    count = target.size_bytes // MIB
    run(["-c", str(count), "-d", "8", "-s", str(MIB), "-w", "--pattern=90", target.url], _GRACE_S + count / 20)


def run(words: list[str], timeout_s: float) -> float:
    """One ``qemu-img bench``; the seconds that it says it took."""
    argv = ["qemu-img", "bench", "-f", "raw", "-t", "none", *words]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError as error:
        raise NotAvailableError("qemu-img is not installed (apt-get install qemu-utils qemu-block-extra)") from error
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"qemu-img bench did not end within {timeout_s:g} s") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LoadError(f"qemu-img bench ended with {done.returncode}: {words[-1] if words else 'it says nothing'}")
    return parse(done.stdout)


def parse(output: str) -> float:
    match = re.search(r"Run completed in ([\d.]+) seconds", output)
    if match is None:
        raise LoadError(f"qemu-img bench does not say how long it took: {output.strip()[:200]!r}")
    return max(float(match[1]), 0.001)  # what it prints has three digits
