"""``marker``: names that applications put into the order of the writes, and wait for."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from blockrepl.cli.client import call
from blockrepl.cli.output import console, print_json
from blockrepl.cli.targets import File, Json, Target, find
from blockrepl.errors import TimeoutExpiredError

POLL_S = 0.05

app = typer.Typer(help="Names in the order of the writes: put, wait.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(metavar="NAME", help="Up to 255 bytes of printable text.")]


@app.callback()
def marker() -> None:
    """Names in the order of the writes: put, wait."""


@app.command("put")
def marker_put(name: Name, target: Target = None, file: File = None, as_json: Json = False) -> None:
    """Put a name into the order: after every write that has completed, before every one that begins later."""
    definition = find(target, file)
    result = call(definition.intermediate.directory, "marker_put", {"name": name})
    if as_json:
        print_json({"schema": 1, "group": definition.name, **result})
    else:
        console().print(f"{definition.name}: {name} is number {result['number']}")


@app.command("wait")
def marker_wait(
    name: Name,
    target: Target = None,
    file: File = None,
    timeout_s: Annotated[float, typer.Option("-t", "--timeout", metavar="SECONDS", help="How long.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Wait until every secondary holds all up to a marker, durably, and has applied it."""
    definition = find(target, file)
    deadline_s = time.monotonic() + timeout_s
    while True:
        result = call(definition.intermediate.directory, "marker", {"name": name})
        if result["applied"]:
            break
        if time.monotonic() >= deadline_s:
            said = "held by all, not applied" if result["validated"] else "not held by all secondaries"
            raise TimeoutExpiredError(f"{name}: {said} after {timeout_s:g} s", hint="see: blockrepl status")
        time.sleep(POLL_S)
    if as_json:
        print_json({"schema": 1, "group": definition.name, **result})
    else:
        console().print(f"{definition.name}: every secondary has all up to {name}, number {result['number']}")
