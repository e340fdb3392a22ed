"""Hosts a primary: its P-VOLs, its state file, and the volumes that front ends see."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from blockrepl.block import Volume, WriteBatch
from blockrepl.errors import BlockError, StorageError
from blockrepl.formats.record import RecordHead
from blockrepl.formats.state import encode_primary
from blockrepl.node.digests import VERIFY_BLOCK_BYTES, digest_range
from blockrepl.node.host import Host
from blockrepl.node.ports import Clock, Disk, Image, Links, Log, SaveBitmaps, Workers
from blockrepl.node.store import store_record
from blockrepl.node.volume_sync import VolumeSync
from blockrepl.replication.actions import (
    DigestBlocks,
    Digested,
    FailBatch,
    ReadBlocks,
    ReadMetadata,
    Reformed,
    SaveBits,
    SaveState,
    StoreBatch,
    StoreRecord,
    SyncVolumes,
    TakeConfig,
)
from blockrepl.replication.primary import Phase, Primary

MAX_ATOMIC_BYTES = 1 << 20

SaveBlob = Callable[[bytes, Callable[[], None]], None]
"""Write a state blob durably, then call back on the loop; raises StorageError."""


class PrimaryHost(Host):
    """Performs a primary's actions. ``images``: volume id → its P-VOL."""

    def __init__(
        self,
        role: Primary,
        images: Mapping[int, Image],
        save_blob: SaveBlob,
        save_bits: SaveBitmaps,
        disk: Disk,
        links: Links,
        clock: Clock,
        workers: Workers,
        log: Log,
    ) -> None:
        super().__init__(links, clock, workers, log)
        self.role = role
        self.images = images
        self.disk = disk
        self.on_digested: Callable[[dict[str, Any]], None] = lambda _fields: None
        self.on_reformed: Callable[[], None] = lambda: None
        self.on_config: Callable[[int, int], None] = lambda _digest, _number: None
        self.retired = ""  # why no host is served any more: the P-VOLs become S-VOLs
        self.copied_bytes = 0  # of P-VOLs read for copies
        self._save_blob = save_blob
        self._save_bits = save_bits
        self._sync = VolumeSync(images, disk, workers)
        self._waiting: list[Callable[[], None]] = []
        self._performers |= {
            StoreBatch: self._store_batch,
            StoreRecord: self._store_record,
            FailBatch: self._fail_batch,
            SyncVolumes: self._sync_volumes,
            SaveState: self._save,
            DigestBlocks: self._digest_blocks,
            ReadBlocks: self._read_blocks,
            ReadMetadata: self._read_metadata,
            SaveBits: self._save_bitmaps,
            Reformed: lambda _action: self.on_reformed(),
            Digested: self._digested,
            TakeConfig: lambda action: self.on_config(action.digest, action.number),
        }

    # entries from outside

    def submit(self, volume: int, batch: WriteBatch) -> None:
        """A front end's batch."""
        self.perform(self.role.submit(volume, batch, self.clock.now_s()))
        self.settle()

    def record(self, link: int, head: RecordHead, record: memoryview) -> None:
        """A RECORD arrived (replay). Raises ProtocolError."""
        self.perform(self.role.record(link, head, record, self.clock.now_s()))

    def tick(self) -> None:
        """Time passes."""
        self.perform(self.role.tick(self.clock.now_s(), self.clock.boot_ns()))
        self.settle()

    def lost(self, link: int) -> None:
        """A link is gone."""
        self.perform(self.role.lost(link, self.clock.now_s()))

    def settle(self) -> None:
        super().settle()
        if self._waiting and not self.role.congested:
            waiting, self._waiting = self._waiting, []
            for resume in waiting:
                resume()

    def when_relieved(self, resume: Callable[[], None]) -> None:
        """Call when the role is no longer congested."""
        self._waiting.append(resume)

    def fail(self, reason: str) -> None:
        """A disk error: stop (rule 11)."""
        self.perform(self.role.failed(reason))
        self.settle()

    # performing

    def _store_batch(self, action: StoreBatch) -> None:
        batch = action.batch
        stored: list[BlockError | None] | None = None
        if self.role.phase is not Phase.FAILED:
            told, batch.errors = batch.errors, None
            self.images[action.volume].store(batch)
            stored, batch.errors = batch.errors, told if not action.report else batch.errors
            self._sync.touch((action.volume,))
        elif action.report:
            batch.fail(BlockError(errno.EIO, "the primary stopped after a disk error"))
        batch.release()
        if stored is not None:
            failed = next(error for error in stored if error is not None)
            self.perform(self.role.failed(f"volume {action.volume}: {failed}"))
        if not action.report:
            return
        if batch.fua and batch.errors is None:
            self.disk.sync(self.images[action.volume].fd, partial(self._fua_synced, batch))
        else:
            batch.done(batch)

    def _fua_synced(self, batch: WriteBatch, error: OSError | None) -> None:
        if error is not None:
            self.fail(f"sync failed: {error}")
        if self.role.phase is Phase.FAILED:  # a sync that succeeds after one that failed proves nothing (rule 11)
            batch.fail(BlockError(errno.EIO, "sync failed"))
        elif self.role.fenced:  # a takeover may not have it: nobody is told that it is well (rule 24)
            batch.fail(BlockError(errno.EIO, self.role.why_held()))
        batch.done(batch)

    def _store_record(self, action: StoreRecord) -> None:
        try:
            self._sync.touch(store_record(self.images, action.head, action.record))
        except OSError as error:
            self.perform(self.role.failed(f"replay: {error}"))

    def _fail_batch(self, action: FailBatch) -> None:
        action.batch.fail(BlockError(errno.EIO, action.reason))
        action.batch.done(action.batch)

    def _sync_volumes(self, action: SyncVolumes) -> None:
        def synced(error: OSError | None) -> None:
            if error is not None:
                self.fail(f"sync failed: {error}")
            else:
                self._volumes_synced(action.token)

        self._sync.sync(synced)

    def _volumes_synced(self, token: int) -> None:
        if self.role.phase is not Phase.FAILED:
            self.perform(self.role.volumes_synced(token, self.clock.now_s()))
            self.settle()

    def _save(self, action: SaveState) -> None:
        def saved() -> None:
            self.perform(self.role.saved(action.token, self.clock.now_s()))
            self.settle()

        try:
            self._save_blob(encode_primary(self.role.state), saved)
        except StorageError as error:
            self.perform(self.role.failed(str(error)))

    def _digest_blocks(self, action: DigestBlocks) -> None:
        image = self.images[action.volume]

        def done(digests: Any, error: Exception | None) -> None:
            if error is not None:
                self.fail(f"cannot read volume {action.volume}: {error}")
            else:
                now_s = self.clock.now_s()
                self.perform(self.role.digest_ready(action.token, VERIFY_BLOCK_BYTES, digests, now_s))
                self.settle()

        offset, length = action.offset_bytes, action.length_bytes
        self.workers.run(lambda: digest_range(image, offset, length, VERIFY_BLOCK_BYTES), done)

    def _read_blocks(self, action: ReadBlocks) -> None:
        image, data = self.images[action.volume], bytearray(action.length_bytes)

        def done(_: Any, error: Exception | None) -> None:
            if error is not None:
                self.fail(f"cannot read volume {action.volume}: {error}")
            else:
                self.copied_bytes += len(data)
                self.perform(self.role.blocks_read(action.token, data, self.clock.now_s()))
                self.settle()

        self.workers.run(lambda: image.read(action.offset_bytes, memoryview(data)), done)

    def _read_metadata(self, action: ReadMetadata) -> None:
        try:
            data = self.images[action.volume].metadata()
        except OSError as error:
            self.fail(f"cannot read the metadata of volume {action.volume}: {error}")
            return
        self.perform(self.role.metadata_read(action.token, data, self.clock.now_s()))

    def _save_bitmaps(self, action: SaveBits) -> None:
        def saved() -> None:
            self.perform(self.role.bits_saved(action.token, self.clock.now_s()))
            self.settle()

        try:
            self._save_bits(saved)
        except StorageError as error:
            self.perform(self.role.failed(str(error)))

    def _digested(self, action: Digested) -> None:
        self.on_digested(action.fields)


