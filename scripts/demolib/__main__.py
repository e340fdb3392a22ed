"""The demo's command line."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockrepl.errors import BlockreplError
from scripts.demolib.errors import DemoError
from scripts.demolib.group import FAR, FILE_NAME, LINE_DELAY_S, ROOT, Group, write_definition
from scripts.demolib.host import FILE_SYSTEMS, VOLUMES, FileHost, Host, NbdHost, why_no_loop
from scripts.demolib.picture import Picture
from scripts.demolib.story import SCENARIOS, Outcome, Scenario, play
from scripts.interrupts import interrupt_on_termination, uninterrupted

HOME = ROOT / "images" / "demo-run"
NEEDED_BYTES = 3 << 30
VIOLATED, UNNOTICED, INTERRUPTED = 1, 7, 130


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parsed."""
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="A consistency group, a site disaster, a takeover; and again with the intermediate lost too.",
        epilog="Exit: 0 the promise was kept, 1 it was not, others: it could not run.",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcome there")
    parser.add_argument(
        "--break-ordering", action="store_true",
        help="plant a bug: the secondaries store what comes without waiting for each other; must end with 1",
    )  # fmt: skip
    parser.add_argument("--only", choices=[each.name for each in SCENARIOS], help="one scenario instead of both")
    parser.add_argument("--nbd", action="store_true", help="raw volumes over NBD, though loop devices could be had")
    parser.add_argument(
        "--port-base", metavar="N", type=int, help="ports from N on instead of those of targets/demo.toml"
    )
    parser.add_argument("--plain", action="store_true", help="lines only, though this is a terminal")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    options = arguments(argv)
    interrupt_on_termination()
    console = Console(highlight=False, force_terminal=False if options.plain else None)
    errors = Console(stderr=True, highlight=False)
    try:
        with home() as directory:
            outcomes = tell(options, directory, console)
        code = conclude(outcomes, options, console)
    except KeyboardInterrupt:
        errors.print("demo: interrupted; everything is stopped and removed")
        return INTERRUPTED
    except DemoError as error:
        errors.print(Text(f"demo: {error}"), soft_wrap=True)
        return error.exit_code
    except BlockreplError as error:
        errors.print(Text(f"demo: {error}" + (f"\nhint: {error.hint}" if error.hint else "")), soft_wrap=True)
        return error.exit_code
    return code


