"""``config check``: is a definition right?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockrepl.cli.output import console, print_error, print_json
from blockrepl.cli.targets import Json
from blockrepl.definition import check, load
from blockrepl.errors import DefinitionError

app = typer.Typer(help="Look at definitions.", no_args_is_help=True)


@app.callback()
def config() -> None:
    """Look at definitions."""


@app.command("check")
def config_check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Definitions, such as targets/demo.toml.")],
    as_json: Json = False,
) -> None:
    """Check definitions: every problem, place and remedy.

    Exit 0: all are right; 3: some are not.
    """
    found = {str(path): check(path) for path in files}
    if as_json:
        print_json({"schema": 1, "files": [_described(path, problems) for path, problems in found.items()]})
    else:
        for path, problems in found.items():
            for problem in problems:
                print_error(problem)
            if not problems:
                definition = load(path)
                counts = f"{len(definition.nodes)} nodes, {len(definition.volumes)} volumes"
                console().print(f"{path}: ok: group {definition.name}, {counts}")
    if any(found.values()):
        raise typer.Exit(DefinitionError.exit_code)


def _described(path: str, problems: list[DefinitionError]) -> dict[str, object]:
    errors = [{"where": each.where, "message": str(each), "hint": each.hint} for each in problems]
    return {"file": path, "ok": not problems, "errors": errors}
