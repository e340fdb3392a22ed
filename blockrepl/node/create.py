"""`blockrepl create`: makes a node's journal or state file and its images. Nothing else ever makes them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import StorageError, UsageError
from blockrepl.formats.image import Side
from blockrepl.formats.slots import SlotKind
from blockrepl.formats.state import (
    IntermediateState,
    PrimaryState,
    SecondaryState,
    encode_intermediate,
    encode_primary,
    encode_secondary,
)
from blockrepl.node.bitmaps import bitmap_identity, bitmap_path, bitmapped
from blockrepl.storage.bitmap_file import BitmapFile
from blockrepl.storage.image import ImageFile, ImageIdentity, identity_path
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.slot_file import SlotFile
from blockrepl.storage.slots import Identity

STATE_NAME = "state"
JOURNAL_NAME = "journal"
KINDS = {"primary": SlotKind.STATE, "intermediate": SlotKind.JOURNAL, "secondary": SlotKind.JOURNAL}


def identity(definition: Definition, node: Node) -> Identity:
    """Of a node's journal or state file."""
    return Identity(definition.group_id.bytes, node.id, KINDS[node.role])


def image_identity(definition: Definition, volume: Volume, node: Node, side: Side) -> ImageIdentity:
    """Of one image of a volume."""
    return ImageIdentity(
        definition.group_id, volume.id, node.id, side, volume.size_bytes, definition.block_size_bytes
    )  # fmt: skip


def image_path(node: Node, volume: Volume) -> Path:
    """Where a node keeps its image of a volume."""
    return node.directory / f"{volume.name}.img"


def images_of(definition: Definition, node: Node) -> list[tuple[Volume, Side]]:
    """The images that belong on a node."""
    if node.role == "primary":
        return [(volume, Side.PRIMARY) for volume in definition.volumes_of_primary(node.name)]
    if node.role == "secondary":
        return [(volume, Side.SECONDARY) for volume in definition.volumes_of_secondary(node.name)]
    return []


def create(definition: Definition, node: Node) -> None:
    """Make everything of one node, or nothing.

    Raises UsageError (it exists, or an image holds data: there is no initial copy yet), NoSpaceError, StorageError.
    """
    try:
        node.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {node.directory}: {error.strerror}") from error
    main = node.directory / (STATE_NAME if node.role == "primary" else JOURNAL_NAME)
    if main.exists():
        raise UsageError(f"{main} exists already", hint="`blockrepl create` never overwrites; move it away first")
    made: list[Path] = []
    try:
        for volume in bitmapped(definition, node):
            path = bitmap_path(node, volume)
            BitmapFile.create(path, bitmap_identity(definition, node, volume))
            made.append(path)
        for volume, side in images_of(definition, node):
            path = image_path(node, volume)
            existed = path.exists()
            if ImageFile.create(path, image_identity(definition, volume, node, side)):
                made += [identity_path(path)] if existed else [path, identity_path(path)]
        _create_main(definition, node, main)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _create_main(definition: Definition, node: Node, path: Path) -> None:
    who = identity(definition, node)
    if node.role == "primary":
        SlotFile.create(path, who, encode_primary(PrimaryState()))
    elif node.role == "intermediate":
        JournalFile.create(path, who, int(definition.group.journal), encode_intermediate(IntermediateState()))
    else:
        JournalFile.create(path, who, int(definition.group.secondary_journal), encode_secondary(SecondaryState()))
