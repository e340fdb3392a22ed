"""``doctor``: what this machine can do, and how to get what is missing."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.table import Table

from blockrepl.cli import machine
from blockrepl.cli.lifecycle import clean_leftovers
from blockrepl.cli.machine import Check
from blockrepl.cli.output import console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.definition import Definition
from blockrepl.errors import EnvironmentLacksError

VERDICTS = {(True, True): ("ok", "green"), (True, False): ("ok", "green")}
VERDICTS |= {(False, True): ("MISSING", "bold red"), (False, False): ("missing", "yellow")}


def doctor(
    target: Target = None,
    file: File = None,
    clean: Annotated[bool, typer.Option("--clean", help="Remove loop devices and mounts of killed nodes.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine can do and how to get the rest.

    Exit 0: the main job can run here; 5: it cannot.
    """
    definition = find(target, file) if target or file else None
    if clean and definition is not None:
        for node in definition.local_nodes():
            clean_leftovers(node)
    checks = all_checks(definition)
    works = all(check.ok for check in checks if check.required)
    if as_json:
        print_json({"schema": 1, "ok": works, "checks": checks})
    else:
        _print(checks, works)
    if not works:
        raise typer.Exit(EnvironmentLacksError.exit_code)


def all_checks(definition: Definition | None) -> list[Check]:
    """In the order in which one would mend them."""
    checks = [*machine.python_checks(), *machine.kernel_checks(), *machine.program_checks()]
    return checks + (machine.definition_checks(definition) if definition is not None else [])


def _print(checks: list[Check], works: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("WHAT", "", "FOUND", "FOR", "HOW TO GET IT"):
        table.add_column(column, overflow="fold")
    for check in checks:
        verdict, style = VERDICTS[check.ok, check.required]
        remedy = "" if check.ok else check.remedy
        table.add_row(check.name, f"[{style}]{verdict}[/]", check.found, check.purpose, remedy)
    console().print(table)
    lacking = sum(not check.ok for check in checks)
    if works:
        console().print("the main job can run here" + (f"; {lacking} optional things are missing" if lacking else ""))
    else:
        console().print("the main job cannot run here: see MISSING above")
    if os.geteuid() != 0:
        console().print("not root: volumes are reached over NBD; `attach` needs root")
