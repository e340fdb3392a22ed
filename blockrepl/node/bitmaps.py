"""The bitmaps of a node: their files, made, opened, and saved as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from blockrepl.bitmap import Bitmap
from blockrepl.definition import Definition, Node, Volume
from blockrepl.errors import StorageError
from blockrepl.storage.bitmap_file import BitmapFile, BitmapIdentity
from blockrepl.storage.executor import DiskThread


def bitmap_path(node: Node, volume: Volume) -> Path:
    """Of an intermediate: blocks of hop 2. Of a data node: blocks that its hosts wrote and the other site lacks."""
    prefix = "hop2-" if node.role == "intermediate" else ""
    return node.directory / f"{prefix}{volume.name}.bitmap"


def bitmap_identity(definition: Definition, node: Node, volume: Volume) -> BitmapIdentity:
    """Of one of them."""
    return BitmapIdentity(
        definition.group_id.bytes, volume.id, node.id, volume.size_bytes, int(definition.group.bitmap_block)
    )


def bitmapped(definition: Definition, node: Node) -> tuple[Volume, ...]:
    """The volumes that a node keeps bitmaps of."""
    replicated = tuple(volume for volume in definition.volumes if volume.replicated)
    if node.role == "intermediate":
        return replicated
    return tuple(volume for volume in replicated if node.name in (volume.primary, volume.secondary))


class NodeBitmaps:
    """All bitmaps of a node, by volume id. `save` is the hosts' port."""

    def __init__(self, files: Mapping[int, BitmapFile], disk: DiskThread) -> None:
        self._files = files
        self._disk = disk
        self.bitmaps: dict[int, Bitmap] = {volume: file.bitmap for volume, file in files.items()}

    @classmethod
    def open(cls, definition: Definition, node: Node, disk: DiskThread) -> NodeBitmaps:
        """Raises MissingError, IdentityError, InUseError, DamagedError, StorageError."""
        volumes: Iterable[Volume] = bitmapped(definition, node)
        files = {
            volume.id: BitmapFile.open(bitmap_path(node, volume), bitmap_identity(definition, node, volume))
            for volume in volumes
        }
        return cls(files, disk)

    @staticmethod
    def enlarge(definition: Definition, node: Node) -> None:
        """Before `open`: finish what a crash cut short. Raises StorageError and its kin."""
        for volume in bitmapped(definition, node):
            if bitmap_path(node, volume).exists():
                BitmapFile.enlarge(bitmap_path(node, volume), bitmap_identity(definition, node, volume))

    def grow(self, definition: Definition, node: Node) -> None:
        """As large as the volumes of ``definition``. Raises StorageError."""
        for volume in bitmapped(definition, node):
            self._files[volume.id].grow(bitmap_identity(definition, node, volume))

    def on_failed(self, call: Callable[[StorageError], None]) -> None:
        """Call when one of the files fails."""
        for file in self._files.values():
            file.on_failed = call

    def save(self, done: Callable[[], None]) -> None:
        """Make all of them durable as they are now, then ``done()`` on the loop. Raises StorageError."""
        files = list(self._files.values())
        left = len(files)
        if not files:
            done()
            return

        def saved() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for file in files:
            file.save(self._disk, saved)
