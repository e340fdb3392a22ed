"""Many seeds, on every core, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.sim.bugs import by_name
from tests.sim.case import Case, Failure
from tests.sim.group import Options, Result


@dataclass
class Tally:
    """What a campaign did."""

    runs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Case, Failure]] = field(default_factory=list)
    took_s: float = 0.0
    stopped: bool = False  # by Ctrl-C, or a SIGTERM

    def add(self, case: Case, outcome: Result | Failure) -> None:
        """One run is over."""
        self.runs += 1
        if isinstance(outcome, Failure):
            self.failures.append((case, outcome))
            return
        for name in ("steps", "records", "completions", "errors", "faults", "trials", "supersets", "digests", "swaps",
                     "replaced", "reforms", "copied_bytes", "differed_bytes"):  # fmt: skip
            self.counts[name] += getattr(outcome, name)
        self.counts["takeovers"] += outcome.takeovers or outcome.taken_over

    def __str__(self) -> str:
        rate = self.counts["steps"] / self.took_s if self.took_s else 0
        words = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        runs = ("stopped: " if self.stopped else "") + f"{self.runs:,} runs in {self.took_s:.0f} s"
        return f"{runs}, {rate:,.0f} steps/s; {words}; {len(self.failures)} failures"


def _run(case: Case) -> tuple[Case, Result | Failure]:
    return case, case.run(by_name(case.planted) if case.planted else nullcontext)


def _as_a_worker() -> None:
    """Who runs the campaign hears of Ctrl-C, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _cases(first: int, seeds: int, options: Options, planted: str, deadline_s: float) -> Iterator[Case]:
    for seed in range(first, first + seeds):
        if time.monotonic() >= deadline_s:
            return
        yield Case(seed, options, planted)


def campaign(
    first: int, seeds: int, options: Options, *, planted: str = "", minutes: float | None = None, jobs: int = 0,
    keep_going: bool = False,
) -> Tally:  # fmt: skip
    """Run ``seeds`` seeds from ``first`` on, for ``minutes`` at most; prints failures as they come.

    Ctrl-C and SIGTERM end it too: what was done until then is told.
    """
    tally, began, console = Tally(), time.monotonic(), Console(stderr=True)
    deadline_s = began + minutes * 60 if minutes else float("inf")
    jobs = jobs or os.cpu_count() or 1
    columns = (TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    pool = multiprocessing.get_context("fork").Pool(jobs, _as_a_worker)
    with pool, Progress(*columns, console=console) as progress, suppress(KeyboardInterrupt):
        tally.stopped = True
        bar = progress.add_task("seeds", total=seeds, failed=0)
        # A window of cases: the pool takes them from an iterator without end, the deadline is looked at in between.
        cases = _cases(first, seeds, options, planted, deadline_s)
        while window := list(islice(cases, jobs * 8)):
            for case, outcome in pool.imap_unordered(_run, window):
                tally.add(case, outcome)
                if isinstance(outcome, Failure):
                    for line in (f"seed {case.seed}: {outcome.text}", f"    replay: {case.command()}"):
                        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                progress.update(bar, completed=tally.runs, failed=len(tally.failures))
            if tally.failures and not keep_going:
                break
        tally.stopped = False
    tally.took_s = time.monotonic() - began
    return tally
