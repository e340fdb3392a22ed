"""Tables for people and JSON for programs."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchlib.criteria import Verdict, judge
from scripts.benchlib.results import Figures, Result, medians, ratio
from scripts.benchlib.runner import Outcome
from scripts.benchlib.works import FAMILIES, WORKS

SCHEMA_VERSION = 1
_BUSY = 0.25  # load average per CPU from which on others spoil the figures


def document(outcome: Outcome, file_system: str, image_bytes: int) -> dict[str, Any]:
    """What `--json` writes: integers in bytes, latencies in µs, null for unknown."""
    results = medians(outcome.measurements)
    return {
        "version": SCHEMA_VERSION,
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "file_system": file_system,
            "load_before": outcome.load_before,
        },
        "image_bytes": image_bytes,
        "runtime_s": outcome.runtime_s,
        "idle_cpu": outcome.idle_cpu,
        "cut_short": outcome.cut_short or None,
        "results": [dataclasses.asdict(result) for result in results],
        "lag": [dataclasses.asdict(lag) for lag in outcome.lags],
        "storm": [dataclasses.asdict(storm) for storm in outcome.storms],
        "criteria": [_json_verdict(verdict) for verdict in judge(Figures(results, outcome.lags, outcome.storms))],
        "skipped": outcome.skipped,
    }


def _json_verdict(verdict: Verdict) -> dict[str, Any]:
    fields = dataclasses.asdict(verdict)
    if verdict.reached is not None and not math.isfinite(verdict.reached):
        fields["reached"] = None  # JSON has no infinity; the verdict says that it fell short
    return fields


def print_report(console: Console, outcome: Outcome) -> None:
    results = medians(outcome.measurements)
    figures = Figures(results, outcome.lags, outcome.storms)
    console.print(_speed_table(figures))
    console.print(_process_table(results, outcome.idle_cpu))
    for lag in outcome.lags:
        after = "did not fall to zero" if lag.zero_after_s is None else f"zero {lag.zero_after_s:.2f} s after its end"
        console.print(
            f"{lag.system}: lag at full load at most {lag.max_writes} writes, {_mib(lag.max_bytes)} MiB; {after}"
        )
    for storm in outcome.storms:
        console.print(
            f"{storm.system}: 4k write of one session {storm.quiet_us_p50:,.0f} µs, p99 {storm.quiet_us_p99:,.0f}; "
            f"beside {storm.conversations} bad ones {storm.storm_us_p50:,.0f} µs, p99 {storm.storm_us_p99:,.0f}"
        )
    console.print(_criteria_table(judge(figures)))
    if outcome.cut_short:
        console.print(f"[yellow]Cut short {outcome.cut_short}[/yellow]")
    if outcome.load_before > _BUSY * (os.cpu_count() or 1):
        console.print(f"[yellow]The machine was busy before the run: load {outcome.load_before:.1f}[/yellow]")
    for system, reason in outcome.skipped.items():
        console.print(f"[yellow]{system}[/yellow]: {reason}", highlight=False)


def _speed_table(figures: Figures) -> Table:
    table = Table(title="Medians of interleaved runs", title_justify="left")
    table.add_column("work", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for heading in ("IOPS", "MiB/s", "p50 µs", "p99 µs", "server CPU µs/op", "CPU s/GiB", "ours ÷ it"):
        table.add_column(heading, justify="right", no_wrap=True)
    for work in WORKS:
        for system in [*(name for family in FAMILIES for name in family), "disk"]:
            result = figures.get(work, system)
            if result is not None:
                table.add_row(work, system, *_speed_cells(result, figures))
        table.add_section()
    return table


def _speed_cells(result: Result, figures: Figures) -> list[str]:
    cpu_s_per_gib = sum(result.cpu_s_per_gib.values()) if result.cpu_s_per_gib else None
    return [
        f"{result.iops:,.0f}",
        f"{result.bytes_per_s / (1 << 20):,.0f}",
        _number(result.lat_us_p50, 0),
        _number(result.lat_us_p99, 0),
        _number(result.server_cpu_us_per_op, 1),
        _number(cpu_s_per_gib, 2),
        _number(_ours_over(result, figures), 2),
    ]


def _ours_over(result: Result, figures: Figures) -> float | None:
    """The speed of our system of the same family, as a multiple of this one's."""
    if result.system == "disk":
        return ratio(figures.speed(result.work, "blockrepl-replicated"), result.bytes_per_s)
    ours = next(family[0] for family in FAMILIES if result.system in family)
    return None if result.system == ours else ratio(figures.speed(result.work, ours), result.bytes_per_s)


def _process_table(results: list[Result], idle_cpu: dict[str, dict[str, float]]) -> Table:
    """Per process: peak memory, CPU when idle, and CPU per GiB of small and of large writes."""
    table = Table(title="Server processes", title_justify="left")
    for heading in ("system", "process"):
        table.add_column(heading, no_wrap=True)
    for heading in ("peak memory MiB", "idle CPU %", "CPU s/GiB, 4k randwrite QD32", "CPU s/GiB, 1 MiB write QD8"):
        table.add_column(heading, justify="right")
    figures = Figures(results)
    processes = {(result.system, name): 0 for result in results for name in result.rss_bytes}
    for result in results:
        for name, peak_bytes in result.rss_bytes.items():
            processes[result.system, name] = max(processes[result.system, name], peak_bytes)
    for (system, name), peak_bytes in sorted(processes.items()):
        costs = [figures.get(work, system) for work in ("randwrite-4k-qd32", "write-1m-qd8")]
        cells = [_number(cost.cpu_s_per_gib.get(name) if cost else None, 2) for cost in costs]
        idle = 100 * idle_cpu.get(system, {}).get(name, 0.0)
        table.add_row(system, name, _mib(peak_bytes), _number(idle, 1), *cells)
    return table


def _criteria_table(verdicts: list[Verdict]) -> Table:
    table = Table(title="How good", title_justify="left")
    table.add_column("work")
    for heading in ("must", "aim", "reached"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("must", no_wrap=True)
    table.add_column("aim", no_wrap=True)
    for verdict in verdicts:
        bounds = [_bound(verdict, verdict.must), _bound(verdict, verdict.aim)]
        reached = "–" if verdict.reached is None else f"{verdict.reached:.2f} {verdict.unit}"
        table.add_row(verdict.text, *bounds, reached, _colour(verdict.verdict), _colour(verdict.aim_verdict))
    return table


def _bound(verdict: Verdict, bound: float | None) -> str:
    if bound is None:
        return "–"
    return f"{'≤' if verdict.less_is_better else '≥'} {bound:g} {verdict.unit}"


def _colour(verdict: str) -> str:
    colours = {"ok": "green", "short": "red"}
    return f"[{colours[verdict]}]{verdict}[/]" if verdict in colours else verdict


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.0f}"
