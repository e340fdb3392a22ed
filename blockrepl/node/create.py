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
UNDO_NAME = "undo"  # a target's way back from a copy; made by itself


def journal_identity(definition: Definition, node: Node) -> Identity:
    """Of a node's journal."""
    return Identity(definition.group_id.bytes, node.id, SlotKind.JOURNAL)


def state_identity(definition: Definition, node: Node) -> Identity:
    """Of a data node's state file: what it is as a source."""
    return Identity(definition.group_id.bytes, node.id, SlotKind.STATE)


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
    return [
        (volume, Side.PRIMARY if volume.primary == node.name else Side.SECONDARY)
        for volume in definition.volumes_at(node.name)
    ]


def state_files(definition: Definition, node: Node) -> list[Path]:
    """What a node keeps beside its images; a node with plain volumes only needs nothing."""
    if node.role == "intermediate":
        return [node.directory / JOURNAL_NAME]
    if any(volume.replicated for volume in definition.volumes_at(node.name)):
        return [node.directory / STATE_NAME, node.directory / JOURNAL_NAME]
    return []


def create(definition: Definition, node: Node) -> None:
    """Make everything of one node, or nothing.

    Raises UsageError (it exists, or an image holds data: there is no initial copy yet), NoSpaceError, StorageError.
    """
    try:
        node.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {node.directory}: {error.strerror}") from error
    wanted = state_files(definition, node)
    for path in wanted:
        if path.exists():
            raise UsageError(f"{path} exists already", hint="`blockrepl create` never overwrites; move it away first")
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
        for path in wanted:
            _create_state(definition, node, path)
            made.append(path)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def _create_state(definition: Definition, node: Node, path: Path) -> None:
    group = definition.group
    if path.name == STATE_NAME:
        SlotFile.create(path, state_identity(definition, node), encode_primary(PrimaryState()))
    elif node.role == "intermediate":
        state = encode_intermediate(IntermediateState())
        JournalFile.create(path, journal_identity(definition, node), int(group.journal), state)
    else:
        source = node.role == "primary"
        state = encode_secondary(SecondaryState(active=source, writable=source))
        JournalFile.create(path, journal_identity(definition, node), int(group.secondary_journal), state)
