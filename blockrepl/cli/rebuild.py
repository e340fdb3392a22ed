"""``rebuild``: a source's lost image, made anew from the intermediate volume (volumes mode)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from blockrepl.cli.nbd_reader import NbdReader
from blockrepl.cli.output import bytes_text, console
from blockrepl.cli.targets import File, find_volume
from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import StorageError, UsageError
from blockrepl.formats.link import Pair

PIECE_BYTES = 1 << 20


def rebuild(
    target: Annotated[str, typer.Argument(metavar="GROUP/VOLUME", help="The volume whose image is lost.")],
    file: File = None,
    force: Annotated[
        bool, typer.Option("--force", help="Though the lost image had writes that nobody else has.")
    ] = False,
) -> None:
    """Make a source's lost image anew from the intermediate volume.

    Run it where the image was, with that node stopped; then start the node. What was acknowledged is all there, unless
    the source had gone on alone.
    """
    definition, volume = find_volume(target, file)
    from blockrepl.node.base import lock_directory

    node = _lost(definition, volume)
    lock = lock_directory(node)
    try:
        _check(definition, node, force=force)
        size_bytes = _fetch(definition, node, volume)
    finally:
        os.close(lock)
    console().print(f"{volume.name}: {bytes_text(size_bytes)} from {definition.intermediate.name}")
    console().print(f"now: blockrepl up {definition.name} --node {node.name}")


def _lost(definition: Definition, volume: Volume) -> Node:
    """The node of this machine that lacks its image. Raises UsageError."""
    from blockrepl.node.create import image_path

    if not volume.replicated or not definition.volumes_mode:
        raise UsageError(
            f"there is no intermediate volume of {volume.name}",
            hint='this takes mode = "volumes"; without it, take over at the other site, then: blockrepl replace',
        )
    if definition.intermediate.nbd is None:
        raise UsageError(
            f"{definition.intermediate.name} does not export its volumes",
            hint='write nbd = "HOST:PORT" under it in the definition, and start it again',
        )
    ends = [definition.end(volume, site) for site in (0, 1)]
    here = [node for node in ends if node in definition.local_nodes()]
    lost = [node for node in here if not image_path(node, volume).exists()]
    if not lost:
        names = ", ".join(str(image_path(node, volume)) for node in here) or "no image of it belongs on this machine"
        raise UsageError(f"nothing is lost: {names}", hint="a damaged image is to be moved away first")
    return lost[0]


def _check(definition: Definition, node: Node, *, force: bool) -> None:
    """It must be a source, all of whose writes the intermediate has. Raises UsageError."""
    from blockrepl.cli.journal_reader import JournalReader
    from blockrepl.formats.slots import SLOTS_BYTES
    from blockrepl.formats.state import decode_primary, decode_secondary
    from blockrepl.node.config_file import journal_path
    from blockrepl.node.create import STATE_NAME, journal_identity, state_identity
    from blockrepl.storage.slots import Slots

    reader = JournalReader(journal_path(definition, node), journal_identity(definition, node))
    active = decode_secondary(reader.state).active
    reader.close()
    if not active:
        raise UsageError(
            f"{node.name} is a target now: its images are at a number that is not the intermediate volume's",
            hint=f"move its directory away, then: blockrepl replace --node {node.name}",
        )
    data = (node.directory / STATE_NAME).read_bytes()[:SLOTS_BYTES]
    state = decode_primary(Slots.load(data, state_identity(definition, node))[1])
    if state.suspended and not force:
        raise UsageError(
            f"{node.name} is suspended ({Pair(state.suspended).name}): the lost image had writes that nobody else has",
            hint="--force gives them up",
        )


def _fetch(definition: Definition, node: Node, volume: Volume) -> int:
    """Under another name until it is whole and durable. Returns how much was no zeroes. Raises BlockreplError."""
    from blockrepl.formats.image import Side
    from blockrepl.node.create import image_identity, image_path
    from blockrepl.storage.files import sync_directory
    from blockrepl.storage.image import identity_path, write_durably

    address = definition.intermediate.nbd
    assert address is not None
    path = image_path(node, volume)
    part = path.with_name(path.name + ".part")
    side = Side.SECONDARY if node.site else Side.PRIMARY
    with NbdReader(address, volume.name) as export:
        if export.size_bytes != volume.size_bytes:
            raise UsageError(f"{export.name} has {export.size_bytes} bytes, {volume.name} has {volume.size_bytes}")
        try:
            copied = _copy(export, part, volume.size_bytes)
            write_durably(identity_path(path), image_identity(definition, volume, node, side).pack())
            part.rename(path)
            sync_directory(path.parent)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
    return copied


def _copy(export: NbdReader, part: Path, size_bytes: int) -> int:
    copied = 0
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        for start in range(0, size_bytes, PIECE_BYTES):
            data = export.read(start, min(PIECE_BYTES, size_bytes - start))
            if data.count(0) == len(data):
                continue  # stays a hole
            view = memoryview(data)
            while view:
                start += (written := os.pwrite(fd, view, start))
                view = view[written:]
            copied += len(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return copied
