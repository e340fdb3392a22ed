"""The command line of `scripts/bench`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from scripts.benchlib import report
from scripts.benchlib.process import NotAvailableError
from scripts.benchlib.runner import Settings, run
from scripts.benchlib.works import GIB, MIB, SYSTEMS, WORKS, cells
from scripts.benchlib.workspace import file_system, workspace
from scripts.interrupts import interrupt_on_termination

_IMAGES = Path(__file__).resolve().parents[2] / "images"
_MIN_WIDTH = 130  # columns: a table cut short tells nothing
_QUICK_BUDGET_S = 48.0  # of 60: the rest is for starting the interpreter, the lag and stopping
_QUICK_RUNTIME_S, _QUICK_IMAGE_BYTES, _QUICK_JOURNAL_BYTES = 0.5, 64 * MIB, 128 * MIB


def names(known: list[str], noun: str, text: str) -> list[str]:
    """Comma-separated names, in the order of ``known``. Raises ArgumentTypeError that lists them."""
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no {noun} {name!r}; there are {', '.join(known)}")
    return [name for name in known if name in wanted]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures blockrepl and its peers on the same work, in turn. See docs/bench.md.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--quick", action="store_true", help="under 60 s: short runs of what the table of aims needs")
    parser.add_argument(
        "--only",
        type=lambda text: names(list(SYSTEMS), "system", text),
        default=list(SYSTEMS),
        metavar="SYSTEM,…",
        help=f"measure only these of {', '.join(SYSTEMS)}",
    )
    parser.add_argument(
        "--work",
        type=lambda text: names(list(WORKS), "work", text),
        default=list(WORKS),
        metavar="WORK,…",
        help=f"do only these of {', '.join(WORKS)}",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (3)")
    parser.add_argument("--runtime", type=float, metavar="S", help="seconds of each measurement (2)")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of each image (1024)")
    parser.add_argument("--dir", type=Path, default=_IMAGES, help="where images are made and removed (images/)")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or (options.runtime or 1) <= 0 or (options.size or 16) < 16:
        parser.error("--rounds is at least 1, --runtime above 0, --size at least 16")
    return options


def settings(options: argparse.Namespace) -> Settings:
    pairs = cells(options.work, options.only, quick=options.quick)
    if options.quick:
        return Settings(pairs, options.rounds, options.runtime or _QUICK_RUNTIME_S, _QUICK_BUDGET_S)
    return Settings(pairs, options.rounds, options.runtime or 2.0)


def main() -> int:
    options = parse(sys.argv[1:])
    progress = Console(stderr=True, soft_wrap=True)
    console = Console(width=max(_MIN_WIDTH, Console().width))
    start_s = time.monotonic()

    def tell(text: str) -> None:
        progress.print(f"bench: {time.monotonic() - start_s:5.1f} s  {text}", highlight=False, markup=False)

    interrupt_on_termination()
    size_bytes = options.size * MIB if options.size else _QUICK_IMAGE_BYTES if options.quick else GIB
    try:
        with workspace(options.dir, size_bytes, _QUICK_JOURNAL_BYTES if options.quick else 256 * MIB) as place:
            kind = file_system(place.directory)
            if kind in ("tmpfs", "ramfs"):
                progress.print(f"[yellow]{options.dir} is {kind}: durable writes cost nothing there[/yellow]")
            outcome = run(settings(options), place, tell)
    except NotAvailableError as error:
        progress.print(f"bench: {error}", highlight=False)
        return 5
    except KeyboardInterrupt:
        progress.print("bench: interrupted; everything is stopped and removed")
        return 130
    report.print_report(console, outcome)
    if options.json:
        options.json.write_text(json.dumps(report.document(outcome, kind, size_bytes), indent=1) + "\n")
    return 0 if outcome.measurements else 1


if __name__ == "__main__":
    sys.exit(main())
