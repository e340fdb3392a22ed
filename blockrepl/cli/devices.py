"""``attach`` and ``detach``: volumes as loop devices."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from blockrepl.cli.asking import attached_node, serving_node
from blockrepl.cli.client import call
from blockrepl.cli.targets import File, find_volume

VolumeArgument = Annotated[str, typer.Argument(metavar="GROUP/VOLUME", help="Such as demo/data.")]
TIMEOUT_S = 60.0


def attach(
    volume: VolumeArgument,
    file: File = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="The device refuses writes.")] = False,
) -> None:
    """Attach a volume as a loop device; print the device."""
    definition, found = find_volume(volume, file)
    node = serving_node(definition, found)
    args = {"volume": found.name, "read_only": read_only}
    _print_device(call(node.directory, "attach", args, timeout_s=TIMEOUT_S))


def detach(volume: VolumeArgument, file: File = None) -> None:
    """Undo `attach`; print the device.

    It is gone when this returns.
    """
    definition, found = find_volume(volume, file)
    node = attached_node(definition, found) or serving_node(definition, found)
    _print_device(call(node.directory, "detach", {"volume": found.name}, timeout_s=TIMEOUT_S))


def _print_device(result: dict[str, object]) -> None:
    sys.stdout.write(f"{result['device']}\n")
