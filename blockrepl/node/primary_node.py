"""A primary as a process."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Definition, Node
from blockrepl.errors import ProtocolError, TimeoutExpiredError, UsageError
from blockrepl.formats.link import Message
from blockrepl.formats.record import decode_record
from blockrepl.formats.state import decode_primary, encode_primary
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import NodeBase, epoch_json, max_write_bytes, policy_of, volume_argument
from blockrepl.node.control import Handler, Progress
from blockrepl.node.create import STATE_NAME, identity, image_identity, image_path, images_of
from blockrepl.node.digests import VERIFY_BLOCK_BYTES, VERIFY_RANGE_BYTES
from blockrepl.node.exports import Exports
from blockrepl.node.links import Dialler
from blockrepl.node.primary_host import PrimaryHost, PrimaryVolume
from blockrepl.replication.primary import Phase, Primary
from blockrepl.storage.image import ImageFile
from blockrepl.storage.plain import PlainVolume
from blockrepl.storage.slot_file import SlotFile

VERIFY_SILENCE_S = 30.0
VERIFY_WINDOW = 4  # ranges on their way at once


class PrimaryNode(NodeBase):
    """Serves P-VOLs, and plain volumes (SMPL) that have no secondary."""

    def __init__(self, definition: Definition, node: Node) -> None:
        super().__init__(definition, node)
        self.links.router = self
        self.exports = Exports(definition, node, self.pool)
        self._state_file = SlotFile.open(node.directory / STATE_NAME, identity(definition, node))
        self._state_file.on_failed = lambda error: self.host.fail(str(error))
        self._images = {
            volume.id: ImageFile.open(image_path(node, volume), image_identity(definition, volume, node, side))
            for volume, side in images_of(definition, node)
        }
        self._volumes = definition.volumes_of_primary(node.name)
        self._replicated = [volume for volume in self._volumes if volume.replicated]
        self.host = self._make_host()
        self._dialler: Dialler | None = None
        self._verifies: dict[tuple[int, int], asyncio.Future[dict[str, Any]]] = {}
        self.host.on_digested = self._digested

    def _make_host(self) -> PrimaryHost:
        definition, node = self.definition, self.node
        state = decode_primary(self._state_file.payload)
        state.incarnation += 1
        self._state_file.save_now(encode_primary(state))
        role = Primary(
            group=definition.group_id.bytes,
            node=node.id,
            name=node.name,
            intermediate=definition.intermediate.id if definition.replicated else 0,
            streams={v.id: definition.node(v.secondary).id for v in self._replicated},
            state=state,
            policy=policy_of(definition),
        )
        images = {volume.id: self._images[volume.id] for volume in self._replicated}
        save = partial(self._state_file.save, self.disk)
        return PrimaryHost(role, images, save, self.disk, self.links, self.clock, self.workers, log_event)

    # life

    async def open(self) -> None:
        for volume in self._volumes:
            if not volume.replicated:
                self.exports.volumes[volume.name] = PlainVolume(volume.name, self._images[volume.id], self.disk)
        if self._replicated:
            address = self.definition.intermediate.address
            self._dialler = Dialler(self.links, address.host, address.port, self._connected, "intermediate")
        await self.exports.listen()

    async def close(self) -> None:
        await self.exports.close()
        # Hosts are gone; what they did not wait for stays in the queue, and is theirs to lose.
        if self._dialler is not None:
            await self._dialler.close()
        for image in self._images.values():
            await asyncio.to_thread(image.fdatasync)

    def tick(self) -> None:
        if self._replicated:
            self.host.tick()
            self._publish()
        if self.host.role.phase is Phase.FAILED and self._dialler is not None:
            dialler, self._dialler = self._dialler, None
            self.loop.create_task(dialler.close())

    def _publish(self) -> None:
        """Export the P-VOLs once they may be read (rule 7)."""
        if not self.host.role.serving:
            return
        limit = max_write_bytes(self.definition)
        for volume in self._replicated:
            if volume.name not in self.exports.volumes:
                self.exports.volumes[volume.name] = PrimaryVolume(
                    self.host, volume.id, volume.name, self._images[volume.id],
                    self.definition.block_size_bytes, limit,
                )  # fmt: skip

    # links

    def _connected(self, link: int, nonce: bytes) -> None:
        self.host.perform(self.host.role.connected(link, nonce, self.clock.now_s()))

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """A primary does not listen."""
        raise ProtocolError("a primary takes no links")

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """See `links.Router`."""
        self.host.perform(self.host.role.received(link, kind, fields, self.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """See `links.Router`."""
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on a primary's link")
        view = chunk.view[start:end]
        self.host.record(link, decode_record(view), view)

    def lost(self, link: int) -> None:
        """See `links.Router`."""
        self.host.lost(link)
        if self._dialler is not None:
            self._dialler.lost(link)

    def settle(self) -> None:
        """See `links.Router`."""
        self.host.settle()

    # control

    def handlers(self) -> dict[str, Handler]:
        return {**self.exports.handlers(), "verify": self._verify}

    async def _verify(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Compare a volume with its S-VOL, each block at one number."""
        name = volume_argument(args, [volume.name for volume in self._replicated])
        volume = self.definition.volume(name)
        if self.host.role.phase is not Phase.LIVE:
            raise UsageError(f"{name} is not in PAIR: {self.host.role.why_held()}", hint="see: blockrepl status")
        blocks = 0
        different: list[int] = []
        done_bytes = 0
        starts = iter(range(0, volume.size_bytes, VERIFY_RANGE_BYTES))
        waiting: set[asyncio.Future[dict[str, Any]]] = set()
        while True:
            for start in starts:
                waiting.add(self._ask_digest(volume.id, start, min(VERIFY_RANGE_BYTES, volume.size_bytes - start)))
                if len(waiting) >= VERIFY_WINDOW:
                    break
            if not waiting:
                break
            done, waiting = await asyncio.wait(
                waiting, timeout=VERIFY_SILENCE_S, return_when=asyncio.FIRST_COMPLETED
            )  # fmt: skip
            if not done:
                raise TimeoutExpiredError(f"{name}: no answer from the secondary for {VERIFY_SILENCE_S} s")
            for future in done:
                fields = future.result()
                if fields.get("aborted") or not fields["blocks"]:
                    raise UsageError("the link to the intermediate broke", hint="see `status`, then verify again")
                blocks += fields["blocks"]
                different += fields["different"]
                done_bytes += fields["length_bytes"]
            progress({"done_bytes": done_bytes, "total_bytes": volume.size_bytes})
        ranges = [
            {"offset_bytes": at, "length_bytes": min(VERIFY_BLOCK_BYTES, volume.size_bytes - at)}
            for at in sorted(different)
        ]
        return {
            "volume": name, "same": not different, "compared_bytes": done_bytes, "compared_blocks": blocks,
            "differing": ranges,
        }  # fmt: skip

    def _ask_digest(self, volume_id: int, start: int, length: int) -> asyncio.Future[dict[str, Any]]:
        future: asyncio.Future[dict[str, Any]] = self.loop.create_future()
        self._verifies[volume_id, start] = future
        self.host.perform(self.host.role.digest(volume_id, start, length))
        self.host.settle()
        return future

    def _digested(self, fields: dict[str, Any]) -> None:
        future = self._verifies.pop((fields["volume"], fields["offset_bytes"]), None)
        if future is not None and not future.done():
            future.set_result(fields)

    def status(self) -> dict[str, Any]:
        role = self.host.role
        live = role.phase is Phase.LIVE
        pair = "PAIR" if live else "PSUE"
        return {
            "state": role.phase.value if self._replicated else "serving",
            "reason": role.why_held() if self._replicated else "",
            # A role that is live exports at the next tick: until then hosts would be turned away.
            "ready": (live or not self._replicated) and len(self.exports.volumes) == len(self._volumes),
            "epoch": epoch_json(role.state.epoch),
            "promised": epoch_json(role.state.promised),
            "incarnation": role.state.incarnation,
            "watermarks": {
                "numbered": role.acked, "durable": role.acked, "sent": None, "prepared": None,
                "validated": role.validated, "applied": None, "checkpoint": role.state.checkpoint,
            },
            "pending": {"batches": len(role.queue), "bytes": role.queue.size_bytes},
            "volumes": [
                {
                    "name": volume.name, "id": volume.id, "size_bytes": volume.size_bytes, "role": "P-VOL",
                    "state": pair if volume.replicated else "SMPL", **self.exports.entry(volume.name),
                }
                for volume in self._volumes
            ],
            "peers": [{"node": self.definition.intermediate.name, "connected": bool(role.link)}]
            if self._replicated
            else [],
            "journal": None,
            "sessions": self.exports.sessions(),
        }  # fmt: skip