@contextmanager
def home() -> Iterator[Path]:
    """The demo's own directory: one demo at a time, and nothing of it stays. Cleans up after a killed one."""
    HOME.parent.mkdir(exist_ok=True)
    lock = os.open(HOME.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError("another demo runs in this directory", 23) from None
        if HOME.exists():
            clear(HOME)
        free_bytes = shutil.disk_usage(HOME.parent).free
        if free_bytes < NEEDED_BYTES:
            raise DemoError(f"{HOME.parent} has {free_bytes >> 20} MiB free, the demo needs {NEEDED_BYTES >> 20}", 25)
        HOME.mkdir()
        try:
            yield HOME
        finally:
            with uninterrupted():
                clear(HOME)
    finally:
        os.close(lock)


def clear(directory: Path) -> None:
    """Stop, unmount and remove what lives in a demo's directory."""
    if (directory / FILE_NAME).exists():
        FileHost.unmount_all(directory)
        Group(directory).down()
    shutil.rmtree(directory)


def tell(options: argparse.Namespace, directory: Path, console: Console) -> list[Outcome]:
    """Both scenarios, each with a fresh group."""
    reason = "asked for with --nbd" if options.nbd else why_no_loop()
    if reason:
        console.print(
            f"No file systems on loop devices ({reason}): the same story with raw volumes over NBD.", style="yellow"
        )
    else:
        what = " and ".join(f"{FILE_SYSTEMS[volume]} on {volume}" for volume in VOLUMES)
        console.print(f"Loop devices with {what}; two primaries, an intermediate, two secondaries.")
    console.print(f"The line from the intermediate to {FAR} is {LINE_DELAY_S:g} s long, the other is short.")
    if options.break_ordering:
        console.print(
            "A bug is planted: secondaries store what comes at once, without waiting for VALIDATE.", style="bold red"
        )
    outcomes = []
    with Picture(console) as picture:
        for scenario in SCENARIOS:
            if options.only not in (None, scenario.name):
                continue
            picture.title(scenario.title)
            outcomes.append(_one(scenario, options, directory, picture, NbdHost if reason else FileHost))
    return outcomes


def _one(
    scenario: Scenario, options: argparse.Namespace, directory: Path, picture: Picture, kind: type[Host]
) -> Outcome:
    write_definition(directory, options.port_base)
    group = Group(directory, picture.say)
    group.check_ports()
    host = kind(group, picture.say)
    picture.watch(group, host.ledger)
    try:
        outcome = play(scenario, group, host, picture.say, broken=options.break_ordering)
        _tell_outcome(outcome, picture)
        return outcome
    finally:
        with uninterrupted():
            picture.unwatch()
            host.leave()
            group.down()


def _tell_outcome(outcome: Outcome, picture: Picture) -> None:
    verdict = outcome.verdict
    lost, all_acked = verdict.acked_writes_lost, verdict.acked
    there = f"records: {verdict.records_a} on data, {verdict.records_b} on log"
    picture.say(f"{there}; {lost} of {all_acked} acknowledged ones missing")
    if verdict.ahead:
        picture.say(f"VIOLATION: log holds records that data lacks: {', '.join(map(str, verdict.ahead))} …")
    for problem in outcome.problems:
        picture.say(f"NOT KEPT: {problem}")


def conclude(outcomes: list[Outcome], options: argparse.Namespace, console: Console) -> int:
    """The table, the JSON, the exit code."""
    console.print()
    console.print(_table(outcomes))
    violations = sum(outcome.verdict.order_violations for outcome in outcomes)
    kept = not any(outcome.problems for outcome in outcomes)
    if options.json is not None:
        document = {
            "schema": 1, "ok": kept, "break_ordering": options.break_ordering, "order_violations": violations,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "scenarios": [outcome.as_dict() for outcome in outcomes],
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if options.break_ordering:
        if violations:
            console.print(f"The planted bug was noticed: {violations} order violations.", style="bold red")
            return VIOLATED
        console.print("The planted bug was NOT noticed: this check proves nothing.", style="bold red")
        return UNNOTICED
    for outcome in outcomes:
        for problem in outcome.problems:
            console.print(Text(f"{outcome.scenario.name}: {problem}", "bold red"))
    if kept:
        console.print("The promise was kept.", style="bold green")
    return 0 if kept else VIOLATED


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title="What was left at the secondary site", title_justify="left", min_width=70)
    table.add_column("")
    for outcome in outcomes:
        table.add_column(
            "intermediate lost too" if outcome.scenario.intermediate_lost else "intermediate alive", justify="right"
        )
    rows: list[tuple[str, list[Any]]] = [
        ("recovery: from the kill to writable", [f"{each.takeover_seconds:.2f} s" for each in outcomes]),
        ("the same, checked and mounted", [f"{each.usable_seconds:.2f} s" for each in outcomes]),
        ("acknowledged writes", [each.verdict.acked for each in outcomes]),
        ("acknowledged writes lost", [each.verdict.acked_writes_lost for each in outcomes]),
        ("order violations", [each.verdict.order_violations for each in outcomes]),
        *((f"fsck of {volume}", [_fsck(each.fsck[volume]) for each in outcomes]) for volume in VOLUMES),
        ("fio's blocks", [{None: "no fio", "clean": "all whole"}.get(each.fio, "BAD") for each in outcomes]),
    ]
    for heading, cells in rows:
        table.add_row(heading, *map(str, cells))
    return table


def _fsck(found: dict[str, Any] | None) -> str:
    return "no file system" if found is None else "clean" if found["clean"] else "NOT clean"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
