"""A secondary as a process; it also runs takeovers."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Definition, Node
from blockrepl.errors import ProtocolError, UsageError
from blockrepl.formats.link import Message
from blockrepl.formats.state import decode_secondary, encode_secondary
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import NodeBase, epoch_json, policy_of, save_last
from blockrepl.node.control import Handler, Progress
from blockrepl.node.create import JOURNAL_NAME, identity, image_identity, image_path, images_of
from blockrepl.node.exports import Exports
from blockrepl.node.journal_reading import JournalReading
from blockrepl.node.links import Listener
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.node.takeover_run import TakeoverRun
from blockrepl.replication.secondary import Phase, Secondary
from blockrepl.storage.image import ImageFile
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.plain import PlainVolume

PAIR_STATES = {Phase.ACTIVE: "SSWS", Phase.FOLLOWING: "PAIR"}


class SecondaryNode(NodeBase):
    """Keeps S-VOLs; after a takeover serves them."""

    def __init__(self, definition: Definition, node: Node) -> None:
        super().__init__(definition, node)
        self.links.router = self
        self.exports = Exports(definition, node, self.pool)
        self._volumes = definition.volumes_of_secondary(node.name)
        self._images = {
            volume.id: ImageFile.open(image_path(node, volume), image_identity(definition, volume, node, side))
            for volume, side in images_of(definition, node)
        }
        self.host = self._recover()
        self.host.on_active = self._publish
        self._listener = Listener(self.links)
        self._takeover: TakeoverRun | None = None

    def _recover(self) -> SecondaryHost:
        definition, node = self.definition, self.node
        reading = JournalReading()
        journal = JournalFile.open(
            node.directory / JOURNAL_NAME, identity(definition, node), reading.check, self.disk,
            int(definition.group.secondary_journal),
        )  # fmt: skip
        role = Secondary(
            group=definition.group_id.bytes,
            node=node.id,
            name=node.name,
            intermediate=definition.intermediate.id,
            peers=[each.id for each in definition.secondaries],
            state=decode_secondary(journal.recovered.state),
            policy=policy_of(definition),
        )
        held = reading.tell_secondary(role, journal.journal)
        text = f"journal recovered: {len(reading.heads)} records, holds {role.held}, {len(held)} to apply"
        log_event(text, {})
        images = dict(self._images)
        return SecondaryHost(
            role, journal, held, images, self.disk, self.links, self.clock, self.workers, log_event
        )  # fmt: skip

    # life

    async def open(self) -> None:
        address = self.node.address
        try:
            self._listener.listen(address.host, address.port)
        except OSError as error:
            raise UsageError(f"cannot listen on {address}: {error.strerror}", hint="is the port taken?") from error
        self.host.start()
        await self.exports.listen()

    async def close(self) -> None:
        self._listener.close()
        await self.exports.close()
        self.links.close_all()
        await save_last(self.host.journal, encode_secondary(self.host.role.durable_state()))
        for image in self._images.values():
            await asyncio.to_thread(image.fdatasync)

    def tick(self) -> None:
        self.host.tick()
        if self._takeover is not None:
            self._takeover.tick()

    def _publish(self) -> None:
        """Taken over: hosts may use the S-VOLs."""
        writable = self.host.role.state.writable
        for volume in self._volumes:
            self.exports.volumes[volume.name] = PlainVolume(
                volume.name, self._images[volume.id], self.disk, writable=writable
            )

    # links

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """See `links.Router`."""
        self.host.perform(self.host.role.accepted(link, fields, self.clock.now_s()))

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """See `links.Router`."""
        if self._takeover is not None and self._takeover.owns(link):
            self._takeover.message(link, kind, fields)
            return
        self.host.perform(self.host.role.received_message(link, kind, fields, epoch, self.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """See `links.Router`."""
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on hop 2")
        self.host.record(link, epoch, chunk, start, end)

    def lost(self, link: int) -> None:
        """See `links.Router`."""
        if self._takeover is not None and self._takeover.owns(link):
            self._takeover.lost(link)
        else:
            self.host.lost(link)

    def settle(self) -> None:
        """See `links.Router`."""
        self.host.settle()

    # control

    def handlers(self) -> dict[str, Handler]:
        return {**self.exports.handlers(), "takeover": self._take_over}

    async def _take_over(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self._takeover is not None:
            raise UsageError("a takeover is under way here", hint="wait for it")
        self._takeover = TakeoverRun(self.definition, self.node, self.links, self.clock, progress)
        try:
            return await self._takeover.run(
                dry_run=bool(args.get("dry_run")),
                force=bool(args.get("force")),
                writable=not args.get("read_only"),
                new_id=lambda: os.urandom(16),
            )
        finally:
            self._takeover = None

    def status(self) -> dict[str, Any]:
        role, journal = self.host.role, self.host.journal.journal
        pair = PAIR_STATES.get(role.phase, "PSUE")
        if pair == "PAIR" and not role.link:
            pair = "PSUE"
        return {
            "state": role.phase.value,
            "reason": role.reason,
            "ready": role.phase is not Phase.FAILED,
            "epoch": epoch_json(role.state.epoch),
            "promised": epoch_json(role.state.promised),
            "watermarks": {
                "numbered": role.numbered_seen, "durable": max(role.state.held, role.state.prepared), "sent": None,
                "prepared": role.state.prepared, "validated": role.validated, "applied": role.applied,
                "checkpoint": role.state.applied,
            },
            "volumes": [
                {
                    "name": volume.name, "id": volume.id, "size_bytes": volume.size_bytes, "role": "S-VOL",
                    "state": pair, **self.exports.entry(volume.name),
                }
                for volume in self._volumes
            ],
            "peers": [{"node": self.definition.intermediate.name, "connected": bool(role.link)}],
            "journal": {"size_bytes": journal.ring_bytes, "used_bytes": journal.used_bytes},
            "sessions": self.exports.sessions(),
        }  # fmt: skip
