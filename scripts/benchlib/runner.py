"""One run: start everything, measure in turn, round by round, stop everything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.benchlib import disk, fio, qemu_img, storm
from scripts.benchlib.lag import watch
from scripts.benchlib.process import NotAvailableError, cpu_s, rss_peak_bytes
from scripts.benchlib.registry import FACTORIES
from scripts.benchlib.results import LagResult, Measurement, StormResult
from scripts.benchlib.systems import Running
from scripts.benchlib.works import WORKS, Work
from scripts.benchlib.workspace import Workspace
from scripts.interrupts import uninterrupted

_QUIET_POLL_S = 0.03
_QUIET_TIMEOUT_S = 10.0
_IDLE_S = 1.0
_WARM_UP_S = 0.2
_LAG_WORK = "randwrite-4k-qd32"
_LAG_LOAD_S = 3.0
_MIN_RUNTIME_S = 0.2
_STORM_SYSTEM, _STORM_S = "blockrepl-iscsi", 3.0
_OVERHEAD_S = 0.4  # of a measurement beyond its load: fio's start, settling, syncing

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """``budget_s`` is what starting and measuring may take all together: run times shrink to fit, and the rounds
    after the first end when it is used up. None: no limit.
    """

    cells: list[tuple[str, str]]
    rounds: int
    runtime_s: float
    budget_s: float | None = None


@dataclass
class Outcome:
    measurements: list[Measurement] = field(default_factory=list)
    lags: list[LagResult] = field(default_factory=list)
    storms: list[StormResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # by system: why
    idle_cpu: dict[str, dict[str, float]] = field(default_factory=dict)  # by system and process: CPU s per s
    cut_short: str = ""  # where and why, when time ran out
    runtime_s: float = 0.0
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])  # runnable processes, mean of a minute


def run(settings: Settings, workspace: Workspace, tell: Tell) -> Outcome:
    """Measure every cell in every round. What cannot be started or breaks is skipped, with the reason."""
    outcome = Outcome()
    deadline_s = None if settings.budget_s is None else time.monotonic() + settings.budget_s
    with _started({system for _, system in settings.cells}, workspace, outcome, tell) as systems:
        if deadline_s is None:
            _warm_up(systems, outcome, tell)
        outcome.idle_cpu = _idle(systems)
        outcome.runtime_s = _runtime_s(settings, systems, deadline_s)
        for number in range(settings.rounds):
            tell(f"round {number + 1} of {settings.rounds}, {outcome.runtime_s:.2g} s each")
            if not _round(settings, number, systems, outcome, tell, deadline_s if number else None):
                outcome.cut_short = f"in round {number + 1} of {settings.rounds}: the machine is slow or busy"
                break
        _watch_lag(settings, systems, outcome, tell)
        _raise_storm(settings, systems, workspace, outcome, tell)
    return outcome


@contextmanager
def _started(
    names: Collection[str], workspace: Workspace, outcome: Outcome, tell: Tell
) -> Iterator[dict[str, Running]]:
    """The systems, started all at once and stopped all at once: most of either is waiting. Without those that fail."""
    contexts = {name: factory(workspace) for name, factory in FACTORIES.items() if name in names}
    tell(f"starting {', '.join(contexts)}")
    with ThreadPoolExecutor(max_workers=max(1, len(contexts))) as pool:
        entering = {name: pool.submit(context.__enter__) for name, context in contexts.items()}
        systems: dict[str, Running] = {}
        try:
            for name, future in entering.items():
                try:
                    systems[name] = future.result()
                except (NotAvailableError, fio.LoadError, OSError) as error:
                    outcome.skipped[name] = f"not available: {error}"
                    tell(f"{name} {outcome.skipped[name]}")
            yield systems
        finally:
            tell("stopping everything")
            with uninterrupted():
                # An interrupt may find some of them half-way: `exception` waits until each is up or gone.
                up = [name for name, future in entering.items() if future.exception() is None]
                leaving = [pool.submit(contexts[name].__exit__, None, None, None) for name in up]
                wait(leaving)
            for exit_of_one in leaving:
                exit_of_one.result()


def _warm_up(systems: dict[str, Running], outcome: Outcome, tell: Tell) -> None:
    for name in list(systems):
        _attempt(WORKS[_LAG_WORK], name, _WARM_UP_S, systems, outcome, tell)


def _runtime_s(settings: Settings, systems: dict[str, Running], deadline_s: float | None) -> float:
    """What the settings ask for, or as much of it as the time left allows for each measurement."""
    count = settings.rounds * sum(system in systems for _, system in settings.cells)
    if deadline_s is None or count == 0:
        return settings.runtime_s
    left_s = deadline_s - time.monotonic()
    return max(_MIN_RUNTIME_S, min(settings.runtime_s, left_s / count - _OVERHEAD_S))


def _round(
    settings: Settings,
    number: int,
    systems: dict[str, Running],
    outcome: Outcome,
    tell: Tell,
    deadline_s: float | None,
) -> bool:
    """Each work at all systems one after the other; who begins changes from round to round. False: out of time."""
    for work in dict.fromkeys(work for work, _ in settings.cells):
        names = [system for each, system in settings.cells if each == work]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if deadline_s is not None and time.monotonic() > deadline_s:
                return False
            if name in systems:
                measurement = _attempt(WORKS[work], name, outcome.runtime_s, systems, outcome, tell)
                if measurement is not None:
                    outcome.measurements.append(measurement)
    return True


def _attempt(
    work: Work, name: str, runtime_s: float, systems: dict[str, Running], outcome: Outcome, tell: Tell
) -> Measurement | None:
    """Measure; a system that fails is left out from here on, and what it did before does not count either."""
    try:
        return measure(work, name, systems[name], runtime_s, outcome.idle_cpu.get(name))
    except (fio.LoadError, NotAvailableError, OSError) as error:
        del systems[name]
        outcome.measurements = [each for each in outcome.measurements if each.system != name]
        outcome.skipped[name] = f"failed at {work.name}: {error}"
        tell(f"{name} {outcome.skipped[name]}")
        return None


def measure(
    work: Work, name: str, system: Running, runtime_s: float, idle: dict[str, float] | None = None
) -> Measurement:
    """CPU counts until the system is quiet again: what a copy does after the acknowledgement belongs to the write.

    ``idle`` is what its processes use when nothing happens, in CPU seconds per second: taken off for the time without
    load, such as fio's start, so that it does not depend on how short the load was.
    """
    start_s, before_s = time.monotonic(), _cpu(system)
    if isinstance(system.target, fio.FileTarget):
        sample = disk.measure(work, system.target.path, runtime_s)
    elif isinstance(system.target, fio.IscsiTarget):
        sample = qemu_img.measure(work, system.target, runtime_s)
    else:
        sample = fio.measure(work, system.target, runtime_s)
    _settle(system)
    after_s, without_load_s = _cpu(system), max(0.0, time.monotonic() - start_s - runtime_s)
    used_s = {
        label: max(0.0, after_s[label] - before_s[label] - (idle or {}).get(label, 0.0) * without_load_s)
        for label in after_s
    }
    for path in system.files:
        _sync(path)
    peaks = {label: rss_peak_bytes(pid) for label, pid in system.pids.items()}
    return Measurement(work.name, name, sample, used_s, peaks)


def _cpu(system: Running) -> dict[str, float]:
    return {label: cpu_s(pid) for label, pid in system.pids.items()}


def _idle(systems: dict[str, Running]) -> dict[str, dict[str, float]]:
    """CPU seconds per second of each process of each system when nothing is asked of it."""
    start_s, before_s = time.monotonic(), {name: _cpu(system) for name, system in systems.items()}
    time.sleep(_IDLE_S)
    elapsed_s = time.monotonic() - start_s
    return {
        name: {label: (used_s - before_s[name][label]) / elapsed_s for label, used_s in _cpu(system).items()}
        for name, system in systems.items()
    }


def _settle(system: Running) -> None:
    """Wait until nothing is lagging or, where that is not told, until no server uses CPU."""
    deadline_s = time.monotonic() + _QUIET_TIMEOUT_S
    used_s = _cpu(system)
    while time.monotonic() < deadline_s:
        time.sleep(_QUIET_POLL_S)
        if system.lag is not None:
            if system.lag().writes == 0:
                return
            continue
        before_s, used_s = used_s, _cpu(system)
        if used_s == before_s:
            return


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


def _watch_lag(settings: Settings, systems: dict[str, Running], outcome: Outcome, tell: Tell) -> None:
    """A load of its own, watched: the watching would cost the measured ones."""
    load_s = min(_LAG_LOAD_S, max(1.0, settings.runtime_s))
    for name, system in systems.items():
        if system.lag is not None and any(each == name for _, each in settings.cells):
            tell(f"watching the lag of {name}")
            try:
                outcome.lags.append(watch(WORKS[_LAG_WORK], name, system, load_s))
            except (fio.LoadError, NotAvailableError) as error:
                outcome.skipped[f"{name} (lag)"] = str(error)


def _raise_storm(
    settings: Settings, systems: dict[str, Running], workspace: Workspace, outcome: Outcome, tell: Tell
) -> None:
    """Only at ours: what others do under it is not for us to find out."""
    system = systems.get(_STORM_SYSTEM)
    if system is None or not isinstance(system.target, fio.IscsiTarget):
        return
    tell(f"a storm of bad PDUs at {_STORM_SYSTEM}")
    try:
        log = workspace.log("storm")
        outcome.storms.append(storm.measure(_STORM_SYSTEM, system.target, log, min(_STORM_S, settings.runtime_s)))
    except (fio.LoadError, NotAvailableError) as error:
        outcome.skipped[f"{_STORM_SYSTEM} (storm)"] = str(error)
