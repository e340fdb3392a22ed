"""Makes a failing run short: fewer faults, threads and volumes, less time; the same kind of failure.

What goes wrong when is drawn from the seed alone, so a fault can be left out and the others stay; what else is drawn
differs then, so each try is made under a few salts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from tests.sim.case import Case, Failure, Within
from tests.sim.group import Group
from tests.sim.plan import Planned, plan

SALTS = 4
MAX_RUNS = 600


class Shrinker:
    """One failing case on its way down."""

    def __init__(
        self, case: Case, failure: Failure, within: Within = nullcontext, tell: Callable[[str], None] = print
    ) -> None:
        self.case = case.but(keep=frozenset(failure.performed)) if case.options.keep is None else case
        self.failure = failure
        self.runs = 0
        self._within = within
        self._tell = tell

    def shrink(self) -> tuple[Case, Failure]:
        """The shortest that was found, and how it fails."""
        if not self._try(self.case, salts=1):
            self._try(self.case)
        progress = True
        while progress and self.runs < MAX_RUNS:
            progress = False
            for smaller in (self._fewer_faults, self._smaller_group, self._less_time):
                progress = smaller() or progress
            self._tell(f"{self.runs} runs: {self.describe()}")
        return self.case, self.failure

    def describe(self) -> str:
        """How long it is."""
        options = self.case.options
        size = f"{options.threads or 'some'} threads, {options.volumes or 'some'} volumes"
        return f"{len(options.keep or ())} faults, {size}, fails at {self.failure.at_s:.2f} s"

    def _try(self, case: Case, salts: int = SALTS) -> bool:
        """Whether it fails in the same way, under its salt or another; then it is the case."""
        for salt in [case.options.salt, *range(salts)][:salts]:
            self.runs += 1
            found = case.but(salt=salt).run(self._within)
            if isinstance(found, Failure) and found.kind == self.failure.kind:
                self.case, self.failure = case.but(salt=salt), found
                return True
        return False

    def _fewer_faults(self) -> bool:
        """ddmin: leave out halves, quarters, … single ones."""
        progress, size = False, max(1, len(self.case.options.keep or ()) // 2)
        while size and self.runs < MAX_RUNS:
            for part in self._parts(size):
                keep = self.case.options.keep or frozenset()
                if part & keep and self._try(self.case.but(keep=keep - part)):
                    progress = True
            size //= 2
        return progress

    def _parts(self, size: int) -> Iterator[frozenset[int]]:
        numbers = sorted(self.case.options.keep or ())
        for start in range(0, len(numbers), size):
            yield frozenset(numbers[start : start + size])

    def _smaller_group(self) -> bool:
        progress = False
        for name, values in (("volumes", (1, 2)), ("threads", (1, 2, 4))):
            now = getattr(self.case.options, name)
            for value in values:
                if (now is None or value < now) and self._try(self.case.but(**{name: value})):
                    progress = True
                    break
        return progress

    def _less_time(self) -> bool:
        options = self.case.options
        now_s = min(options.until_s or options.seconds, self.failure.at_s)
        last_s = max((each.at_s for each in self._plan() if each.number in (options.keep or ())), default=0.0)
        for until_s in (last_s + 0.1, last_s + (now_s - last_s) * 0.3, last_s + (now_s - last_s) * 0.7):
            shorter = round(until_s + 0.005, 2)
            if shorter < (options.until_s or options.seconds) - 0.02 and self._try(self.case.but(until_s=shorter)):
                return True
        return False

    def _plan(self) -> list[Planned]:
        options = self.case.options
        story = Group(self.case.seed, options).story
        return plan(self.case.seed, story, options.seconds, options.fault_every_s, options.faults)
