"""How good it must be, how good it aims to be, and how good it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scripts.benchlib.results import Figures, ratio

OURS = ("blockrepl-nbd", "blockrepl-replicated", "blockrepl-loop", "blockrepl-iscsi")

# What one host byte costs here in bytes written: journal of the intermediate, P-VOL, journal of the secondary, S-VOL.
WRITTEN_PER_HOST_BYTE = 4

MIB = 1 << 20


@dataclass(frozen=True)
class Criterion:
    """``must`` and ``aim`` are least values, or greatest ones with ``less_is_better``."""

    text: str
    unit: str
    must: float | None
    aim: float | None
    reached: Callable[[Figures], float | None]
    less_is_better: bool = False


@dataclass(frozen=True)
class Verdict:
    """A criterion against figures. ``verdict`` is "ok", "short" or "not measured"; so is that of the aim."""

    text: str
    unit: str
    less_is_better: bool
    must: float | None
    aim: float | None
    reached: float | None
    verdict: str
    aim_verdict: str


def judge(figures: Figures) -> list[Verdict]:
    return [_judge(criterion, criterion.reached(figures)) for criterion in CRITERIA]


def _judge(criterion: Criterion, reached: float | None) -> Verdict:
    def verdict(bound: float | None) -> str:
        if bound is None:
            return ""
        if reached is None:
            return "not measured"
        return "ok" if (reached <= bound if criterion.less_is_better else reached >= bound) else "short"

    return Verdict(
        criterion.text,
        criterion.unit,
        criterion.less_is_better,
        criterion.must,
        criterion.aim,
        reached,
        verdict(criterion.must),
        verdict(criterion.aim),
    )


def _speed(work: str, system: str, peer: str, per: float = 1.0) -> Callable[[Figures], float | None]:
    def reached(figures: Figures) -> float | None:
        value = ratio(figures.speed(work, system), figures.speed(work, peer))
        return None if value is None else value * per

    return reached


def _cpu(work: str, system: str, peer: str) -> Callable[[Figures], float | None]:
    return lambda figures: ratio(figures.cpu_us(work, system), figures.cpu_us(work, peer))


def _lag_bytes(figures: Figures) -> float | None:
    return max((lag.max_bytes / MIB for lag in figures.lags), default=None)


def _zero_after_s(figures: Figures) -> float | None:
    """None when nothing was seen; endless when the lag did not fall to zero while it was watched."""
    times = [float("inf") if lag.zero_after_s is None else lag.zero_after_s for lag in figures.lags]
    return max(times, default=None)


def _storm_ms(figures: Figures) -> float | None:
    return max((storm.storm_us_p99 / 1000 for storm in figures.storms), default=None)


def _peak_mib(figures: Figures) -> float | None:
    peak_bytes = figures.peak_bytes(OURS)
    return None if peak_bytes is None else peak_bytes / MIB


_WRITE, _READ, _QD1 = "randwrite-4k-qd32", "randread-4k-qd32", "randwrite-4k-qd1"
_BIG_WRITE, _BIG_READ = "write-1m-qd8", "read-1m-qd8"
_NBD, _PAIR, _LOOP, _ISCSI = OURS

CRITERIA = (
    Criterion("NBD alone, 4k randwrite QD32 ÷ nbdkit", "×", 1.0, 1.2, _speed(_WRITE, _NBD, "nbdkit")),
    Criterion("NBD alone, 4k randwrite QD32 ÷ qemu-nbd", "×", 2.5, None, _speed(_WRITE, _NBD, "qemu-nbd")),
    Criterion("NBD alone, 4k randread QD32 ÷ nbdkit", "×", 1.0, 1.2, _speed(_READ, _NBD, "nbdkit")),
    Criterion("NBD alone, 4k randread QD32 ÷ qemu-nbd", "×", 2.5, None, _speed(_READ, _NBD, "qemu-nbd")),
    Criterion("NBD alone, CPU per 4k write ÷ nbdkit", "×", 0.8, 0.5, _cpu(_WRITE, _NBD, "nbdkit"), True),
    Criterion("NBD alone, CPU per 4k read ÷ nbdkit", "×", 0.8, 0.5, _cpu(_READ, _NBD, "nbdkit"), True),
    Criterion("NBD alone, 1 MiB write QD8 ÷ nbdkit", "×", 0.9, 1.0, _speed(_BIG_WRITE, _NBD, "nbdkit")),
    Criterion("NBD alone, 1 MiB read QD8 ÷ nbdkit", "×", 0.8, 1.0, _speed(_BIG_READ, _NBD, "nbdkit")),
    Criterion("replicated, 4k randwrite QD32 ÷ QEMU mirror", "×", 2.0, 5.0, _speed(_WRITE, _PAIR, "qemu-mirror")),
    Criterion(
        "replicated, CPU of all processes per 4k write QD32",
        "µs",
        50.0,
        30.0,
        lambda figures: figures.cpu_us(_WRITE, _PAIR),
        True,
    ),
    Criterion("replicated, 4k randwrite QD1 ÷ raw disk's write+fdatasync", "×", 0.33, 0.6, _speed(_QD1, _PAIR, "disk")),
    Criterion("replicated, 1 MiB write QD8 ÷ QEMU mirror", "×", 1.0, None, _speed(_BIG_WRITE, _PAIR, "qemu-mirror")),
    Criterion(
        f"replicated, 1 MiB write QD8 ÷ (disk's sequential rate ÷ {WRITTEN_PER_HOST_BYTE} bytes written per byte)",
        "×",
        None,
        0.8,
        _speed(_BIG_WRITE, _PAIR, "disk", WRITTEN_PER_HOST_BYTE),
    ),
    Criterion(
        "loop, 4k randwrite QD32 ÷ loop over QEMU's fuse", "×", 1.5, 2.5, _speed(_WRITE, _LOOP, "loop-qemu-fuse")
    ),
    Criterion(
        "loop, 1 MiB write QD8 ÷ loop over QEMU's fuse", "×", 1.5, 2.5, _speed(_BIG_WRITE, _LOOP, "loop-qemu-fuse")
    ),
    Criterion("iSCSI, 4k write QD32 ÷ tgt", "×", 1.25, None, _speed(_WRITE, _ISCSI, "tgt")),
    Criterion("iSCSI, 4k read QD32 ÷ tgt", "×", 1.25, None, _speed(_READ, _ISCSI, "tgt")),
    Criterion("iSCSI, CPU per 4k write ÷ tgt", "×", 0.6, None, _cpu(_WRITE, _ISCSI, "tgt"), True),
    Criterion("iSCSI, CPU per 4k read ÷ tgt", "×", 0.6, None, _cpu(_READ, _ISCSI, "tgt"), True),
    Criterion("iSCSI, 1 MiB write QD8 ÷ tgt", "×", 1.5, None, _speed(_BIG_WRITE, _ISCSI, "tgt")),
    Criterion("iSCSI, 1 MiB read QD8 ÷ tgt", "×", 1.5, None, _speed(_BIG_READ, _ISCSI, "tgt")),
    Criterion("iSCSI, 4k write QD1 ÷ tgt", "×", 1.0, None, _speed(_QD1, _ISCSI, "tgt")),
    Criterion("iSCSI, 4k write of one session while others are fuzzed, p99", "ms", None, None, _storm_ms, True),
    Criterion("replicated, lag at full load, at most", "MiB", None, None, _lag_bytes, True),
    Criterion("replicated, lag is zero after the load's end", "s", 1.0, None, _zero_after_s, True),
    Criterion("peak memory of the largest process of ours", "MiB", 250.0, None, _peak_mib, True),
)
