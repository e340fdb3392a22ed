"""The intermediate as a process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Definition, Node
from blockrepl.errors import ProtocolError, StorageError, UsageError
from blockrepl.formats.link import Message
from blockrepl.formats.state import IntermediateState, decode_intermediate, encode_intermediate
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import (
    CONFIG_POLL_S,
    CONFIG_WAIT_S,
    NodeBase,
    epoch_json,
    history_json,
    journal_report,
    policy_of,
    save_last,
)
from blockrepl.node.bitmap_report import bitmap_report
from blockrepl.node.bitmaps import NodeBitmaps
from blockrepl.node.control import Handler, Progress
from blockrepl.node.create import journal_identity
from blockrepl.node.intermediate_host import IntermediateHost
from blockrepl.node.intermediate_volumes import IntermediateVolumes
from blockrepl.node.journal_mover import move_journal
from blockrepl.node.journal_reading import JournalReading
from blockrepl.node.lag import LagMeter
from blockrepl.node.links import Dialler, Listener
from blockrepl.node.own_images import OwnImages
from blockrepl.node.ports import Image
from blockrepl.replication.actions import Action
from blockrepl.replication.intermediate import Intermediate
from blockrepl.replication.opening import Phase
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.spill import SpillDirectory

REFORM_GRACE_S = 2.0  # for the opener to hang up


class IntermediateNode(NodeBase):
    """Numbers, journals, sends on."""

    def __init__(self, definition: Definition, node: Node, *, alone: bool) -> None:
        super().__init__(definition, node)
        self.links.router = self
        held = self.held
        NodeBitmaps.enlarge(held, node)
        self._bitmaps = NodeBitmaps.open(held, node, self.disk)
        self._own = OwnImages(self.definition, held, node, self.disk, self.pool)
        self._published: asyncio.Task[None] | None = None
        self._round_timer: asyncio.TimerHandle | None = None
        self._listener = Listener(self.links)
        self._diallers: list[Dialler] = []
        self._adopt(self._recover(alone))
        self._bitmaps.on_failed(lambda error: self.host.fail(str(error)))
        self._reforms_at_s: float | None = None
        self._rebuilding: asyncio.Task[None] | None = None

    def _recover(self, alone: bool) -> IntermediateHost:
        definition, node = self.definition, self.node
        reading = JournalReading()
        journal = JournalFile.open(
            self.config.journal, journal_identity(definition, node), reading.check, self.disk,
        )  # fmt: skip
        state = decode_intermediate(journal.recovered.state)
        self._spills = SpillDirectory(node.directory)
        for sender, through in state.spilled:
            self._spills.load(sender, through)
        state.incarnation += 1
        self._own.settle_mode(state)
        role = self._role(state, alone=alone)
        reading.tell_intermediate(role)
        self._settle_config(role)
        log_event(f"journal recovered: {len(reading.heads)} records, up to {role.numbered}", {})
        host = self._host(role, journal)
        if host.volumes is not None:
            try:
                host.volumes.recover()
            except OSError as error:
                raise StorageError(f"cannot store what the journal holds in an intermediate volume: {error}") from error
        return host

    def _role(self, state: IntermediateState, *, alone: bool = False) -> Intermediate:
        definition, direction = self.definition, state.direction
        return Intermediate(
            group=definition.group_id.bytes,
            node=self.node.id,
            name=self.node.name,
            primaries=[each.id for each in definition.sources(direction)],
            secondaries=[each.id for each in definition.targets(direction)],
            state=state,
            policy=policy_of(definition),
            new_id=lambda: os.urandom(16),
            alone=alone,
            bitmaps=self._bitmaps.bitmaps,
            owners=definition.owners(direction),
            homes=definition.homes(direction),
            names={each.id: each.name for each in definition.nodes},
            local_source=definition.volumes_mode,
        )

    def _host(self, role: Intermediate, journal: JournalFile) -> IntermediateHost:
        volumes = None
        if self._own.kept:
            images: Mapping[int, Image] = self._own.images
            volumes = IntermediateVolumes(role, journal, images, self.disk, self.clock, self.workers)
        return IntermediateHost(
            role, journal, self._bitmaps.save, self.links, self.clock, self.workers, log_event, volumes,
            spills=self._spills,
        )  # fmt: skip

    def _adopt(self, host: IntermediateHost) -> None:
        """This host is the node's from now on."""
        self.host = host
        host.on_config = self._take
        host.on_round_due = self._arm
        host.on_reformed = self._reformed
        self._lags = {node: LagMeter() for node in host.role.streams.by_node}

    def _reformed(self) -> None:
        """The group was formed anew: when the opener has hung up, or soon, other peers are dialled and let in."""
        self._reforms_at_s = self.clock.now_s() + REFORM_GRACE_S

    async def _rebuild(self) -> None:
        """Role and host anew, from the state that was stored; every link is made again."""
        old = self.host
        diallers, self._diallers = self._diallers, []
        for dialler in diallers:
            await dialler.close()
        self.links.close_all()
        role = self._role(decode_intermediate(encode_intermediate(old.role.durable_state())))
        role.start()
        self._settle_config(role)
        self._adopt(self._host(role, old.journal))
        self._dial()

    # configuration

    def _settle_config(self, role: Intermediate) -> None:
        """At a start: the journal's state says what is in effect; the file may not have heard of it."""
        role.configuring.adopt(self.config.effective.digest)
        if role.state.configured:
            self.take(role.state.config, role.state.config_number)

    def _take(self, digest: int, number: int) -> None:
        try:
            self.take(digest, number)
        except StorageError as error:
            self.host.fail(str(error))

    def enlarge(self) -> None:
        held = self.held
        self._bitmaps.grow(held, self.node)
        self._own.enlarge(held)

    def prepared(self) -> None:
        pass  # its own role asks nobody

    def took(self) -> None:
        self._own.reconfigure(self.definition)

    def journal_report(self) -> dict[str, Any] | None:
        return journal_report(self.host.journal)

    async def move_journal(self, path: Path, ring_bytes: int) -> None:
        host = self.host
        await move_journal(
            host.journal, journal_identity(self.definition, self.node), path, ring_bytes, self.config,
            lambda: encode_intermediate(self.host.role.durable_state()),
        )  # fmt: skip
        self.host.moved()

    async def _configure(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Everybody has files for it: let it take effect. The answer comes when it has, or cannot now."""
        digest = int(args.get("digest") or 0)
        if args.get("dry_run"):
            self.host.role.configuring.check()
            return {"number": self.config.number}
        if digest != self.config.held.digest:
            raise UsageError(f"{self.node.name} is not prepared for it", hint="blockrepl adjust")
        deadline_s = self.clock.now_s() + CONFIG_WAIT_S
        while self.config.effective.digest != digest or self.config.prepared is not None:
            configuring, pairing = self.host.role.configuring, self.host.role.pairing
            ready = not configuring.unprepared(digest) and not pairing.missing()  # who was cut off comes back
            if ready or self.clock.now_s() > deadline_s:
                self.host.perform(configuring.configure(digest))
                self.host.settle()
            if self.clock.now_s() > deadline_s:
                raise UsageError(
                    f"the configuration is {configuring.step.value}", hint="see blockrepl status, then adjust again"
                )
            await asyncio.sleep(CONFIG_POLL_S)
        return {"number": self.config.number}

    # life

    async def open(self) -> None:
        durable = self.loop.create_future()
        state = encode_intermediate(self.host.role.durable_state())
        self.host.journal.save(state, done=lambda: durable.set_result(None))  # our incarnation
        await durable
        self._own.mode_is_stored()
        address = self.node.address
        try:
            self._listener.listen(address.host, address.port)
        except OSError as error:
            raise UsageError(f"cannot listen on {address}: {error.strerror}", hint="is the port taken?") from error
        self._dial()
        await self._own.listen()

    def _dial(self) -> None:
        for peer in self.definition.targets(self.host.role.state.direction):
            connected = partial(self._connected, peer.id)
            self._diallers.append(Dialler(self.links, peer.address.host, peer.address.port, connected, peer.name))

    async def close(self) -> None:
        self._listener.close()
        if self._published is not None:
            await self._published
        await self._own.close()
        if self._round_timer is not None:
            self._round_timer.cancel()
        await asyncio.gather(*(dialler.close() for dialler in self._diallers))
        self.links.close_all()
        await save_last(self.host.journal, encode_intermediate(self.host.role.durable_state()))

    def tick(self) -> None:
        now_s = self.clock.now_s()
        if self._rebuilding is not None:
            if not self._rebuilding.done():
                return
            self._rebuilding.result()  # what went wrong is said
            self._rebuilding = None
        if self._reforms_at_s is not None:
            if self.host.role.opener_link and now_s < self._reforms_at_s:
                return
            self._reforms_at_s = None
            self._rebuilding = self.loop.create_task(self._rebuild())
            return
        self.host.tick()
        self._publish()
        for stream in self.host.role.streams.by_node.values():
            if stream.node in self._lags:  # not yet, while the group is being formed anew
                self._lags[stream.node].sample(stream.last, stream.total_writes, stream.total_bytes, now_s)

    def _publish(self) -> None:
        """Hosts may look at the intermediate volumes while they are whole."""
        filled = self.host.role.state.filled and self.host.role.phase is not Phase.FAILED
        idle = self._published is None or self._published.done()
        if idle and not self._own.is_published(filled=filled):
            self._published = self.loop.create_task(self._own.publish(filled=filled))

    def _arm(self, due_s: float) -> None:
        """A prepare round is due at ``due_s``: wake up for it."""
        if self._round_timer is None:
            delay_s = max(0.0, due_s - self.clock.now_s())
            self._round_timer = self.loop.call_later(delay_s, self._round)

    def _round(self) -> None:
        self._round_timer = None
        self.host.round()

    # links

    def _connected(self, node: int, link: int, nonce: bytes) -> None:
        self.host.perform(self.host.role.connected(link, node, nonce, self.clock.now_s()))

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """See `links.Router`."""
        self.host.perform(self.host.role.accepted(link, fields, self.clock.now_s()))

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """See `links.Router`."""
        self.host.perform(self.host.role.received(link, kind, fields, self.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """See `links.Router`."""
        if kind != Message.BATCH:
            raise ProtocolError("RECORD does not belong on a link to the intermediate")
        self.host.batch(link, chunk, start, end)

    def lost(self, link: int) -> None:
        """See `links.Router`."""
        self.host.lost(link)
        for dialler in self._diallers:
            dialler.lost(link)

    def settle(self) -> None:
        """See `links.Router`."""
        self.host.settle()

    # control

    def handlers(self) -> dict[str, Handler]:
        return {
            "pair_split": self._split, "pair_resync": self._resync, "pair_create": self._create,
            "pair_delete": self._delete, "exclude": self._exclude, "include": self._include, "bitmap": self._bitmap,
            "marker_put": self._put_marker, "marker": self._marker, "configure": self._configure,
        }  # fmt: skip

    async def _split(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        role = self.host.role
        return self._act(role.pairing.split(writable=bool(args.get("writable")), now_s=self.clock.now_s()))

    async def _resync(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        pairing, rate = self.host.role.pairing, int(args.get("rate_bytes") or 0)
        return self._act(
            pairing.resync(verify=bool(args.get("verify")), rate_bytes=rate, now_s=self.clock.now_s())
        )  # fmt: skip

    async def _create(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        pairing, rate = self.host.role.pairing, int(args.get("rate_bytes") or 0)
        forget = bool(args.get("no_copy"))
        return self._act(
            pairing.resync(initial=True, rate_bytes=rate, forget=forget, now_s=self.clock.now_s())
        )  # fmt: skip

    async def _delete(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return self._act(self.host.role.pairing.delete(self.clock.now_s()))

    async def _exclude(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return self._act(self.host.role.exclude(self.definition.node(str(args.get("node"))).id))

    async def _include(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        return self._act(self.host.role.include(self.definition.node(str(args.get("node"))).id))

    async def _bitmap(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        names = {volume.id: volume.name for volume in self.definition.volumes}
        volumes = bitmap_report(self._bitmaps.bitmaps, names)
        return {"node": self.node.name, "volumes": volumes, "trusted": True, "open_writes": []}

    async def _put_marker(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        name = str(args.get("name") or "")
        self._act(self.host.role.put_marker(name))
        return {"name": name, "number": self.host.role.markers[name]}

    async def _marker(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """Where a marker stands: durable at the intermediate, held by all secondaries, applied by all."""
        name, role = str(args.get("name") or ""), self.host.role
        number = role.markers.get(name)
        if number is None:
            raise UsageError(f'no marker "{name}" is known here', hint="blockrepl marker put")
        return {
            "name": name, "number": number, "durable": role.durable_number >= number,
            "validated": role.streams.validated >= number,
            "applied": all(stream.applied >= number for stream in role.streams.by_node.values()),
        }  # fmt: skip

    def _act(self, actions: list[Action]) -> dict[str, Any]:
        """Perform what an operator asked for; the answer says the state, what comes of it `status` says."""
        self.host.perform(actions)
        self.host.settle()
        pairing = self.host.role.pairing
        return {"pair": pairing.shown.name, "step": pairing.step.value, "number": self.host.role.numbered}

    def status(self) -> dict[str, Any]:
        role, journal = self.host.role, self.host.journal.journal
        return {
            "state": role.phase.value,
            "reason": role.opening.reason,
            "ready": role.phase is Phase.SERVING,
            "epoch": epoch_json(role.state.epoch),
            "promised": epoch_json(role.state.promised),
            "incarnation": role.state.incarnation,
            "watermarks": {
                "numbered": role.numbered, "durable": role.durable_number, "sent": role.streams.sent,
                "prepared": role.streams.valid_counter, "validated": role.streams.validated,
                "applied": min((s.applied for s in role.streams.by_node.values()), default=0),
                "checkpoint": role.senders.releasable,
            },
            "pair": role.pairing.shown.name,
            "pair_reason": role.pairing.shown_reason,
            "direction": role.state.direction,
            "suspended_at": role.pairing.suspended_at if role.state.limited else None,
            "resync": self._resync_row(),
            "out_of_sync_bytes": {"hop2": role.pairing.out_of_sync_bytes()},
            "excluded": [each.name for each in self.definition.nodes if each.id in role.state.excluded],
            "valid_counter": role.streams.valid_counter,
            "volumes": self._own.rows(role.state),
            "sessions": self._own.sessions(),
            "peers": self._peers(),
            "history": history_json(role.state.history),
            "journal": {"size_bytes": journal.ring_bytes, "used_bytes": journal.used_bytes},
        }  # fmt: skip

    def _resync_row(self) -> dict[str, Any] | None:
        """With what is copied from the intermediate volumes; what primaries copy, they say themselves."""
        state, pairing, volumes = self.host.role.state, self.host.role.pairing, self.host.volumes
        if not state.start:
            return None
        own = volumes if pairing.copies_here else None
        return {
            "id": state.start, "verify": state.verify, "step": pairing.step.value,
            "copied_bytes": own.copied_bytes if own is not None else 0,
            "total_bytes": own.total_bytes if own is not None else 0,
        }  # fmt: skip

    def _peers(self) -> list[dict[str, Any]]:
        """While the group is formed anew its old members are forgotten, and the new ones are yet to come."""
        role, direction = self.host.role, self.host.role.state.direction
        sources = [node for node in self.definition.sources(direction) if node.id in role.senders.by_node]
        targets = [
            node
            for node in self.definition.targets(direction)
            if node.id in role.streams.by_node and node.id in self._lags
        ]
        return [*map(self._primary_row, sources), *map(self._secondary_row, targets)]

    def _primary_row(self, node: Node) -> dict[str, Any]:
        sender = self.host.role.senders.by_node[node.id]
        return {
            "node": node.name, "role": "primary", "connected": sender.live, "incarnation": sender.incarnation,
            "last": sender.last, "checkpoint": sender.checkpoint,
        }  # fmt: skip

    def _secondary_row(self, node: Node) -> dict[str, Any]:
        stream = self.host.role.streams.by_node[node.id]
        writes, size_bytes, seconds = self._lags[node.id].lag(max(stream.applied, 0), self.clock.now_s())
        return {
            "node": node.name, "role": "secondary", "connected": stream.ready, "last": stream.last,
            "sent": stream.sent, "prepared": stream.prepared, "validated": stream.validated,
            "applied": stream.applied, "lag_writes": writes, "lag_bytes": size_bytes, "lag_s": round(seconds, 3),
        }  # fmt: skip
