"""A data node as a process: it keeps one image of each of its volumes, and is a source or a target of the copy.

Either way it has a journal and a secondary role, which owns its epochs. While that role is ACTIVE the node is a source:
a primary role serves its volumes. Which it is changes in a running process: at a takeover, and when the group is formed
anew (ARCHITECTURE.md, "Pair life").
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.definition import Configuration, Definition, Node
from blockrepl.errors import ProtocolError, StorageError, UsageError
from blockrepl.node.base import NodeBase, history_json, journal_report, policy_of, volume_argument
from blockrepl.node.bitmap_report import bitmap_report, open_writes
from blockrepl.node.bitmaps import NodeBitmaps
from blockrepl.node.control import Handler, Progress
from blockrepl.node.create import STATE_NAME, images_of, open_images, state_identity
from blockrepl.node.data_status import source_pair, source_status, target_pair, target_status
from blockrepl.node.exports import Exports
from blockrepl.node.links import Listener
from blockrepl.node.opener_run import OpenerRun
from blockrepl.node.reform_run import ReformRun, question
from blockrepl.node.source import Source
from blockrepl.node.takeover_run import TakeoverRun
from blockrepl.node.target import Target
from blockrepl.node.verify_run import VerifyRun
from blockrepl.replication import primary, secondary
from blockrepl.replication.actions import BecomeSource
from blockrepl.replication.reform_plan import Question
from blockrepl.storage.plain import PlainVolume
from blockrepl.storage.slot_file import SlotFile
from blockrepl.storage.split_volume import SplitVolume


class DataNode(NodeBase):
    """Keeps images: serves those of a source, and plain volumes (SMPL) that have no secondary."""

    def __init__(self, definition: Definition, node: Node, *, alone: bool = False) -> None:
        """``alone``: its primary may complete writes before it has met the intermediate (rule 24)."""
        super().__init__(definition, node)
        self._alone = alone
        self.links.router = self
        definition, held = self.definition, self.held
        self.exports = Exports(definition, node, self.pool)
        self._volumes = definition.volumes_at(node.name)
        self._paired = [volume for volume in self._volumes if volume.replicated]
        self._images = open_images(held, node)
        self._show_sizes()
        self.target: Target | None = None
        self.source: Source | None = None
        self._verify_run: VerifyRun | None = None
        self._listener = Listener(self.links)
        self._opener: OpenerRun | None = None
        if self._paired:
            self._state_file = SlotFile.open(node.directory / STATE_NAME, state_identity(definition, node))
            NodeBitmaps.enlarge(held, node)
            self._bitmaps = NodeBitmaps.open(held, node, self.disk)
            self._bitmaps.on_failed(self._bits_failed)
            self.target = Target(self, {volume.id: self._images[volume.id] for volume in self._paired}, self._bitmaps)
            self.target.host.on_active = self._activated
            self.target.host.on_split = self._split
            self.target.host.on_withdraw = self._withdraw
            self.target.host.on_source = self._stay_source
            self.target.host.on_target = self._become_target
            self.target.host.applier.on_config = self.take
            self.target.host.role.trusted = lambda: self.source is None or self.source.trusted
            self.target.host.role.replayed = lambda: self.source is None or self.source.recovered
            self.target.host.role.alone = lambda: self.source is not None and self.source.host.role.suspension.was_alone
            if self._active:
                self._become_source()
        self.prepared()

    @property
    def _active(self) -> bool:
        return self.target is not None and self.target.host.role.state.active

    # life

    async def open(self) -> None:
        for volume in self._volumes:
            if not volume.replicated:
                self.exports.volumes[volume.name] = PlainVolume(volume.name, self._images[volume.id], self.disk)
        if self.target is not None:
            self._listen()
            self.target.host.start()
        if self.source is not None:
            self.source.start()
        await self.exports.listen()

    def _listen(self) -> None:
        address = self.node.listen
        if address is None:
            return
        try:
            self._listener.listen(address.host, address.port)
        except OSError as error:
            raise UsageError(f"cannot listen on {address}: {error.strerror}", hint="is the port taken?") from error

    async def close(self) -> None:
        self._listener.close()
        await self.exports.close()
        if self.source is not None:
            await self.source.close()
        self.links.close_all()
        if self.target is not None:
            await self.target.close()
        for image in self._images.values():
            await asyncio.to_thread(image.fdatasync)

    def tick(self) -> None:
        if self.target is not None:
            self.target.host.tick()
        if self.source is not None:
            self.source.tick()
        if self._opener is not None:
            self._opener.tick()
        self._follow()
        self.exports.settle(failed=self._failed(), following=self.source is None)

    def _follow(self) -> None:
        if self.source is not None and self.target is not None and self._active:
            self.target.follow(self.source.host.role)

    def _failed(self) -> bool:
        """No host can use the pairs any more, through this node."""
        if self.source is not None:
            return self.source.host.role.phase is primary.Phase.FAILED
        return self.target is not None and self.target.host.role.phase is secondary.Phase.FAILED

    # configuration

    def check_prepared(self, configuration: Configuration) -> None:
        super().check_prepared(configuration)
        if self.target is not None and self.target.host.undo.undo is not None:
            raise UsageError(f"{self.node.name} is still ending a copy", hint="try again in a moment")

    def enlarge(self) -> None:
        held = self.held
        for volume, _ in images_of(held, self.node):
            self._images[volume.id].grow(volume.size_bytes)
        if self.target is not None:
            self._bitmaps.grow(held, self.node)
            self.target.enlarge({volume.id: volume.size_bytes for volume in held.volumes_at(self.node.name)})

    def prepared(self) -> None:
        digest = self.config.held.digest
        if self.target is not None:
            self.target.host.role.prepared_for(digest)
        if self.source is not None:
            self.source.host.role.prepared_for(digest)

    def _told_config(self, digest: int, number: int) -> None:
        try:
            self.take(digest, number)
        except StorageError as error:
            assert self.source is not None
            self.source.host.fail(str(error))

    def took(self) -> None:
        self._volumes = self.definition.volumes_at(self.node.name)
        self._paired[:] = [volume for volume in self._volumes if volume.replicated]
        self._show_sizes()
        self.exports.reconfigure(self.definition)
        policy = policy_of(self.definition)  # a primary's checkpoints follow the size of the rings
        if self.target is not None:
            self.target.host.role.policy = policy
        if self.source is not None:
            self.source.host.role.policy = policy

    def journal_report(self) -> dict[str, Any] | None:
        return journal_report(self.target.host.journal) if self.target is not None else None

    async def move_journal(self, path: Path, ring_bytes: int) -> None:
        if self.target is None:
            await super().move_journal(path, ring_bytes)
            return
        await self.target.move_journal(path, ring_bytes)

    def _show_sizes(self) -> None:
        """What hosts see; the files may be prepared for more."""
        for volume in self._volumes:
            self._images[volume.id].size_bytes = volume.size_bytes

    # role changes

    def _become_source(self) -> None:
        """The secondary role is active: a primary serves the volumes; after a takeover alone (SSWS)."""
        assert self.target is not None
        self.source = Source(
            self, self.exports, self._paired, self._images, self._state_file, self._bitmaps,
            self.target.host.role.state, alone=self._alone,
        )  # fmt: skip
        beside = self.target.host.role
        self.source.host.role.suspension.bound = lambda: beside.state.promised
        self._verify_run = VerifyRun(self.source.host)
        self.source.host.on_config = self._told_config
        self.prepared()

    def _activated(self) -> None:
        """Taken over, or not turned into a target after all: hosts may use the volumes."""
        if self.source is None or self.source.host.retired:
            try:
                self._become_source()
            except StorageError as error:  # active it is, durably: the next process serves
                assert self.target is not None
                self.target.host.fail(str(error))
                return
        assert self.source is not None
        self.source.start()
        self.source.publish()

    def _stay_source(self, action: BecomeSource, done: Callable[[], None]) -> None:
        """A reform: sessions of hosts stay."""
        assert self.source is not None
        self.source.reform(action.epoch, action.direction, done)

    def _become_target(self) -> None:
        """A reform: its hosts were cut off, and that it is a target is durable."""
        self.source = self._verify_run = None

    def _split(self, writable: bool) -> None:
        """Split from the group: hosts may look at the S-VOLs, and write them behind a bitmap if so asked."""
        for volume in self._paired:
            self.exports.volumes[volume.name] = SplitVolume(
                volume.name, self._images[volume.id], self.disk, self._bitmaps.bitmaps[volume.id],
                self._bitmaps.save, writable=writable,
            )  # fmt: skip

    def _withdraw(self, done: Callable[[], None]) -> None:
        """No host uses the volumes any more when ``done`` is called; later commands of theirs fail."""
        if self.source is not None:
            self.source.retire("this site is to be the copy now", done)
            return
        volumes = [self.exports.volumes.pop(volume.name, None) for volume in self._paired]
        split = [volume for volume in volumes if isinstance(volume, SplitVolume)]
        left = len(split)
        if not left:
            self.loop.call_soon(done)

        def withdrawn() -> None:
            nonlocal left
            left -= 1
            if not left:
                done()

        for volume in split:
            volume.withdraw(withdrawn)

    def _bits_failed(self, error: StorageError) -> None:
        for volume in self.exports.volumes.values():
            if isinstance(volume, SplitVolume):
                volume.stop(str(error))
        if self.target is not None:
            self.target.host.fail(str(error))
        if self.source is not None:
            self.source.host.fail(str(error))

    # links

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """See `links.Router`."""
        if self.target is None:
            raise ProtocolError("this node has no pair")
        self.target.accepted(link, fields)

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """See `links.Router`."""
        if self.source is not None and self.source.owns(link):
            self.source.message(link, kind, fields)
        elif self._opener is not None and self._opener.owns(link):
            self._opener.message(link, kind, fields)
        elif self.target is not None:
            self._follow()  # its promise is to say what the source has worked in until now
            self.target.message(link, kind, fields, epoch)

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """See `links.Router`."""
        if self.source is not None and self.source.owns(link):
            self.source.bulk(link, kind, chunk, start, end)
        elif self.target is not None:
            self.target.bulk(link, kind, epoch, chunk, start, end)

    def lost(self, link: int) -> None:
        """See `links.Router`."""
        if self.source is not None and self.source.owns(link):
            self.source.lost(link)
        elif self._opener is not None and self._opener.owns(link):
            self._opener.lost(link)
        elif self.target is not None:
            self.target.host.lost(link)

    def settle(self) -> None:
        """See `links.Router`."""
        if self.source is not None:
            self.source.host.settle()
        if self.target is not None:
            self.target.host.settle()

    # control

    def handlers(self) -> dict[str, Handler]:
        return {
            **self.exports.handlers(), "takeover": self._take_over, "reform": self._reform, "verify": self._verify,
            "bitmap": self._bitmap, "configure": self._configure,
        }  # fmt: skip

    async def _take_over(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        state = self.target.host.role.state if self.target is not None else None
        if state is None or (state.active and not state.rolling):  # one that has taken over may finish what it led
            raise UsageError(
                f"{self.node.name} is no secondary now: its volumes are the source of the copy",
                hint="run takeover at the other site: see `blockrepl status`",
            )
        run = TakeoverRun(self.definition, self.node, self.links, self.clock, progress)
        with self._opening(run):
            return await run.run(
                dry_run=bool(args.get("dry_run")),
                force=bool(args.get("force")),
                writable=not args.get("read_only"),
                marker=str(args.get("marker") or ""),
                planned=bool(args.get("planned")),
            )

    async def _reform(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if not self._active:
            raise UsageError(
                f"{self.node.name} is not the source of a copy: it has not taken over",
                hint="run this at the site that serves the volumes: see `blockrepl status`",
            )
        asked = question(
            self.definition, self.node, replaced=str(args.get("node") or ""), force=bool(args.get("force")),
            verify=bool(args.get("verify")), planned=bool(args.get("planned")),
        )  # fmt: skip
        dry_run = bool(args.get("dry_run"))
        if not dry_run:  # a promise stops production: none is asked for what is refused anyway
            await self._run_reform(asked, progress, dry_run=True)
        return await self._run_reform(asked, progress, dry_run=dry_run)

    async def _run_reform(self, asked: Question, progress: Progress, *, dry_run: bool) -> dict[str, Any]:
        run = ReformRun(self.definition, self.node, self.links, self.clock, progress)
        with self._opening(run):
            return await run.run(asked, dry_run=dry_run)

    @contextlib.contextmanager
    def _opening(self, run: OpenerRun) -> Iterator[None]:
        if self._opener is not None:
            raise UsageError("a takeover or a swap is under way here", hint="wait for it")
        self._opener = run
        try:
            yield
        finally:
            self._opener = None

    async def _bitmap(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        names = {volume.id: volume.name for volume in self._paired}
        role = self.source.host.role if self.source is not None else None
        return {
            "node": self.node.name,
            "volumes": bitmap_report(self._bitmaps.bitmaps, names) if self._paired else [],
            "trusted": self.source is None or self.source.trusted,
            "open_writes": open_writes(role, names) if role is not None and not role.state.suspended else [],
        }

    async def _configure(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """In a group of plain volumes there is no order: it takes effect at once."""
        if self.definition.replicated:
            raise UsageError("the intermediate gives the number", hint="blockrepl adjust")
        self.take(int(args.get("digest") or 0), 0)
        return {"number": 0}

    async def _verify(self, args: dict[str, Any], progress: Progress) -> dict[str, Any]:
        if self._verify_run is None:
            raise UsageError(f"{self.node.name} is not the source of a copy", hint="see: blockrepl status")
        name = volume_argument(args, [volume.name for volume in self._paired])
        return await self._verify_run.run(self.definition.volume(name), progress)

    # status

    def status(self) -> dict[str, Any]:
        pair, shown = "SMPL", self._role_status()
        if self.source is not None:
            pair = source_pair(self.source.host.role)
        elif self.target is not None:
            pair = target_pair(self.target.host.role)
        role = "S-VOL" if self.source is None and self.target is not None else "P-VOL"
        return {
            **shown,
            "ready": self._ready(),
            "volumes": [
                {
                    "name": volume.name, "id": volume.id, "size_bytes": volume.size_bytes,
                    "role": role if volume.replicated else "P-VOL", "state": pair if volume.replicated else "SMPL",
                    **self.exports.entry(volume.name),
                }
                for volume in self._volumes
            ],
            "peers": [{"node": self.definition.intermediate.name, "connected": self._connected()}]
            if self._paired
            else [],
            "journal": self._journal(),
            "taken_at": self._taken_at(),
            "history": history_json(self.target.host.role.state.history) if self.target is not None else [],
            "sessions": self.exports.sessions(),
        }  # fmt: skip

    def _role_status(self) -> dict[str, Any]:
        if self.source is not None:
            return source_status(self.source.host, {volume.id: volume.name for volume in self._paired})
        if self.target is not None:
            return target_status(self.target.host)
        return {"state": "serving", "reason": "", "epoch": None, "promised": None, "watermarks": {}}

    def _taken_at(self) -> int | None:
        """The number at which this side took over, while nothing was formed anew since."""
        state = self.target.host.role.state if self.target is not None else None
        return state.number if state is not None and state.active and state.rolling else None

    def _ready(self) -> bool:
        if self.source is not None:
            # A role that is live exports at the next tick: until then hosts would be turned away.
            role = self.source.host.role
            served = role.live or (role.suspended and role.suspension.confirmed)
            return served and len(self.exports.volumes) == len(self._volumes)
        if self.target is not None:
            return self.target.host.role.phase is not secondary.Phase.FAILED
        return len(self.exports.volumes) == len(self._volumes)

    def _connected(self) -> bool:
        if self.source is not None:
            return bool(self.source.host.role.link)
        return self.target is not None and bool(self.target.host.role.link)

    def _journal(self) -> dict[str, Any] | None:
        if self.target is None:
            return None
        journal = self.target.host.journal.journal
        return {"size_bytes": journal.ring_bytes, "used_bytes": journal.used_bytes}
