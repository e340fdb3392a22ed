"""What a data node has while it is a source: a primary role, its host, its link to the intermediate, its exports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Volume
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message
from blockrepl.formats.record import decode_record
from blockrepl.formats.state import decode_primary, encode_primary
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import LAST_SAVE_S, NodeBase, max_write_bytes, policy_of
from blockrepl.node.bitmaps import NodeBitmaps
from blockrepl.node.exports import Exports
from blockrepl.node.links import Dialler
from blockrepl.node.primary_host import PrimaryHost, PrimaryVolume
from blockrepl.replication.primary import Phase, Primary
from blockrepl.storage.image import ImageFile
from blockrepl.storage.slot_file import SlotFile


class Source:
    """The primary half of a data node. ``volumes``: those it serves; ``images``: by volume id."""

    def __init__(
        self, owner: NodeBase, exports: Exports, volumes: list[Volume], images: Mapping[int, ImageFile],
        state_file: SlotFile, bitmaps: NodeBitmaps,
    ) -> None:  # fmt: skip
        self._owner = owner
        self._exports = exports
        self.volumes = volumes
        self._images = images
        self._state_file = state_file
        self._bitmaps = bitmaps
        state_file.on_failed = lambda error: self.host.fail(str(error))
        self.host = self._make_host()
        self._dialler: Dialler | None = None
        self._links: set[int] = set()

    def _make_host(self) -> PrimaryHost:
        owner, node = self._owner, self._owner.node
        definition = owner.definition
        state = decode_primary(self._state_file.payload)
        state.incarnation += 1
        clean, state.clean = state.clean, False
        self._state_file.save_now(encode_primary(state))
        role = Primary(
            group=definition.group_id.bytes,
            node=node.id,
            name=node.name,
            intermediate=definition.intermediate.id,
            streams={volume.id: definition.end(volume, 1 - node.site).id for volume in self.volumes},
            state=state,
            policy=policy_of(definition),
            bitmaps=self._bitmaps.bitmaps,
            clean=clean,
        )
        images = {volume.id: self._images[volume.id] for volume in self.volumes}
        save = partial(self._state_file.save, owner.disk)
        return PrimaryHost(
            role, images, save, self._bitmaps.save, owner.disk, owner.links, owner.clock, owner.workers, log_event
        )  # fmt: skip

    # life

    def start(self) -> None:
        """Dial the intermediate, and go on dialling it."""
        address = self._owner.definition.intermediate.address
        self._dialler = Dialler(self._owner.links, address.host, address.port, self._connected, "intermediate")

    async def close(self) -> None:
        """Hosts are gone; what they did not wait for stays in the queue, and is theirs to lose. Bits are stored."""
        if self._dialler is not None:
            await self._dialler.close()
        stored = asyncio.Event()
        self.host.perform(self.host.role.suspension.close(stored.set))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stored.wait(), LAST_SAVE_S)

    def tick(self) -> None:
        """Time passes."""
        self.host.tick()
        self._publish()
        if self.host.role.phase is Phase.FAILED and self._dialler is not None:
            dialler, self._dialler = self._dialler, None
            asyncio.get_running_loop().create_task(dialler.close())

    def _publish(self) -> None:
        """Export the P-VOLs once they may be read (rule 7)."""
        if not self.host.role.serving:
            return
        definition = self._owner.definition
        limit = max_write_bytes(definition)
        for volume in self.volumes:
            if volume.name not in self._exports.volumes:
                self._exports.volumes[volume.name] = PrimaryVolume(
                    self.host, volume.id, volume.name, self._images[volume.id], definition.block_size_bytes, limit
                )

    # links

    def _connected(self, link: int, nonce: bytes) -> None:
        self._links.add(link)
        self.host.perform(self.host.role.connected(link, nonce, self._owner.clock.now_s()))

    def owns(self, link: int) -> bool:
        """Whether a link was dialled from here."""
        return link in self._links

    def message(self, link: int, kind: int, fields: dict[str, Any]) -> None:
        """A control message of the intermediate. Raises ProtocolError."""
        self.host.perform(self.host.role.received(link, kind, fields, self._owner.clock.now_s()))

    def bulk(self, link: int, kind: int, chunk: Chunk, start: int, end: int) -> None:
        """A record that is replayed. Raises ProtocolError."""
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on a primary's link")
        view = chunk.view[start:end]
        self.host.record(link, decode_record(view), view)

    def lost(self, link: int) -> None:
        """A link of ours is gone: dial again."""
        self._links.discard(link)
        self.host.lost(link)
        if self._dialler is not None:
            self._dialler.lost(link)
