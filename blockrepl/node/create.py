"""`blockrepl create`: makes a node's journal or state file and its images. Nothing else ever makes them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blockrepl.bitmap import Bitmap
from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import StorageError, UsageError
from blockrepl.formats.image import Side
from blockrepl.formats.link import Pair
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
from blockrepl.node.config_file import CONFIG_NAME, ConfigFile
from blockrepl.storage.bitmap_file import BitmapFile
from blockrepl.storage.image import ImageFile, ImageIdentity, holds_data, identity_path, write_durably
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.slot_file import SlotFile
from blockrepl.storage.slots import Identity

STATE_NAME = "state"
UNDO_NAME = "undo"  # a target's way back from a copy; made by itself
UNFILLED_NAME = "unfilled"  # a note: an intermediate's images are younger than its journal


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
    if node.role == "intermediate":
        kept = definition.volumes if definition.volumes_mode else ()
        return [(volume, Side.INTERMEDIATE) for volume in kept if volume.replicated]
    return [
        (volume, Side.PRIMARY if volume.primary == node.name else Side.SECONDARY)
        for volume in definition.volumes_at(node.name)
    ]


def open_images(definition: Definition, node: Node) -> dict[int, ImageFile]:
    """Those of a node, by volume id, as large as ``definition`` says: a growth that a crash cut short is finished.

    Raises MissingError, IdentityError, InUseError, DamagedError, StorageError.
    """
    images = {}
    for volume, side in images_of(definition, node):
        path, who = image_path(node, volume), image_identity(definition, volume, node, side)
        ImageFile.enlarge(path, who)
        images[volume.id] = ImageFile.open(path, who)
    return images


def state_files(definition: Definition, node: Node) -> list[Path]:
    """What a node keeps beside its images; a node with plain volumes only needs nothing."""
    if node.role == "intermediate":
        return [node.journal_path]
    if any(volume.replicated for volume in definition.volumes_at(node.name)):
        return [node.directory / STATE_NAME, node.journal_path]
    return []


def create(definition: Definition, node: Node, *, adopt: bool = False) -> list[str]:
    """Make everything of one node, or nothing. Returns the volumes whose images were adopted.

    Beside an intermediate's journal: the images of volumes mode, when its mode was changed.

    ``adopt``: P-VOL images that hold data are taken as they are; their group is suspended (PSUE) until `pair create`
    has copied them. Raises UsageError (it exists, or an image holds data), IdentityError, NoSpaceError, StorageError.
    """
    try:
        node.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {node.directory}: {error.strerror}") from error
    wanted = state_files(definition, node)
    if _lacks_images(definition, node, wanted):
        _add_images(definition, node)
        return []
    for path in wanted:
        if path.exists():
            raise UsageError(f"{path} exists already", hint="`blockrepl create` never overwrites; move it away first")
    adopted = _adopted(definition, node) if adopt else []
    made: list[Path] = []
    filled = definition.volumes_mode
    try:
        for volume in bitmapped(definition, node):
            path = bitmap_path(node, volume)
            BitmapFile.create(path, bitmap_identity(definition, node, volume), _bits(definition, volume, adopted))
            made.append(path)
        for volume, side in images_of(definition, node):
            path = image_path(node, volume)
            existed = path.exists()
            who = image_identity(definition, volume, node, side)
            if ImageFile.create(path, who, adopt=volume.name in adopted):
                made += [identity_path(path)] if existed else [path, identity_path(path)]
            else:
                filled = False  # it was there: of an older intermediate
        for path in wanted:
            suspended = bool(_replicated(definition, adopted))
            _create_state(definition, node, path, suspended=suspended, filled=filled)
            made.append(path)
        if wanted or not (node.directory / CONFIG_NAME).exists():
            made.append(ConfigFile.create(definition, node))
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return adopted


def _adopted(definition: Definition, node: Node) -> list[str]:
    """The P-VOLs of which a file with data, and without an identity, is there."""
    return [
        volume.name
        for volume, side in images_of(definition, node)
        if side is Side.PRIMARY
        and (path := image_path(node, volume)).is_file()
        and not identity_path(path).exists()
        and holds_data(path)
    ]


def _replicated(definition: Definition, names: list[str]) -> list[str]:
    return [name for name in names if definition.volume(name).replicated]


def _bits(definition: Definition, volume: Volume, adopted: list[str]) -> Bitmap | None:
    """Nobody else has anything of an adopted image."""
    if volume.name not in adopted:
        return None
    bitmap = Bitmap(volume.size_bytes, int(definition.group.bitmap_block))
    bitmap.fill()
    return bitmap


def _lacks_images(definition: Definition, node: Node, wanted: list[Path]) -> bool:
    """Whether an intermediate has everything but the images that its mode wants: the mode was changed."""
    if node.role != "intermediate" or not all(path.exists() for path in wanted):
        return False
    return any(not image_path(node, volume).exists() for volume, _ in images_of(definition, node))


def _add_images(definition: Definition, node: Node) -> None:
    """The note first: the intermediate must know that they are empty (see `own_images`)."""
    write_durably(node.directory / UNFILLED_NAME, b"made by create beside an older journal\n")
    for volume, side in images_of(definition, node):
        ImageFile.create(image_path(node, volume), image_identity(definition, volume, node, side))


def _create_state(definition: Definition, node: Node, path: Path, *, suspended: bool, filled: bool) -> None:
    group = definition.group
    if path.name == STATE_NAME:
        state = PrimaryState(suspended=int(Pair.PSUE), alone=group.fence == "never") if suspended else PrimaryState()
        SlotFile.create(path, state_identity(definition, node), encode_primary(state))
    elif node.role == "intermediate":
        blob = encode_intermediate(IntermediateState(volumes=definition.volumes_mode, filled=filled))
        JournalFile.create(path, journal_identity(definition, node), int(group.journal), blob)
    else:
        source = node.role == "primary"
        blob = encode_secondary(SecondaryState(active=source, writable=source))
        JournalFile.create(path, journal_identity(definition, node), int(group.secondary_journal), blob)
