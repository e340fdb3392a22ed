"""`scripts/simulate`: many seeds, or one with its trace."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from tests.sim.group import Group, Options


def show(group: Group, lines: int) -> None:
    """The end of a trace."""
    for now_s, who, text in list(group.world.trace)[-lines:]:
        print(f"{now_s:9.4f} {who:4} {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a consistency group under simulated faults.")
    parser.add_argument("--seeds", type=int, default=100, help="how many runs")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--seed", type=int, help="one run, with its trace")
    parser.add_argument("--seconds", type=float, default=8.0, help="simulated seconds with faults, per run")
    parser.add_argument("--story", choices=["production", "attempts", "disaster", "planned"])
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failure")
    args = parser.parse_args()
    options = Options(seconds=args.seconds, story=args.story)
    if args.seed is not None:
        group = Group(args.seed, options)
        group.world.echo = True
        print(group.run())
        return 0
    began = time.monotonic()
    counts: Counter[str] = Counter()
    failures: list[tuple[int, str]] = []
    for seed in range(args.first, args.first + args.seeds):
        if args.minutes and time.monotonic() - began > args.minutes * 60:
            break
        group = Group(seed, options)
        try:
            result = group.run()
        except (Exception, AssertionError) as error:
            failures.append((seed, f"{type(error).__name__}: {error}"))
            print(f"seed {seed} ({group.story}): {type(error).__name__}: {error}", flush=True)
            print(f"    replay: scripts/simulate --seed {seed} --seconds {args.seconds:g}"
                  + (f" --story {args.story}" if args.story else ""), flush=True)  # fmt: skip
            if not args.keep_going:
                show(group, 60)
                traceback.print_exc()
                break
        else:
            counts.update(
                steps=result.steps, records=result.records, completions=result.completions, errors=result.errors,
                faults=result.faults, trials=result.trials, takeovers=result.taken_over, digests=result.digests,
            )  # fmt: skip
        counts["runs"] += 1
    took_s = time.monotonic() - began
    print(f"{counts['runs']} runs in {took_s:.1f} s, {counts['steps'] / took_s:.0f} steps/s; " + ", ".join(
        f"{name} {count}" for name, count in counts.items() if name != "runs"))  # fmt: skip
    print(f"{len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