class PrimaryVolume(Volume):
    """A replicated P-VOL as front ends see it."""

    def __init__(
        self, host: PrimaryHost, volume_id: int, name: str, image: Image, block_size_bytes: int, max_write_bytes: int,
        *, writable: bool = True,
    ) -> None:  # fmt: skip
        self.name = name
        self.size_bytes = image.size_bytes
        self.block_size_bytes = block_size_bytes
        self.max_write_bytes = max_write_bytes
        self.atomic_bytes = min(MAX_ATOMIC_BYTES, max_write_bytes)  # a record is stored, and replayed, whole
        self.writable = writable
        self._host = host
        self._id = volume_id
        self._image = image

    def _stopped(self) -> BlockError | None:
        if self._host.retired:
            return BlockError(errno.EIO, self._host.retired)
        if self._host.role.phase is Phase.FAILED:
            return BlockError(errno.EIO, "the primary stopped after a disk error")
        return None

    def submit(self, batch: WriteBatch) -> bool:
        stopped = self._stopped()
        if stopped is not None:
            batch.fail(stopped)
            batch.release()
            return True
        self._host.submit(self._id, batch)
        return False

    def read(self, offset_bytes: int, view: memoryview, done: Callable[[BlockError | None], None]) -> bool:
        role = self._host.role
        if self._host.retired:
            raise BlockError(errno.EIO, self._host.retired)
        if not role.readable(self._id, offset_bytes, len(view)):
            raise BlockError(errno.EIO, role.why_held() or "not readable now")
        try:
            if self._image.read_cached(offset_bytes, view):
                return True
        except OSError as error:
            raise BlockError(errno.EIO, str(error)) from error

        def read_done(_: Any, error: Exception | None) -> None:
            done(None if error is None else BlockError(errno.EIO, str(error)))

        self._host.workers.run(lambda: self._image.read(offset_bytes, view), read_done)
        return False

    def flush(self, done: Callable[[BlockError | None], None]) -> None:
        # Complete means durable in the journal, so what is left to do is the P-VOL (rule 4).
        host = self._host
        stopped = self._stopped()
        if stopped is not None:
            host.workers.later(lambda: done(stopped))
            return

        def synced(error: OSError | None) -> None:
            if error is not None:
                host.fail(f"volume {self.name}: sync failed: {error}")
            if host.role.phase is Phase.FAILED:
                done(BlockError(errno.EIO, "sync failed"))
            elif host.role.fenced:
                done(BlockError(errno.EIO, host.role.why_held()))
            else:
                done(None)

        host.disk.sync(self._image.fd, synced)

    @property
    def congested(self) -> bool:
        return self._host.role.congested

    def when_relieved(self, resume: Callable[[], None]) -> None:
        self._host.when_relieved(resume)

    def metadata(self) -> bytes:
        return self._image.metadata()

    def allocation(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, bool]] | None:
        try:
            return self._image.allocation(offset_bytes, length_bytes)
        except OSError:
            return None
