"""The images of an intermediate in volumes mode: their files, whether they are whole, and who may look at them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from blockrepl.chunks import ChunkPool
from blockrepl.definition import Definition, Node
from blockrepl.errors import UsageError
from blockrepl.formats.link import Pair
from blockrepl.formats.state import IntermediateState
from blockrepl.node.create import UNFILLED_NAME, images_of, open_images
from blockrepl.storage.executor import DiskThread
from blockrepl.storage.plain import PlainVolume

if TYPE_CHECKING:
    from blockrepl.node.exports import Exports


def settle_mode(state: IntermediateState, *, kept: bool, younger: bool) -> None:
    """``kept``: the node starts in volumes mode. ``younger``: images were made later than the journal.

    Those, and images that were left alone in journal mode, are not whole. Raises UsageError.
    """
    if state.pair == Pair.COPY and state.volumes != kept:
        mode = "volumes" if state.volumes else "journal"
        raise UsageError(
            f"the mode was changed in mid-resync, which was begun in mode {mode}",
            hint=f'write mode = "{mode}" again, wait for PAIR or split the pair; then change it',
        )
    if not kept or younger:
        state.filled = state.filling = False
    state.volumes = kept


class OwnImages:
    """By volume id; none in journal mode."""

    def __init__(self, definition: Definition, held: Definition, node: Node, disk: DiskThread, pool: ChunkPool) -> None:
        """Open them; their files are made for ``held``.

        Raises MissingError, IdentityError, DamagedError, InUseError, StorageError.
        """
        self.kept = definition.volumes_mode
        self._exports: Exports | None = None
        if self.kept:  # without them it starts without the front ends' modules
            from blockrepl.node.exports import Exports

            self._exports = Exports(definition, node, pool)
        self._disk = disk
        self._note = node.directory / UNFILLED_NAME
        self._volumes = {volume.id: volume for volume, _ in images_of(definition, node)}
        self._node = node
        self.images = open_images(held, node)
        self._show_sizes()

    def _show_sizes(self) -> None:
        for number, volume in self._volumes.items():
            self.images[number].size_bytes = volume.size_bytes

    def enlarge(self, held: Definition) -> None:
        """Make them as large as the volumes of ``held``. Raises StorageError."""
        for volume, _ in images_of(held, self._node):
            self.images[volume.id].grow(volume.size_bytes)

    def reconfigure(self, definition: Definition) -> None:
        """Who looks at them sees what ``definition`` says."""
        self._volumes = {volume.id: volume for volume, _ in images_of(definition, self._node)}
        self._show_sizes()
        if self._exports is not None:
            self._exports.reconfigure(definition)

    def settle_mode(self, state: IntermediateState) -> None:
        """What the mode of this start means for ``state``, which is stored before anything is numbered.

        Raises UsageError.
        """
        settle_mode(state, kept=self.kept, younger=self._note.exists())

    def mode_is_stored(self) -> None:
        """The state is durable."""
        if self.kept:
            with contextlib.suppress(FileNotFoundError):
                self._note.unlink()

    # hosts

    async def listen(self) -> None:
        """Raises UsageError."""
        if self._exports is not None:
            await self._exports.listen()

    def is_published(self, *, filled: bool) -> bool:
        """Whether `publish` has nothing to do."""
        return self._exports is None or filled == bool(self._exports.volumes)

    async def publish(self, *, filled: bool) -> None:
        """Let hosts look at them, while they are whole; read-only."""
        assert self._exports is not None
        for volume in self._volumes.values():
            if filled:
                image = self.images[volume.id]
                self._exports.volumes[volume.name] = PlainVolume(volume.name, image, self._disk, writable=False)
            else:
                await self._exports.withdraw(volume.name)

    def rows(self, state: IntermediateState) -> list[dict[str, Any]]:
        """For status. The state is that of the pair with the P-VOL: SMPL when it is not whole, COPY while filled."""
        exports = self._exports
        if exports is None:
            return []
        pair = Pair.PAIR if state.numbering else Pair.PSUE
        if not state.filled:
            pair = Pair.COPY if state.filling else Pair.SMPL
        return [
            {
                "name": volume.name, "id": volume.id, "size_bytes": volume.size_bytes, "role": "I-VOL",
                "state": pair.name, **exports.entry(volume.name),
            }
            for volume in self._volumes.values()
        ]  # fmt: skip

    def sessions(self) -> list[dict[str, Any]]:
        """Hosts that look at them."""
        return self._exports.sessions() if self._exports is not None else []

    async def close(self) -> None:
        """End the sessions of hosts."""
        if self._exports is not None:
            await self._exports.close()
