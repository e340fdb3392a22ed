"""The torture's command line."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from scripts.demolib.group import ROOT
from scripts.interrupts import interrupt_on_termination, uninterrupted
from scripts.torturelib import enclosure
from scripts.torturelib.campaign import Campaign, Means
from scripts.torturelib.errors import TortureError
from tests.torture.broken_node import BUGS

PLACE = ROOT / "images"
NEEDED_BYTES = 6 << 30
BROKEN, INTERRUPTED = 1, 130


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parsed."""
    parser = argparse.ArgumentParser(
        prog="scripts/torture",
        description="Real groups under kill -9, SIGSTOP, cut links, power loss, full journals and takeovers.",
        epilog="Exit: 0 every round kept the promise, 1 one did not, others: it could not run.",
    )
    parser.add_argument("--minutes", metavar="M", type=float, help="so long (default: 5, or as long as --rounds take)")
    parser.add_argument("--rounds", metavar="N", type=int, help="so many")
    parser.add_argument("--seed", metavar="K", type=int, help="faults and loads by chance, from this number")
    parser.add_argument("--only", metavar="KIND", help="one kind of life: " + ", ".join(Campaign.KINDS))
    parser.add_argument("--short", action="store_true", help="short lives, so that every kind has its turn soon")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every round there")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="where logs of a group that failed go")
    parser.add_argument("--proxies", action="store_true", help="no namespaces, though they could be had")
    parser.add_argument(
        "--plant",
        metavar="BUG",
        choices=["", *BUGS],
        default="",
        help="plant a bug: " + ", ".join(BUGS) + "; must end with 1",
    )
    parser.add_argument("--verbose", action="store_true", help="every fault as it happens")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = arguments(argv)
    why_not = "asked for with --proxies" if options.proxies else enclosure.enter()
    interrupt_on_termination()
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    minutes = options.minutes if options.minutes is not None or options.rounds is not None else 5.0
    try:
        with home() as directory:
            means = Means.here(directory, why_not)
            campaign = Campaign(
                means, seed, options.only, options.keep, verbose=options.verbose, bug=options.plant,
                short=options.short,
            )  # fmt: skip
            print(f"seed {seed}; {means}", flush=True)
            campaign.run(options.rounds, None if minutes is None else time.monotonic() + 60 * minutes)
    except KeyboardInterrupt:
        print("torture: interrupted; everything is stopped and removed", file=sys.stderr)
        return INTERRUPTED
    except TortureError as error:
        print(f"torture: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        document = {"schema": 1, "seed": seed, "ok": campaign.ok, "rounds": [asdict(each) for each in campaign.rounds]}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    print(campaign.summary())
    return 0 if campaign.ok else BROKEN


@contextmanager
def home() -> Iterator[Path]:
    """A directory of our own, locked; those that killed tortures left are removed."""
    PLACE.mkdir(exist_ok=True)
    for old in PLACE.glob("torture-*"):
        with suppress(BlockingIOError, FileNotFoundError), _locked(old):
            shutil.rmtree(old)
    free_bytes = shutil.disk_usage(PLACE).free
    if free_bytes < NEEDED_BYTES:
        raise TortureError(f"{PLACE} has {free_bytes >> 20} MiB free, the torture needs {NEEDED_BYTES >> 20}", 25)
    directory = PLACE / f"torture-{os.urandom(4).hex()}"
    directory.mkdir()
    with _locked(directory):
        try:
            yield directory
        finally:
            with uninterrupted():
                shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
