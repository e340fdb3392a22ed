"""`scripts/simulate`: many seeds; or one, its story told, and made short."""

from __future__ import annotations

import argparse
import signal
import sys
from collections import deque
from contextlib import nullcontext

from tests.sim.bugs import NAMES, by_name, options_for
from tests.sim.campaign import campaign
from tests.sim.case import Case, Failure
from tests.sim.group import Options
from tests.sim.plan import KINDS, PAIR_STORIES, SITES_STORIES, STORIES
from tests.sim.shrink import Shrinker


def numbers(text: str) -> frozenset[int]:
    """ "3,9" """
    return frozenset(int(word) for word in text.split(",") if word)


def kinds(text: str) -> tuple[str, ...]:
    """ "kill,power" """
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [word for word in found if word not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description="Runs a group under simulated faults.")
    add = parser.add_argument
    add("--seeds", type=int, default=100, metavar="N", help="how many runs (100)")
    add("--from", type=int, default=0, dest="first", metavar="K", help="the first seed (0)")
    add("--minutes", type=float, metavar="M", help="stop after so many minutes")
    add("--jobs", type=int, default=0, help="how many processes (one per core)")
    add("--keep-going", action="store_true", help="go on after a failure")
    add("--seed", type=int, metavar="K", help="one run, and its story")
    add("--shrink", action="store_true", help="with --seed: make a failing run short")
    add("--lines", type=int, default=150, help="with --seed: the last so many lines of the story (150); 0 for all")
    add("--planted", choices=NAMES, metavar="NAME", help="with a planted bug: see docs/planted.md")
    one = parser.add_argument_group("what a run is; drawn from the seed where not given")
    add = one.add_argument
    add("--seconds", type=float, default=Options.seconds, help="simulated seconds with faults (8)")
    add("--steps", type=int, metavar="N", help="instead: so many steps with faults, of a group that is up")
    add("--story", choices=sorted({*STORIES, *PAIR_STORIES, *SITES_STORIES}))
    add("--threads", type=int, help="hosts' threads")
    add("--volumes", type=int, choices=[1, 2, 3])
    add("--ring", type=int, metavar="BYTES", help="the intermediate's ring")
    add("--volumes-mode", choices=["True", "False"], help="the intermediate keeps images, at the beginning")
    add("--every", type=float, metavar="SECONDS", help="mean time between faults")
    add("--duplicate", type=float, metavar="SHARE", help="of messages that come a second time")
    add("--only", type=kinds, metavar="KIND,…", help="these faults only")
    add("--strict", action="store_true", help="a peer that finds another at fault is a violation, though it heals")
    less = parser.add_argument_group("what the shrinker leaves out")
    add = less.add_argument
    add("--until", type=float, metavar="SECONDS", help="faults and hosts stop then")
    add("--faults", type=numbers, metavar="N,…", help="only these faults of the seed's plan")
    add("--salt", type=int, default=0, help="other delays and contents")
    return parser.parse_args()


def options_of(args: argparse.Namespace) -> Options:
    """What the command line says, over what a planted bug asks for."""
    planted = options_for(args.planted) if args.planted else Options()
    story = args.story or planted.story
    return Options(
        seconds=args.seconds, steps=args.steps, threads=args.threads or planted.threads, volumes=args.volumes,
        ring_bytes=args.ring,
        story=story, fault_every_s=args.every or planted.fault_every_s,
        faults=args.only if args.only is not None else planted.faults,
        duplicate=planted.duplicate if args.duplicate is None else args.duplicate,
        volumes_mode=args.volumes_mode and args.volumes_mode == "True", until_s=args.until, keep=args.faults,
        salt=args.salt, strict=args.strict,
    )  # fmt: skip


def tell(case: Case, lines: int) -> int:
    """One run: its story, and what broke."""
    within = by_name(case.planted) if case.planted else nullcontext
    outcome = case.run(within)
    story = list(case.story(within)) if lines == 0 else list(deque(case.story(within), maxlen=lines))
    print("\n".join(story))
    if isinstance(outcome, Failure):
        print(f"\n{outcome.text}\n\n{outcome.where}\nreplay: {case.command()}")
        return 1
    print(outcome)
    return 0


def interrupted(*_: object) -> None:
    """SIGTERM counts as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupted)
    args = parse()
    options = options_of(args)
    if args.seed is None:
        tally = campaign(args.first, args.seeds, options, planted=args.planted or "", minutes=args.minutes,
                         jobs=args.jobs, keep_going=args.keep_going)  # fmt: skip
        print(tally)
        for case, failure in tally.failures:
            print(f"{failure.text}\n    replay: {case.command()}")
        if tally.failures and not args.keep_going:
            return tell(tally.failures[0][0], args.lines)
        return 1 if tally.failures else 0
    case = Case(args.seed, options, args.planted or "")
    if args.shrink:
        within = by_name(case.planted) if case.planted else nullcontext
        outcome = case.run(within)
        if not isinstance(outcome, Failure):
            print(f"seed {case.seed} does not fail: nothing to make short")
            return 2
        print(outcome.text)
        case, _ = Shrinker(case, outcome, within).shrink()
    return tell(case, args.lines)


if __name__ == "__main__":
    sys.exit(main())
