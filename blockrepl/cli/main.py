"""The command line. One module per family of commands; this one joins them and turns errors into exit codes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import blockrepl
from blockrepl.cli import (
    adjust,
    bitmap,
    config,
    copies,
    devices,
    doctor,
    explain,
    journal,
    lifecycle,
    marker,
    pair,
    rebuild,
    replacing,
    status,
)
from blockrepl.cli.output import print_error
from blockrepl.errors import BlockreplError

app = typer.Typer(
    name="blockrepl",
    help="Ordered, zero-loss remote copy for block volumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"blockrepl {blockrepl.__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Ordered, zero-loss remote copy for block volumes."""


for command in (
    lifecycle.create,
    lifecycle.up,
    lifecycle.down,
    lifecycle.serve,
    lifecycle.ls,
    adjust.adjust,
    devices.attach,
    devices.detach,
    status.status,
    copies.takeover,
    copies.verify,
    replacing.replace,
    rebuild.rebuild,
    explain.explain,
    journal.journal,
    bitmap.bitmap,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(pair.app, name="pair")
app.add_typer(pair.node_app, name="node")
app.add_typer(marker.app, name="marker")
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point. Expected errors become a message, a hint and their class's exit code, never a traceback."""
    try:
        app()
    except BlockreplError as error:
        print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `blockrepl status | head`
        sys.stderr.close()
        sys.exit(141)


if __name__ == "__main__":
    main()
