"""`scripts/mutate`: changes the code under test in one place at a time, and says which changes no run notices.

Each mutant meets the scenarios and seeds of every story: those that come through its line, those first that found most;
until one fails, or its time is over. What survives is a difference that nobody can see (words,
speed, a second lock on a door), or a gap in the faults or in the oracle.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import coverage

from tests.sim.case import Case, Failure
from tests.sim.group import Options
from tests.sim.mutants import Mutant, mutants_of, planted
from tests.sim.plan import PAIR_STORIES
from tests.sim.scenarios import SCENARIOS, play

HANGS_S = 20  # of CPU; a run takes less than one
MEMORY_BYTES = 4 << 30


@dataclass
class Trial:
    """A scenario or a seed, and the lines that it comes through."""

    name: str
    run: Callable[[], str]  # what failed; "" when nothing did
    lines: dict[str, set[int]] = field(default_factory=dict)
    found: int = 0  # mutants


def trials(seeds: int) -> list[Trial]:
    """All scenarios, and so many seeds of the default mix and of each story of pairs."""
    found = [Trial(each.__name__, lambda each=each: _play(each)) for each in SCENARIOS]  # type: ignore[misc]
    for seed in range(seeds):
        for story in (None, *PAIR_STORIES):
            case = Case(seed, Options(story=story))
            found.append(Trial(case.command(), lambda case=case: _run(case)))  # type: ignore[misc]
    return found


def _play(scenario: Callable[[], None]) -> str:
    try:
        play(scenario)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _run(case: Case) -> str:
    outcome = case.run()
    return outcome.text if isinstance(outcome, Failure) else ""


def measure(every: list[Trial], files: set[str]) -> list[Trial]:
    """Those that go well, with the lines that they come through."""
    good = []
    for each in every:
        watch = coverage.Coverage(data_file=None, config_file=False, include=sorted(files))
        watch.start()
        text = each.run()
        watch.stop()
        if text:
            print(f"fails without any change: {each.name}: {text[:150]}", file=sys.stderr)
            continue
        data = watch.get_data()
        each.lines = {name: set(data.lines(name) or ()) for name in data.measured_files()}
        good.append(each)
    return good


def judge(mutant: Mutant, every: list[Trial], budget_s: float) -> tuple[Trial | None, str]:
    """Who found it, and by what; (None, why) when nobody did."""
    path = os.path.realpath(sys.modules[mutant.module].__file__ or "")
    fit = [each for each in every if mutant.line in each.lines.get(path, ())]
    if not fit:
        return None, "no run comes there"
    fit.sort(key=lambda each: -each.found)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        _child(mutant, fit, budget_s, writing)
    os.close(writing)
    with os.fdopen(reading) as answers:
        lines = answers.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) or not lines or lines[-1] != "survives":
        at = int(lines[-1].split()[0]) if lines else 0
        text = lines[-1].partition(" ")[2] if lines else ""
        fit[at].found += 1
        return fit[at], text or "hangs"
    return None, f"survives {len(lines) - 1} of {len(fit)} runs"


def _child(mutant: Mutant, fit: list[Trial], budget_s: float, writing: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    began_s = time.process_time()
    try:
        with planted(mutant):
            for index, each in enumerate(fit):
                signal.setitimer(signal.ITIMER_VIRTUAL, HANGS_S)
                os.write(writing, f"{index} ".encode())
                text = each.run().replace("\n", " ")[:200]
                os.write(writing, f"{text}\n".encode())
                if text:
                    os._exit(0)
                if time.process_time() - began_s > budget_s:
                    break
        os.write(writing, b"survives\n")
    finally:
        os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("modules", nargs="+", metavar="MODULE", help="blockrepl.replication.streams …")
    add("--seeds", type=int, default=12, metavar="N", help="of each story (12)")
    add("--budget", type=float, default=6.0, metavar="SECONDS", help="of CPU for each mutant (6)")
    add("--only", metavar="WORDS,…", help="these kinds of changes: left out, taken for false, …")
    add("--number", type=int, metavar="K", help="this one alone")
    add("--sample", type=float, default=1.0, metavar="SHARE", help="so many of them, at random")
    add("--minutes", type=float, metavar="M")
    add("--again", metavar="FILE", help="only the mutants that a former report says survived")
    args = parser.parse_args()
    mutants = list(_chosen(args))
    files = {os.path.realpath(sys.modules[each.module].__file__ or "") for each in mutants}
    every = measure(trials(args.seeds), files)
    began_s, killed, survived, unseen = time.monotonic(), 0, 0, 0
    for mutant in mutants:
        if args.minutes and time.monotonic() - began_s > args.minutes * 60:
            print("time is over")
            break
        found, text = judge(mutant, every, args.budget)
        killed += found is not None
        unseen += text == "no run comes there"
        survived += found is None and text != "no run comes there"
        word = "killed" if found is not None else "UNSEEN" if text == "no run comes there" else "SURVIVES"
        print(f"{word} {mutant} [{found.name + ': ' if found else ''}{text}]", flush=True)
    print(
        f"{killed + survived + unseen} mutants: {killed} found, {survived} survive, {unseen} in lines that no run sees"
    )
    return 0


def _chosen(args: argparse.Namespace) -> Iterable[Mutant]:
    draw = random.Random(1)
    former = Path(args.again).read_text() if args.again else None
    for name in args.modules:
        for mutant in mutants_of(name):
            if args.number and mutant.number != args.number:
                continue
            if args.only and mutant.what not in args.only.split(","):
                continue
            if former is not None and f"SURVIVES {mutant} [" not in former:
                continue
            if draw.random() < args.sample:
                yield mutant


if __name__ == "__main__":
    sys.exit(main())
