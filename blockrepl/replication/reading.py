"""Records of what is read from P-VOLs: digests, and copies of blocks, under the overlap lock (PROTOCOL, rule 19)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from blockrepl.block import Buffer, Op
from blockrepl.formats.journal import frame_bytes
from blockrepl.formats.record import DIGEST_BYTES, OP_DIGEST, RecordFlag, RecordKind, encode_record
from blockrepl.replication.actions import Action, DigestBlocks, Digested, ReadBlocks, ReadMetadata
from blockrepl.replication.locks import COPIES, Purpose
from blockrepl.replication.pending import PendingRecord

if TYPE_CHECKING:
    from blockrepl.replication.primary import Primary

ZERO_BLOCK_BYTES = 64 << 10  # zeroes are looked for in pieces of this size
_ZEROES = bytes(ZERO_BLOCK_BYTES)


class Reading:
    """Ranges on their way from the P-VOLs into records."""

    def __init__(self, owner: Primary) -> None:
        self._owner = owner

    def digest(self, volume: int, offset_bytes: int, length_bytes: int) -> list[Action]:
        """Compare a range of a volume with its S-VOL at one number; answered by `Digested`."""
        owner = self._owner
        owner.locks.lock(owner.next_token(), Purpose.VERIFY, volume, offset_bytes, offset_bytes + length_bytes)
        return self.ready()

    def ready(self) -> list[Action]:
        """Ranges that no write in flight touches are read now; later writes to them wait."""
        actions: list[Action] = []
        for token, (purpose, volume, start, end) in self._owner.locks.ready():
            if purpose in COPIES:
                actions.append(ReadBlocks(volume, start, end - start, token))
            elif purpose is Purpose.METADATA:
                actions.append(ReadMetadata(volume, token))
            else:
                actions.append(DigestBlocks(volume, start, end - start, token))
        return actions

    def abort(self) -> list[Action]:
        """The link is gone. Ranges that still wait for writes in flight are given up."""
        actions: list[Action] = [
            Digested({"volume": volume, "offset_bytes": start, "length_bytes": end - start, "aborted": True})
            for purpose, volume, start, end in self._owner.locks.abort()
            if purpose is Purpose.VERIFY
        ]
        return actions + self._let_go()

    def digested(self, token: int, block_bytes: int, digests: list[bytes], now_s: float) -> list[Action]:
        """The blocks of a locked range are read and digested."""
        lock = self._owner.locks.release(token)
        if lock is None:
            return []
        purpose, volume, start, end = lock
        offsets = list(range(start, end, block_bytes))
        lengths = [min(block_bytes, end - offset) for offset in offsets]
        payload = b"".join(digests)
        assert len(payload) == DIGEST_BYTES * len(offsets)
        count = len(offsets)
        head, size = self._encode(
            RecordKind.DIGEST, volume, [OP_DIGEST] * count, offsets, lengths, [payload], len(payload)
        )  # fmt: skip
        record = self._pending(volume, [head, payload], size, now_s)
        if purpose is Purpose.DIGEST:
            record.digest = volume, start
        return self._queue(record)

    def read(self, token: int, data: bytes | bytearray, now_s: float) -> list[Action]:
        """A locked range is read: it travels as a COPY record; zeroes travel as such."""
        lock = self._owner.locks.release(token)
        if lock is None:
            return []
        purpose, volume, start, _ = lock
        stream = self._owner.intermediate if purpose is Purpose.COPY_HERE else 0
        parts = list(_parts(data))
        view = memoryview(data)
        payloads = [None if op == Op.ZERO else view[a:b] for op, a, b in parts]
        head, size = self._encode(
            RecordKind.UPDATE, volume, [op for op, _, _ in parts], [start + a for _, a, _ in parts],
            [b - a for _, a, b in parts], payloads, sum(len(each) for each in payloads if each is not None),
            RecordFlag.COPY, stream,
        )  # fmt: skip
        record = self._pending(volume, [head, *(each for each in payloads if each is not None)], size, now_s)
        record.copy = volume, start
        return self._queue(record)

    def metadata(self, token: int, data: bytes, now_s: float) -> list[Action]:
        """What front ends keep with a volume, at one number: it travels as a METADATA write."""
        owner = self._owner
        lock = owner.locks.release(token)
        if lock is None:
            return []
        volume = lock[1]
        if not data:
            if owner.resyncing.copier is not None:
                owner.resyncing.copier.metadata_done(volume)
            return [*self._let_go(), *owner.send_more()]
        head, size = self._encode(
            RecordKind.UPDATE, volume, [Op.METADATA], [0], [len(data)], [data], len(data), RecordFlag.COPY
        )  # fmt: skip
        record = self._pending(volume, [head, data], size, now_s)
        record.metadata = volume
        return self._queue(record)

    def _encode(
        self, kind: RecordKind, volume: int, ops: list[int], offsets: list[int], lengths: list[int],
        payloads: list[bytes] | list[memoryview | None], payload_bytes: int, flags: int = 0,
        stream: int = 0,
    ) -> tuple[bytearray, int]:  # fmt: skip
        owner = self._owner
        return encode_record(
            kind, owner.group, owner.node, stream or owner.streams[volume], owner.state.incarnation,
            owner.next_batch, volume, ops, [0] * len(ops), offsets, lengths, payloads, payload_bytes, flags,
        )  # fmt: skip

    def _pending(self, volume: int, buffers: list[Buffer], size: int, now_s: float) -> PendingRecord:
        return PendingRecord(self._owner.next_batch, volume, None, buffers, size, frame_bytes(size), now_s)

    def _queue(self, record: PendingRecord) -> list[Action]:
        """The record goes before the writes that waited for it."""
        owner = self._owner
        owner.queue.add(record)
        owner.next_batch += 1
        return [*self._let_go(), *owner.send_more()]

    def _let_go(self) -> list[Action]:
        """What waited goes on its way: to the group, or, while the primary is alone, without it."""
        owner = self._owner
        for volume, batch, since_s in owner.locks.let_go():
            owner.enqueue(volume, batch, since_s)
        return owner.suspension.complete_waiting()


def _parts(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """(op, start, end): runs of zero blocks, and of blocks to be written."""
    begun, size = 0, len(data)
    last: int | None = None
    for at in range(0, size, ZERO_BLOCK_BYTES):
        end = min(at + ZERO_BLOCK_BYTES, size)
        zero = not data[at] and data[at:end] == _ZEROES[: end - at]
        op = int(Op.ZERO if zero else Op.WRITE)
        if last is not None and op != last:
            yield last, begun, at
            begun = at
        last = op
    if last is not None:
        yield last, begun, size
