"""What every data node of a pair has: a journal, and the secondary role that owns its epochs. It takes links."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockrepl.chunks import Chunk
from blockrepl.errors import ProtocolError
from blockrepl.formats.link import Message
from blockrepl.formats.state import decode_secondary, encode_secondary
from blockrepl.node.asyncio_ports import log_event
from blockrepl.node.base import NodeBase, policy_of, save_last
from blockrepl.node.bitmaps import NodeBitmaps
from blockrepl.node.create import UNDO_NAME, journal_identity
from blockrepl.node.journal_mover import move_journal
from blockrepl.node.journal_reading import JournalReading
from blockrepl.node.secondary_host import SecondaryHost
from blockrepl.replication.primary import Primary
from blockrepl.replication.secondary import Secondary
from blockrepl.storage.image import ImageFile
from blockrepl.storage.journal_file import JournalFile
from blockrepl.storage.undo_file import UndoFile


class Target:
    """The secondary half of a data node. ``images``: by volume id, of the volumes that have a pair."""

    def __init__(self, owner: NodeBase, images: Mapping[int, ImageFile], bitmaps: NodeBitmaps) -> None:
        self._owner = owner
        definition, node = owner.definition, owner.node
        reading = JournalReading()
        journal = JournalFile.open(
            owner.config.journal, journal_identity(definition, node), reading.check, owner.disk,
        )  # fmt: skip
        role = Secondary(
            group=definition.group_id.bytes,
            node=node.id,
            name=node.name,
            intermediate=definition.intermediate.id,
            peers=[each.id for each in definition.nodes if each.role != "intermediate"],
            state=decode_secondary(journal.recovered.state),
            policy=policy_of(definition),
            bitmaps=bitmaps.bitmaps,
        )
        held = reading.tell_secondary(role, journal.journal)
        text = f"journal recovered: {len(reading.heads)} records, holds {role.held}, {len(held)} to apply"
        log_event(text, {})
        state = role.state
        undo = UndoFile.open(
            node.directory / UNDO_NAME, owner.disk, definition.group_id.bytes, node.id,
            {volume: image.identity.size_bytes for volume, image in images.items()},
            state.start if state.copying and not state.initial else None,
        )  # fmt: skip
        self._undo = undo
        self.host = SecondaryHost(
            role, journal, held, images, undo, owner.disk, owner.links, owner.clock, owner.workers, log_event,
            bitmaps.save,
        )  # fmt: skip

    async def move_journal(self, path: Path, ring_bytes: int) -> None:
        """See `journal_mover`. Raises UsageError, StorageError."""
        owner, host = self._owner, self.host
        await move_journal(
            host.journal, journal_identity(owner.definition, owner.node), path, ring_bytes, owner.config,
            lambda: encode_secondary(host.role.durable_state()),
        )  # fmt: skip
        host.moved()

    def enlarge(self, sizes: Mapping[int, int]) -> None:
        """A later copy may save blocks up to these sizes, by volume id. There is no copy now."""
        for volume, size_bytes in sizes.items():
            self._undo.grow(volume, size_bytes)

    def follow(self, source: Primary) -> None:
        """While its node is a source, the role beside it knows the epoch that the intermediate opened last.

        However short it was welcomed: a source without an epoch counts as new and empty.
        """
        role = self.host.role
        role.numbered_seen = max(role.numbered_seen, source.acked)
        if source.state.epoch.number <= role.state.epoch.number or self.host.journal.failed:
            return
        role.epochs.follow(source.state.epoch, source.acked)
        self.host.journal.save(encode_secondary(role.durable_state()))

    async def close(self) -> None:
        """A clean end."""
        await save_last(self.host.journal, encode_secondary(self.host.role.durable_state()))

    # links

    def accepted(self, link: int, fields: dict[str, Any]) -> None:
        """HELLO of an intermediate or an opener."""
        self.host.perform(self.host.role.accepted(link, fields, self._owner.clock.now_s()))

    def message(self, link: int, kind: int, fields: dict[str, Any], epoch: int) -> None:
        """A control message. Raises ProtocolError."""
        self.host.perform(self.host.role.received_message(link, kind, fields, epoch, self._owner.clock.now_s()))

    def bulk(self, link: int, kind: int, epoch: int, chunk: Chunk, start: int, end: int) -> None:
        """A record. Raises ProtocolError."""
        if kind != Message.RECORD:
            raise ProtocolError("BATCH does not belong on hop 2")
        self.host.record(link, epoch, chunk, start, end)
