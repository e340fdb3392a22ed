"""Measurements, and the medians of their rounds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from scripts.benchlib.fio import Sample
from scripts.benchlib.works import GIB


@dataclass(frozen=True)
class Measurement:
    """One system at one work in one round. CPU and memory by server process; empty for the raw disk."""

    work: str
    system: str
    sample: Sample
    cpu_s: dict[str, float]
    rss_peak_bytes: dict[str, int]

    @property
    def server_cpu_us_per_op(self) -> float | None:
        return sum(self.cpu_s.values()) * 1e6 / self.sample.ops if self.cpu_s else None


@dataclass(frozen=True)
class Result:
    """Medians over the rounds; memory is the greatest peak. Field names are those of the JSON."""

    work: str
    system: str
    iops: float
    bytes_per_s: float
    lat_us_p50: float | None
    lat_us_p99: float | None
    server_cpu_us_per_op: float | None
    cpu_s_per_gib: dict[str, float]
    rss_bytes: dict[str, int]
    rounds: int
    iops_rounds: list[float]


def medians(measurements: Iterable[Measurement]) -> list[Result]:
    """One result per (work, system), in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.work, measurement.system].append(measurement)
    return [_median(group) for group in groups.values()]


def _median(group: list[Measurement]) -> Result:
    samples = [each.sample for each in group]
    names = group[0].cpu_s
    return Result(
        work=group[0].work,
        system=group[0].system,
        iops=statistics.median(sample.iops for sample in samples),
        bytes_per_s=statistics.median(sample.bytes_per_s for sample in samples),
        lat_us_p50=_median_of(sample.lat_us_p50 for sample in samples),
        lat_us_p99=_median_of(sample.lat_us_p99 for sample in samples),
        server_cpu_us_per_op=_median_of(each.server_cpu_us_per_op for each in group),
        cpu_s_per_gib={
            name: statistics.median(each.cpu_s[name] * GIB / each.sample.bytes for each in group) for name in names
        },
        rss_bytes={name: max(each.rss_peak_bytes[name] for each in group) for name in names},
        rounds=len(group),
        iops_rounds=[sample.iops for sample in samples],
    )


def _median_of(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None


@dataclass(frozen=True)
class LagResult:
    """How a replicated system kept up with one load of full speed, and how fast it caught up after it."""

    system: str
    work: str
    max_writes: int
    max_bytes: int
    zero_after_s: float | None  # after the load's end; None when it did not get there
    samples: int


@dataclass(frozen=True)
class StormResult:
    """Latency of one session's 4 KiB writes, alone and beside ill-meaning initiators."""

    system: str
    conversations: int  # of the others
    logins: int  # of the session: a cold reset by others ends it
    quiet_us_p50: float
    quiet_us_p99: float
    storm_us_p50: float
    storm_us_p99: float


class Figures:
    """The results, looked up by name; None for what was not measured."""

    def __init__(
        self, results: Iterable[Result], lags: Iterable[LagResult] = (), storms: Iterable[StormResult] = ()
    ) -> None:
        self._results = {(result.work, result.system): result for result in results}
        self.lags = list(lags)
        self.storms = list(storms)

    def get(self, work: str, system: str) -> Result | None:
        return self._results.get((work, system))

    def speed(self, work: str, system: str) -> float | None:
        result = self.get(work, system)
        return result.bytes_per_s if result else None

    def cpu_us(self, work: str, system: str) -> float | None:
        result = self.get(work, system)
        return result.server_cpu_us_per_op if result else None

    def peak_bytes(self, systems: Iterable[str]) -> int | None:
        """Of the one process of these systems that has the most."""
        peaks = [
            peak
            for (_, system), result in self._results.items()
            if system in systems
            for peak in result.rss_bytes.values()
        ]
        return max(peaks, default=None)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None
