"""What a data node has while it is a source: a primary role, its host, its link to the intermediate, its exports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Volume
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Epoch, Message, Pair
from blockrepl.formats.record import decode_record
from blockrepl.formats.state import PrimaryState, SecondaryState, decode_primary, encode_primary
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import LAST_SAVE_S, NodeBase, max_write_bytes, policy_of
from blockrepl.node.bitmaps import NodeBitmaps
from blockrepl.node.exports import Exports
from blockrepl.node.links import Dialler
from blockrepl.node.primary_host import PrimaryHost, PrimaryVolume
from blockrepl.replication.primary import Phase, Primary
from blockrepl.storage.image import ImageFile
from blockrepl.storage.slot_file import SlotFile


def after_takeover(old: PrimaryState, taken: SecondaryState, site: int) -> PrimaryState:
    """SSWS: the S-VOLs are the truth, hosts go on alone, and no intermediate belongs to it until a reform.

    The bitmap stays as it is: empty, but for what hosts wrote here while the group was split.
    """
    return PrimaryState(
        epoch=taken.epoch, promised=max(taken.promised, taken.epoch), incarnation=old.incarnation, direction=site,
        suspended=int(Pair.SSWS), alone=True, detached=True,
    )  # fmt: skip


class Source:
    """The primary half of a data node. ``volumes``: those it serves; ``images``: by volume id."""

    def __init__(
        self, owner: NodeBase, exports: Exports, volumes: list[Volume], images: Mapping[int, ImageFile],
        state_file: SlotFile, bitmaps: NodeBitmaps, taken: SecondaryState, *, alone: bool = False,
    ) -> None:  # fmt: skip
        """``taken``: the state of the secondary role beside it, which is active. ``alone``: `serve --alone`.

        Raises StorageError.
        """
        self._owner = owner
        self._exports = exports
        self.volumes = volumes
        self._images = images
        self._state_file = state_file
        self._bitmaps = bitmaps
        self._writable = taken.writable
        self._alone = alone
        state_file.on_failed = lambda error: self.host.fail(str(error))
        self.host = self._make_host(taken)
        self._dialler: Dialler | None = None
        self._links: set[int] = set()

    def _make_host(self, taken: SecondaryState) -> PrimaryHost:
        owner, node = self._owner, self._owner.node
        definition = owner.definition
        state = decode_primary(self._state_file.payload)
        if taken.rolling and state.epoch.number < taken.epoch.number:
            state = after_takeover(state, taken, node.site)
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
            alone=self._alone,
        )
        images = {volume.id: self._images[volume.id] for volume in self.volumes}
        save = partial(self._state_file.save, owner.disk)
        return PrimaryHost(
            role, images, save, self._bitmaps.save, owner.disk, owner.links, owner.clock, owner.workers, log_event
        )  # fmt: skip

    # life

    def start(self) -> None:
        """Dial the intermediate, and go on dialling it; after a takeover only when the group was formed anew."""
        if self.host.role.state.detached or self._dialler is not None:
            return
        address = self._owner.definition.intermediate.address
        self._dialler = Dialler(self._owner.links, address.host, address.port, self._connected, "intermediate")

    async def close(self) -> None:
        """Hosts are gone; what they did not wait for stays in the queue, and is theirs to lose. Bits are stored."""
        if self._dialler is not None:
            await self._dialler.close()
        if self.host.retired:
            return
        stored = asyncio.Event()
        self.host.perform(self.host.role.suspension.close(stored.set))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stored.wait(), LAST_SAVE_S)

    def tick(self) -> None:
        """Time passes."""
        if self.host.retired:
            return
        self.host.tick()
        self.publish()
        if self.host.role.phase is Phase.FAILED and self._dialler is not None:
            dialler, self._dialler = self._dialler, None
            asyncio.get_running_loop().create_task(dialler.close())

    def publish(self) -> None:
        """Export the P-VOLs once they may be read (rule 7)."""
        if not self.host.role.serving or self.host.retired:
            return
        definition = self._owner.definition
        limit = max_write_bytes(definition)
        for volume in self.volumes:
            if volume.name not in self._exports.volumes:
                self._exports.volumes[volume.name] = PrimaryVolume(
                    self.host, volume.id, volume.name, self._images[volume.id], definition.block_size_bytes, limit,
                    writable=self._writable,
                )  # fmt: skip

    @property
    def trusted(self) -> bool:
        """Its bitmaps, with what it would add to them now, say all that the other site may lack (rule 8)."""
        role = self.host.role
        return role.state.trusted and (bool(role.state.suspended) or role.trusted)

    @property
    def recovered(self) -> bool:
        """Its P-VOLs hold what they should: nothing is to be read back from the intermediate's journal (rule 7)."""
        return self.host.role.serving

    # role changes

    def reform(self, epoch: Epoch, direction: int, done: Callable[[], None]) -> None:
        """The group is formed anew, and this is a source of it: hosts stay, then it dials the intermediate."""

        def reformed() -> None:
            self.start()
            done()

        self.host.on_reformed = reformed
        self.host.perform(self.host.role.suspension.reform(epoch, direction))
        self.host.settle()

    def retire(self, reason: str, done: Callable[[], None]) -> None:
        """Its volumes become S-VOLs: hosts are cut off; ``done`` when bits and images are durable."""
        if self.host.retired:
            asyncio.get_running_loop().call_soon(done)
            return
        self.host.retired = reason
        asyncio.get_running_loop().create_task(self._retire(reason, done))

    async def _retire(self, reason: str, done: Callable[[], None]) -> None:
        if self._dialler is not None:
            await self._dialler.close()
        for volume in self.volumes:
            await self._exports.withdraw(volume.name)
        marked = asyncio.Event()
        self.host.on_reformed = marked.set
        self.host.perform(self.host.role.suspension.retire(reason))
        self.host.settle()
        await marked.wait()
        # What was on its way to the images when the hosts were cut off is there by now, but not yet durable.
        synced = [asyncio.get_running_loop().create_future() for _ in self.volumes]
        for volume, future in zip(self.volumes, synced, strict=True):
            self._owner.disk.sync(self._images[volume.id].fd, future.set_result)
        failed = [error for error in await asyncio.gather(*synced) if error is not None]
        if failed:
            self.host.fail(f"sync failed: {failed[0]}")
        else:
            done()

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
